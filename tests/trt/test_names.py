"""Every name that the source and the fake use exists in NVIDIA's bindings, as they use it.

In those of TensorRT, 10.13 to 11.4, and in those of TensorRT for RTX: one source drives both.
"""

from __future__ import annotations

import ast
import inspect
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from tests.pretend import pretended
from tests.trt.bindings import VERSIONS, Surface, UnavailableError, load, load_rtx
from tests.trt.names import guards, problems, uses_tensorrt
from toolchain.recipe.options import TensorRtOptions, TensorRtRtxOptions

ROOT = Path(__file__).parents[2]
# Tests that need a GPU run nowhere else; those on the fake are held to the names by the fake itself.
PLACES = (*(ROOT / "toolchain").rglob("*.py"), *(ROOT / "tests" / "gpu").glob("*.py"), *(ROOT / "tests").glob("*.py"))
FILES = [p for p in sorted(PLACES) if uses_tensorrt(p)]
# (what is reported, why the versions that lack it never get there)
KNOWN = {
    "IBuilderConfig has no build_route": "the backend refuses the recipe's option below 11.1",
    "PlanFile.write takes other arguments": "the docstring is of C++'s method; the binding gives bytes alone",
}


@pytest.fixture(scope="session")
def surfaces(pytestconfig: pytest.Config) -> list[Surface]:
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("tensorrt_bindings")
    try:
        return [load(version, folder) for version in VERSIONS]
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def rtx() -> Surface:
    try:
        return load_rtx()
    except UnavailableError as error:
        pytest.skip(str(error))


def found(path: Path, source: str, surfaces: list[Surface]) -> list[str]:
    return [p for p in problems(source, surfaces, path.name) if not any(known in p for known in KNOWN)]


def for_rtx(path: Path) -> bool:
    """Whether a file drives TensorRT for RTX alone."""
    return "rtx" in path.name


@pytest.mark.parametrize("path", [p for p in FILES if not for_rtx(p)], ids=lambda p: p.name)
def test_the_source_uses_what_is_there(path: Path, surfaces: list[Surface]) -> None:
    assert found(path, path.read_text(), surfaces) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_the_source_uses_what_is_there_for_rtx(path: Path, rtx: Surface) -> None:
    assert found(path, path.read_text(), [rtx]) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_what_the_source_asks_for_is_in_some_version(path: Path, surfaces: list[Surface], rtx: Surface) -> None:
    """A misspelt name in hasattr() or getattr() would be answered with no for ever."""
    every = {name for surface in (*surfaces, rtx) for name in surface.names}
    assert {name for name in guards(path.read_text()) if name not in every} == set()


# Mutations of the real files: no use of TensorRT may go unseen.


def misspelt(source: str, names: set[str]) -> list[tuple[int, str, str]]:
    """(line, attribute, the source with that one attribute misspelt), for every attribute of these names."""
    lines = source.splitlines(keepends=True)
    mutants = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names and not is_foreign(node):
            row, end = (node.end_lineno or 0) - 1, node.end_col_offset or 0
            text = lines[row].encode()
            broken = text[: end - 1] + b"_" + text[end - 1 :]
            mutants.append((row + 1, node.attr, "".join([*lines[:row], broken.decode(), *lines[row + 1 :]])))
    return mutants


def is_foreign(node: ast.Attribute) -> bool:
    """self.name, a recipe's options.name, which mypy checks, and capitals that are not reached through the module: onnx
    has a FLOAT, too."""
    root: ast.expr = node
    while isinstance(root, ast.Attribute):
        root = root.value
    name = root.id if isinstance(root, ast.Name) else ""
    return (name in ("self", "options") and node.value is root) or (
        node.attr.isupper() and name not in ("trt", "tensorrt")
    )


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_no_use_goes_unseen(path: Path, surfaces: list[Surface], rtx: Surface) -> None:
    source = path.read_text()
    # Of one word are names of other libraries, too: Path.name, array.shape, json's dump.
    newest = [rtx] if for_rtx(path) else [surfaces[-1], rtx]
    names = {n for surface in newest for n in surface.names if "_" in n.strip("_") or not n.islower()}
    mutants = misspelt(source, names)
    assert [(line, name) for line, name, mutant in mutants if not found(path, mutant, newest)] == []


def test_the_recipe_speaks_of_members_that_exist(surfaces: list[Surface]) -> None:
    """These become members of TensorRT's enumerations by getattr(), in capitals."""
    hints = typing.get_type_hints(TensorRtOptions)
    for option, cls in (
        ("tiling_optimization_level", "TilingOptimizationLevel"),
        ("hardware_compatibility_level", "HardwareCompatibilityLevel"),
    ):
        for surface in surfaces:
            assert {v.upper() for v in typing.get_args(hints[option])} == set(surface.members(cls) or ())


def test_the_recipe_speaks_of_members_of_rtx(rtx: Surface) -> None:
    """Compute capabilities as SM89, the oldest of which takes no float32; the others in capitals."""
    hints = typing.get_type_hints(TensorRtRtxOptions)
    kinds = {kind.upper() for kind in typing.get_args(hints["kernel_specialization"])}
    assert kinds == set(rtx.members("DynamicShapesKernelSpecializationStrategy") or ())
    (targets, _) = typing.get_args(hints["targets"])
    names = {f"SM{target.replace('.', '')}" for target in typing.get_args(targets)}
    assert names == set(rtx.members("ComputeCapability") or ()) - {"NONE", "CURRENT", "SM75"}


def test_what_the_libraries_differ_in(surfaces: list[Surface], rtx: Surface) -> None:
    """The enumerations of TensorRT for RTX are those of TensorRT 11: what the stand-in says of one holds for both."""
    newest = surfaces[-1]
    shared = {cls for cls in rtx.classes if rtx.members(cls) is not None} & set(newest.classes)
    differing = {
        f"{cls}.{name}"
        for cls in shared
        for name in (rtx.members(cls) or {}).items() ^ (newest.members(cls) or {}).items()
    }
    assert {name.split("'")[1] for name in differing} == {"REQUIRE_USER_ALLOCATION", *LEFT_OUT}


LEFT_OUT = {"PREFER_AOT_PYTHON_PLUGINS", "PREFER_JIT_PYTHON_PLUGINS"}


def test_there_is_something_to_see() -> None:
    uses = sum(len(re.findall(r"\btrt\.\w+", path.read_text())) for path in FILES)
    assert uses > 20, [p.name for p in FILES]


# The checker's own cases

HEAD = "import tensorrt as trt\n"
WRONG = {
    "enum member": ("x = trt.BuilderFlag.STRIP_PLANS", "BuilderFlag has no STRIP_PLANS"),
    "nested enum member": ("x = trt.ILogger.Severity.WARN", "Severity has no WARN"),
    "class": ("x = trt.OnnxParsers(1, 2)", "tensorrt has no OnnxParsers"),
    "method": ("b = trt.Builder(l)\nb.create_netwrok(0)", "Builder has no create_netwrok"),
    "method by convention": ("def f(engine):\n    engine.get_tensor_nam(0)", "ICudaEngine has no get_tensor_nam"),
    "method of what a method returns": (
        "def f(engine):\n    engine.create_engine_inspector().get_engine_info(0)",
        "EngineInspector has no get_engine_info",
    ),
    "method of what a function returns": (
        "def make(l):\n    return trt.Runtime(l)\nr = make(1)\nr.deserialise_cuda_engine(b'')",
        "Runtime has no deserialise_cuda_engine",
    ),
    "method of self": (
        "class E:\n    def __init__(self):\n        self._ctx = trt.Builder(1).create_builder_config()\n"
        "    def f(self):\n        self._ctx.set_flags(1)",
        "IBuilderConfig has no set_flags",
    ),
    "method of an element": (
        "def f(parser):\n    errors = [parser.get_error(i) for i in range(parser.num_errors)]\n"
        "    return [e.describe() for e in errors]",
        "ParserError has no describe",
    ),
    "method of nobody": (
        "def f(thing):\n    thing.set_tensor_addres('x', 1)",
        "looks like TensorRT's set_tensor_address",
    ),
    "option": ("def f(config):\n    config.max_aux_stream = 1", "IBuilderConfig has no max_aux_stream"),
    "option that is read only": ("def f(config):\n    config.num_optimization_profiles = 1", "cannot be set"),
    "option by name": (
        "def f(config):\n    for o in ('tiling_level',):\n        setattr(config, o, 1)",
        "IBuilderConfig has no tiling_level",
    ),
    "keyword": (
        "def f(config, c):\n    config.set_timing_cache(c, ignore_mismatches=False)",
        "takes (cache, ignore_mismatch), not 1 arguments and ['ignore_mismatches']",
    ),
    "argument that is missing": ("def f(config, c):\n    config.set_timing_cache(c)", "takes (cache, ignore_mismatch)"),
    "argument too many": ("def f(engine):\n    engine.get_tensor_name(0, 1)", "takes (index)"),
    "argument of a constructor": ("trt.OnnxParser(1)", "OnnxParser takes (network, logger)"),
    "removed in 11": ("x = trt.BuilderFlag.FP16", "BuilderFlag has no FP16 (11.4.0.106)"),
    "method removed in 11": (
        "def f(engine):\n    engine.create_execution_context_without_device_memory()",
        "(11.4.0.106)",
    ),
    "added after 10.13": ("def f(config):\n    return config.build_route", "(10.13.3.9, 10.16.1.11)"),
    "guarded, and in no version": (
        "def f(config):\n    if hasattr(config, 'build_route'):\n        config.bulid_route = ''",
        "IBuilderConfig has no bulid_route (11.4.0.106)",
    ),
    "override that is missing": (
        "class M(trt.IProgressMonitor):\n    def phase_started(self, a, b, c): ...\n"
        "    def step_complete(self, a, b): ...\n    def phase_finish(self, a): ...",
        "M does not override IProgressMonitor.phase_start",
    ),
    "of the module as a parameter": (
        "def f(trt: Any):\n    return trt.BuilderFlags.TF32",
        "tensorrt has no BuilderFlags",
    ),
    "of the module as a local": (
        "def f(library):\n    trt = library.module()\n    return trt.Bilder(1)",
        "tensorrt has no Bilder",
    ),
    "a class made for a module": (
        "def f(trt: Any):\n    class M(trt.IProgressMonitor):\n        def phase_start(self, a, b, c): ...\n"
        "        def step_complete(self, a, b): ...\n    return M()",
        "M does not override IProgressMonitor.phase_finish",
    ),
    "override with other arguments": ("class L(trt.ILogger):\n    def log(self, msg): ...", "takes other arguments"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_reported(surfaces: list[Surface], case: str) -> None:
    source, message = WRONG[case]
    reported = problems(HEAD + source, surfaces)
    assert len(reported) == 1, reported
    assert message in reported[0]


RIGHT = {
    "guarded method": "def f(config):\n    if hasattr(config, 'build_route'):\n        config.build_route = ''",
    "guarded name": (
        "def f(layer):\n    kind = getattr(trt.LayerType, 'ATTENTION_INPUT', None)\n    if layer.type == kind:\n"
        "        layer.__class__ = trt.IAttentionInputLayer\n        layer.attention.decomposable = True"
    ),
    "an argument of another library": "def f(parser: argparse.ArgumentParser):\n    parser.add_argument('x')",
    "overloads": (
        "def f(engine, c, n):\n    engine.create_execution_context(strategy=1)\n    c = trt.Builder(n)\n"
        "    c.build_serialized_network(1, 2)"
    ),
    "annotation": "def f(e: trt.ICudaEngine | None):\n    return e.device_memory_size_v2",
    "base class": "class L(trt.ILogger):\n    def __init__(self):\n        trt.ILogger.__init__(self)\n"
    "    def log(self, severity, msg): ...",
    "splat": "def f(context, a):\n    context.set_tensor_address(*a)",
    "a parameter": "def f(trt: Any, logger: Any):\n    return trt.Builder(logger).create_builder_config().flags",
    "a local": "def f(library):\n    trt = library.module()\n    return trt.BuilderFlag.TF32",
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_right_is_not_reported(surfaces: list[Surface], case: str) -> None:
    assert problems(HEAD + RIGHT[case], surfaces) == []


OF_ONE = {
    "IBuilderConfig has no set_compute_capability": "def f(config):\n    config.set_compute_capability(1, 0)",
    "IExecutionContext has no is_stream_capturable": "def f(context):\n    return context.is_stream_capturable(1)",
    "tensorrt has no ComputeCapability": "def f(trt: Any):\n    return trt.ComputeCapability.SM89",
}
"""Only TensorRT for RTX has these."""


@pytest.mark.parametrize("problem", OF_ONE)
def test_what_one_library_has_is_guarded(surfaces: list[Surface], rtx: Surface, problem: str) -> None:
    head, body = OF_ONE[problem].split("\n")
    name = problem.split()[-1]
    holder = head[6:].split(":")[0].rstrip(")")
    guarded = f"{head}\n    if hasattr({holder}, '{name}'):\n    {body}"
    for source, expected in ((OF_ONE[problem], [f"source:2: {problem} ({', '.join(VERSIONS)})"]), (guarded, [])):
        assert problems(source, surfaces) == expected
        assert problems(source, [rtx]) == []


# The fake

EXTRA = {"violations"}
# Where one Python signature stands for overloads of the binding; a writer's docstring tells of C++'s method, and the
# binding calls it with bytes alone.
MERGED = {"Weights.__init__", "Dims.__init__", "IStreamWriter.write", "ICudaEngine.create_execution_context"}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_fake_invents_nothing(surfaces: list[Surface], version: str) -> None:
    real = next(s for s in surfaces if s.version == version)
    with pretended(FAKE_TENSORRT_VERSION=version) as fake:
        assert fake.__version__ == version
        public = {n: v for n, v in vars(fake).items() if not n.startswith("_")}
        assert {n for n in public if not real.has(n)} - EXTRA == {"annotations"}
        wrong = [w for n, v in public.items() if isinstance(v, type) for w in differences(n, v, real)]
        functions = {n: v for n, v in public.items() if inspect.isfunction(v)}
        wrong += [n for n, v in functions.items() if not same_arguments(v, real.function(n), 0)]
    assert wrong == []


def test_the_fake_for_rtx_invents_nothing(rtx: Surface) -> None:
    with pretended():
        import tensorrt_rtx as fake

        assert fake.__version__ in rtx.version
        mine = {n: getattr(fake, n) for n in fake.__all__ if n not in EXTRA}
        assert {n for n in mine if not rtx.has(n)} == set()
        wrong = [w for n, v in mine.items() for w in differences(n, v, rtx)]
    assert wrong == []


def differences(name: str, cls: Any, real: Surface) -> list[str]:
    """What a class of the fake has that the binding's has not, or has otherwise."""
    members = real.members(name)
    if members is not None:
        return [f"{name}.{m}" for m, value in cls.__members__.items() if members.get(m) != int(value)]
    wrong, known = [], real.attributes(name)
    for attribute, value in vars(cls).items():
        if attribute.startswith("_") and attribute != "__init__":
            continue
        entry, label = known.get(attribute), f"{name}.{attribute}"
        if entry is None:
            wrong.append(label)
        elif isinstance(value, property):
            wrong += [label] if entry["kind"] != "property" or (value.fset and not entry["settable"]) else []
        elif inspect.isfunction(value) and label not in MERGED:
            wrong += [] if same_arguments(value, real.method(name, attribute), 1) else [label]
    return wrong


def same_arguments(function: Any, overloads: list[Any], skip: int) -> bool:
    mine = list(inspect.signature(function).parameters.values())[skip:]
    ours = [(p.name, p.default is p.empty) for p in mine]
    return not overloads or ours in [[(a.name, a.required) for a in o.arguments] for o in overloads]


def test_the_fake_has_what_the_source_uses(surfaces: list[Surface]) -> None:
    """Else a test would fail in the fake for what works with NVIDIA's module."""
    with pretended() as fake:
        import tensorrt_rtx

        for path in FILES:
            names = set(re.findall(r"\btrt\.([A-Za-z]\w+)", path.read_text()))
            assert {n for n in names if not hasattr(tensorrt_rtx if for_rtx(path) else fake, n)} <= {"nptype"}
