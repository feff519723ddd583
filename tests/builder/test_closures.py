"""An artifact's key covers the code that decides it: `CLOSURES` is what the entry modules of the stages import.

python -m tests.builder.test_closures > closures.py && mv closures.py toolchain/builder/closures.py
"""

from __future__ import annotations

import textwrap

import pytest

from tests.imports import modules, neighbours, room
from toolchain.builder.closures import CLOSURES
from toolchain.builder.steps import code_digest
from toolchain.engines.builders import BUILDERS
from toolchain.engines.runners import RUNNERS
from toolchain.models.registry import MODELS

GATE = "check.gate"
"""What the gate of a build runs: engines, and so what both sides of a backend import."""
NEUTRAL = {
    "errors": "what failed leaves no artifact",
    "recipe": "the values that a stage uses are in its key",
    "settings": "the values that a stage uses are in its key",
    "store": "moves finished files, whose digests it keeps",
    "garbage": "when Python frees memory",
}
"""Rooms and modules that decide nothing of what is in an artifact, and why."""
SHARED = {
    "cuda.driver",
    "engines.cpu",
    "engines.onnxruntime.device",
    "engines.onnxruntime.package",
    "engines.onnxruntime.session",
    "engines.onnxruntime_cuda.provider",
    "engines.openvino.compiled",
    "engines.openvino.device",
    "engines.tensorrt.device",
    "engines.tensorrt.layout",
    "engines.tensorrt.library",
}
"""What the build side and the run side of backends have in common."""


def entries() -> list[str]:
    """The modules that are called for a stage, for a family, for a backend, and for the gate."""
    stages = [module for module in modules() if module.startswith("builder.stages.")]
    families = [f"models.{name}_components" for name in MODELS]
    code = [code for backend in BUILDERS.values() for code in (type(backend), backend.prepare)]
    return sorted({GATE, *stages, *families, *(part.__module__.removeprefix("toolchain.") for part in code)})


def decisive(module: str) -> frozenset[str]:
    """What a module imports to run, not for type checkers alone, and that may decide something."""
    return frozenset(name for name in neighbours(module, types=False) if room(name) not in NEUTRAL)


def closure(entry: str) -> tuple[str, ...]:
    reached, waiting = {entry}, [entry]
    while waiting:
        new = decisive(waiting.pop()) - reached
        reached |= new
        waiting += new
    return tuple(sorted(reached))


def test_every_entry_has_its_closure() -> None:
    assert sorted(CLOSURES) == entries()


@pytest.mark.parametrize("entry", entries())
def test_the_closure_is_what_is_imported(entry: str) -> None:
    assert CLOSURES[entry] == closure(entry), "python -m tests.builder.test_closures writes the new ones"


def test_builders_and_runners_share_no_more_than_this() -> None:
    """What only opens and runs engines is in no closure of a builder, and the other way round."""
    runners = [type(runner).__module__.removeprefix("toolchain.") for runner in RUNNERS.values()]
    reached = {module for runner in runners for module in closure(runner)}
    decides = {module for entry, modules in CLOSURES.items() if entry != GATE for module in modules}
    assert {module for module in reached & decides if room(module) in ("cuda", "engines")} == SHARED
    assert not any(room(module) == "runtime" for module in decides)


@pytest.mark.parametrize("entry", [entry for entry in entries() if entry.startswith("models.")])
def test_a_family_depends_on_no_other(entry: str) -> None:
    others = {f"models.{name}{kind}" for name in MODELS for kind in ("", "_components", "_step")}
    own = {entry, entry.replace("_components", "_step")}
    assert (others - own).isdisjoint(CLOSURES[entry])
    assert own <= set(CLOSURES[entry])


@pytest.mark.parametrize("entry", [entry for entry in entries() if entry.startswith("models.")])
def test_schedulers_decide_nothing_of_a_graph_but_its_layout(entry: str) -> None:
    assert {module for module in CLOSURES[entry] if room(module) == "sampler"} == {"sampler.layout"}


def test_backends_do_not_decide_for_each_other() -> None:
    by_name = {name: type(b).__module__.removeprefix("toolchain.") for name, b in BUILDERS.items()}
    of_tensorrt = set(CLOSURES[by_name["tensorrt"]])
    assert not any(module.startswith("engines.onnxruntime") for module in of_tensorrt)
    assert not any(module.startswith("engines.tensorrt") for module in CLOSURES[by_name["onnxruntime"]])


def test_how_engines_are_built_decides_no_weight_file() -> None:
    for backend in BUILDERS.values():
        prepare = backend.prepare.__module__.removeprefix("toolchain.")
        reached = {m for m in CLOSURES[prepare] if m.startswith("engines.")}
        assert reached - {"engines.onnxruntime.integer", "engines.openvino.integer"} == {
            prepare
        }  # which is a part of the preparation


def test_the_digest_is_of_all_entries() -> None:
    both = ["models.sd_components", "models.flux_components"]
    assert (
        len({code_digest(*families) for families in (["models.sd_components"], ["models.flux_components"], both)}) == 3
    )


def text() -> str:
    lines = ['"""Which modules decide what a stage writes: all that its entry modules import.', ""]
    lines += ["Held by tests/builder/test_closures.py, which also writes this file.", '"""', ""]
    lines += ["_NAMES = {"]
    for entry in entries():
        names = textwrap.wrap(" ".join(closure(entry)), 112, break_on_hyphens=False)
        lines += [f'    "{entry}": """', *(f"        {line}" for line in names), '    """,']
    lines += ["}", "CLOSURES = {entry: tuple(names.split()) for entry, names in _NAMES.items()}"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(text())
