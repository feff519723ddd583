"""Fixtures shared by all tests. The tiny model is built once per test run; parallel workers share one store."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.parity import Build

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The workers of pytest-xdist have the width of a terminal in it, which the commands would take for their own.
os.environ.pop("COLUMNS", None)
# A shell starts its background jobs with SIGINT ignored, and every process that a test interrupts would ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Each worker on cores of its own: engines start a thread for every core that they may use, and where those of two
# workers wait for each other, a picture takes four times as long and as much CPU time.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    number, count = (int(os.environ[f"PYTEST_XDIST_{name}"].removeprefix("gw")) for name in ("WORKER", "WORKER_COUNT"))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[number::count] or {cores[number % len(cores)]})
# What the tests and their libraries are made of stays: looking through it for garbage took a quarter of a run.
gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="session")
def shared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of one test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def store(shared_root: Path) -> Path:
    return shared_root / "store"


@pytest.fixture(scope="session")
def graphs_into(store: Path) -> Callable[[Path, Path, Path], None]:
    """Puts the graphs of a recipe into a store of a test's own; they are exported in the shared one."""

    def fill(own: Path, recipe: Path, model: Path) -> None:
        import toolchain
        from toolchain.builder.plan import execute

        plan = toolchain.plan_build(recipe, str(model), store=store, graphs_only=True)
        for graph in execute(plan, lambda *_: None).values():
            shutil.copytree(graph.path, own / graph.stage / graph.key, dirs_exist_ok=True)

    return fill


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random StableDiffusionPipeline folder. Read only: tests that damage a model use `tiny_copy`."""
    from tests.tiny import make_sd

    return make_sd(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def family_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a family, made once. Read only."""

    @functools.cache
    def made(family: str) -> Path:
        from tests.families import MAKERS

        return MAKERS[family](tmp_path_factory.mktemp(family) / "model")

    return made


@pytest.fixture
def tiny_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import RECIPE

    path = tmp_path_factory.mktemp("recipes") / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Path, tiny_recipe: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built bundle of the tiny model. Read only: tests that damage a bundle use `bundle_copy`."""
    import toolchain

    output = tmp_path_factory.mktemp("bundles") / "tiny"
    toolchain.build(tiny_recipe, str(tiny_model), output, store=store)
    return output


@pytest.fixture(scope="session")
def openvino_bundle(tiny_model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in one size, in float32 with OpenVINO. Read only."""
    import toolchain
    from tests.tiny import RECIPE

    folder = tmp_path_factory.mktemp("openvino")
    recipe = folder / "tiny-openvino.toml"
    recipe.write_text('backend = "openvino"\n' + RECIPE.replace('["1x64x64", "2x64x96"]', '["1x64x64"]'))
    toolchain.build(recipe, str(tiny_model), folder / "bundle", store=store)
    return folder / "bundle"


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def build(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds and loads a bundle from a name, a model and the text of a recipe; whether it is good is up to the test."""
    import toolchain

    def made(name: str, model: Path, text: str) -> toolchain.Pipeline:
        folder = tmp_path_factory.mktemp(name)
        (folder / f"{name}.toml").write_text(text)
        toolchain.build(folder / f"{name}.toml", str(model), folder / "bundle", store=store, gate=False)
        return toolchain.load(folder / "bundle")

    return made
