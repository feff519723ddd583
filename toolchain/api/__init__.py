"""One function for each command of the command line, for use in Python too.

A `recipe` is a Recipe, a file, or the name of one that comes with diffbuild; a `model` is a diffusers folder, a hub id,
or a .safetensors file that holds all of a model, with `config` for what such a file does not say; a `store` that is not
given is $DIFFBUILD_STORE, or ./artifacts. Each function imports what it needs: importing this module is cheap.
"""

from __future__ import annotations

from toolchain.api.builds import StepProgress, StepShare, build, calibrate, export_graphs, plan_build, plan_memory
from toolchain.api.bundles import (
    backend_refusal,
    bench_bundle,
    check_bundle,
    generate,
    inspect_bundle,
    sign_bundle,
    trace_bundle,
    verify_bundle,
)
from toolchain.api.machine import clean_store, examine_machine, list_artifacts, verify_store
from toolchain.api.recipes import check_recipe_file, shipped_recipes, tune_recipe, write_recipe

__all__ = [
    "StepProgress",
    "StepShare",
    "backend_refusal",
    "bench_bundle",
    "build",
    "calibrate",
    "check_bundle",
    "check_recipe_file",
    "clean_store",
    "examine_machine",
    "export_graphs",
    "generate",
    "inspect_bundle",
    "list_artifacts",
    "plan_build",
    "plan_memory",
    "shipped_recipes",
    "sign_bundle",
    "trace_bundle",
    "tune_recipe",
    "verify_bundle",
    "verify_store",
    "write_recipe",
]
