"""OpenVINO as a contender: a bundle of the same recipe with that backend, from the graphs that the store has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.bundle.bundle import Bundle
from toolchain.engines.builders import builder_of, usable_dtypes
from toolchain.recipe import ComponentRecipe, Recipe
from toolchain.recipe.options import OpenVinoOptions

if TYPE_CHECKING:
    from toolchain.builder.steps import Step

OPENVINO = "openvino"


def rebuilt(
    bundle: Bundle, model: Path, output: Path, progress: Callable[[str], None], store: str | Path | None = None
) -> Bundle:
    """The bundle of `for_openvino`, built at `output`.

    model  the diffusers folder that the bundle was built from
    store  where the graphs are, or are built; None: the default store

    Raises what `toolchain.builder.plan.make_plan` and `toolchain.builder.assemble.assemble` raise.
    """
    from toolchain.builder.assemble import assemble
    from toolchain.builder.plan import make_plan
    from toolchain.models.hub import resolve_model
    from toolchain.store.artifacts import Store, default_store

    def ungated(*_: object) -> Mapping[str, Any]:
        raise AssertionError("the plan has no gate")

    recipe = for_openvino(bundle.recipe)
    plan = make_plan(recipe, resolve_model(str(model)), Store(Path(store or default_store())), gate=False)

    def say(step: Step, what: str) -> None:
        if what == "start" and not step.hit:
            progress(f"{OPENVINO}: {step.id}")

    return assemble(plan, output, ungated, say)


def for_openvino(recipe: Recipe) -> Recipe:
    """A recipe with OpenVINO on this CPU as its backend, and as many threads as it has.

    A component is in float32 where the CPU does not compute in its type, and not quantised where OpenVINO cannot.
    """
    threads = recipe.onnxruntime.threads if recipe.backend == "onnxruntime" else 0
    options, backend = OpenVinoOptions(threads=threads), builder_of(OPENVINO)
    dtypes = usable_dtypes(backend, options)

    def fitting(component: ComponentRecipe) -> ComponentRecipe:
        if component.dtype not in dtypes:
            component = replace(component, dtype="float32", keep_float32=())
        refused = component.quantize is not None and backend.refuses_quantized(component.quantize, options)
        return replace(component, quantize=None) if refused else component

    components = {name: fitting(component) for name, component in recipe.components.items()}
    fitted = replace(recipe, backend=OPENVINO, openvino=options, components=components)
    return fitted if fitted.quantizes else replace(fitted, calibration=None)
