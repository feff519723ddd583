"""The rules that can be asked without a GPU, asked of the pretended TensorRT and of NVIDIA's own library alike.

The real one is TensorRT for RTX 1.7.1. Its names are those of TensorRT 11.4 (test_names.py), and so the stand-in claims
that version here. What the two are documented to differ in stands beside the test.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.pretend import FAKES, pretended
from tests.rtx import real_trt
from tests.trt.built import WEIGHT, Built, model, monitor
from toolchain.engines.tensorrt.plan_file import make_plan_file
from toolchain.errors import EngineError

HALF, FLOAT, BF16, INT32, INT64 = (
    *(TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.INT32, TensorProto.INT64),
)


@pytest.fixture(params=["pretended", "real"])
def trt(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module. No rule of the pretended one may be broken unless a test says so."""
    if request.param == "real":
        gc.collect()  # a builder that is left over keeps its logger, and the library speaks to none but that
        yield real_trt()
        return
    with pretended() as module:
        yield module
        assert module.violations == []


def errors(built: Built) -> list[tuple[str, str, str]]:
    """Of the parser: code, node, description."""
    found = [built.parser.get_error(i) for i in range(built.parser.num_errors)]
    return [(error.code().name, error.node_name(), error.desc()) for error in found]


def node(op_type: str, *inputs: int, out: int, opset: int = 20, **attributes: Any) -> bytes:
    """y = op_type(a, b, ...), each of 4x4x4x4 and a type."""
    shape = (4, 4, 4, 4)
    given = [helper.make_tensor_value_info(n, t, shape) for n, t in zip("abcd", inputs, strict=False)]
    made = helper.make_node(op_type, [v.name for v in given], ["y"], name="n", **attributes)
    graph = helper.make_graph([made], "g", given, [helper.make_tensor_value_info("y", out, None)])
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10).SerializeToString()
    )


# The parser

MIXED = {
    "Add": node("Add", HALF, FLOAT, out=HALF),
    "Mul of integers": node("Mul", INT32, INT64, out=INT32),
    "Concat": node("Concat", HALF, FLOAT, out=HALF, axis=0),
    "MatMul": node("MatMul", BF16, FLOAT, out=BF16),
    "Where": node("Where", TensorProto.BOOL, HALF, FLOAT, out=HALF),
    "Conv": node("Conv", HALF, FLOAT, out=HALF),
    "Clip": node("Clip", HALF, FLOAT, out=HALF),
}


@pytest.mark.parametrize("case", MIXED)
def test_inputs_of_several_types(trt: Any, case: str) -> None:
    built = Built(trt, MIXED[case])
    assert not built.parser.parse(built.data)
    ((code, name, text),) = errors(built)
    assert (code, name) == ("INVALID_NODE", "n")
    assert "type" in text


TAKEN = {
    "Pow": node("Pow", HALF, FLOAT, out=HALF),
    "CastLike": node("CastLike", HALF, FLOAT, out=FLOAT),
    "bfloat16 Conv under an opset that has none": node("Conv", BF16, BF16, out=BF16),
}


@pytest.mark.parametrize("case", TAKEN)
def test_types_that_may_differ(trt: Any, case: str) -> None:
    built = Built(trt, TAKEN[case])
    assert built.parser.parse(built.data), errors(built)


def test_an_operator_that_is_not_there(trt: Any) -> None:
    built = Built(trt, node("Det", FLOAT, out=FLOAT))
    assert not built.parser.parse(built.data)
    ((code, name, _),) = errors(built)
    assert (code, name) == ("UNSUPPORTED_NODE", "n")
    built.parser.clear_errors()
    assert errors(built) == []


def test_an_opset_newer_than_all_that_it_knows(trt: Any) -> None:
    """Not a word is said of it where the operators are known."""
    built = Built(trt, node("Relu", FLOAT, out=FLOAT, opset=28))
    built.log.clear()
    assert built.parser.parse(built.data)
    assert {severity for severity, _ in built.log} <= {"INFO", "VERBOSE"}


@pytest.mark.parametrize("data", [b"garbage", b"\xff" * 30, model()[:-5]], ids=["text", "bytes", "cut off"])
def test_what_is_no_model(trt: Any, data: bytes) -> None:
    built = Built(trt, data)
    assert not built.parser.load_model_proto(data)
    assert errors(built)[0][0] == "MODEL_DESERIALIZE_FAILED"


def test_a_file_that_is_not_there(trt: Any) -> None:
    built = Built(trt, b"")
    assert not built.parser.parse_from_file("/nowhere/graph.onnx")
    assert len(errors(built)) == 1


def test_a_network_is_filled_once(trt: Any) -> None:
    built = Built(trt, model())
    assert built.parser.parse(built.data)
    assert not built.parser.parse(built.data)
    assert built.said("Parse was called with a non-empty network definition")


def test_an_empty_network(trt: Any) -> None:
    built = Built(trt, model())
    assert built.plan(parse=False) is None
    assert built.said("Network must have at least one output")


def test_what_is_not_there_is_none(trt: Any) -> None:
    built = Built(trt, model())
    assert built.parser.parse(built.data)
    network = built.network
    for index in (-1, 99):
        assert network.get_layer(index) is None
        assert network.get_input(index) is None
        assert network.get_output(index) is None
        assert built.parser.get_error(index) is None


def test_operators(trt: Any) -> None:
    parser = Built(trt, model()).parser
    assert [parser.supports_operator(name) for name in ("MatMul", "Det", "Nothing")] == [True, False, False]


def test_a_network_is_strongly_typed_whether_asked_or_not(trt: Any) -> None:
    """As TensorRT's are from 11 on. Those of 10 must be asked: test_a_weakly_typed_network_of_10_runs_in_float."""
    builder = Built(trt, model()).builder
    flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    for flags in (0, 1 << int(flag)):
        network = builder.create_network(flags)
        assert network.get_flag(flag)
        assert network.flags == 1 << int(flag)


def attention(trt: Any, width: int, *, decomposable: bool) -> Built:
    """Of two heads of a width, under opset 23."""
    given = [helper.make_tensor_value_info(name, HALF, (1, 2, 16, width)) for name in "qkv"]
    made = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="n")
    graph = helper.make_graph([made], "g", given, [helper.make_tensor_value_info("y", HALF, None)])
    opsets = [helper.make_opsetid("", 23)]
    built = Built(trt, helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    assert built.parser.parse(built.data), errors(built)
    layers = [built.network.get_layer(index) for index in range(built.network.num_layers)]
    (layer,) = (layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT)
    layer.__class__ = trt.IAttentionInputLayer
    assert not layer.attention.decomposable
    layer.attention.decomposable = decomposable
    return built


@pytest.mark.parametrize(("width", "fuses"), [(8, False), (16, True), (256, True), (264, False), (512, False)])
def test_attention_that_no_kernel_fits_must_be_decomposable(trt: Any, width: int, fuses: bool) -> None:
    """A width of 12, no multiple of 8 as TensorRT's documentation wants, is fused here, and not by the stand-in."""
    assert (attention(trt, width, decomposable=False).plan(parse=False) is not None) == fuses
    if not fuses:
        assert attention(trt, width, decomposable=True).plan(parse=False) is not None


# Weights


def loaded(trt: Any, data: bytes) -> Built:
    built = Built(trt, data)
    assert built.parser.load_model_proto(data)
    return built


def test_weights_by_pointer(trt: Any) -> None:
    built, weight = loaded(trt, model(external=True)), WEIGHT.copy()
    assert built.parser.load_initializer("w", weight.ctypes.data, weight.nbytes)
    assert built.parser.load_initializer("w", weight.ctypes.data, weight.nbytes)
    assert built.parser.parse_model_proto()
    assert bytes(built.plan(parse=False))


WRONG: dict[str, tuple[str, int, str]] = {
    "unknown name": ("v", 64, "Cannot find initializer name: v"),
    "other size": ("w", 2, "Provided initializer size 2 mismatches with that expected by the model: 64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_initializers(trt: Any, case: str) -> None:
    """They are told in the log, and not among the parser's errors; the right one may still come."""
    name, size, message = WRONG[case]
    built, weight = loaded(trt, model(external=True)), WEIGHT.copy()
    assert not built.parser.load_initializer(name, weight.ctypes.data, size)
    assert built.said(message)
    assert errors(built) == []
    assert built.parser.load_initializer("w", weight.ctypes.data, weight.nbytes)
    assert built.parser.parse_model_proto()


def test_weights_at_no_address(trt: Any) -> None:
    assert not loaded(trt, model(external=True)).parser.load_initializer("w", 0, WEIGHT.nbytes)


def test_weights_and_graphs_before_the_model(trt: Any) -> None:
    built, weight = Built(trt, model(external=True)), WEIGHT.copy()
    assert not built.parser.load_initializer("w", weight.ctypes.data, weight.nbytes)
    assert built.said("cannot load initializer")
    assert not built.parser.parse_model_proto()
    assert built.said("cannot parse empty model")
    assert errors(built) == []


def test_weights_that_nobody_gave(trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are looked for as a file, in the model's folder or else in the working directory."""
    monkeypatch.chdir(tmp_path)
    built = loaded(trt, model(external=True))
    assert not built.parser.parse_model_proto()
    ((code, _, text),) = errors(built)
    assert code == "INVALID_GRAPH"
    assert text.startswith("Failed to import initializer")
    (tmp_path / "weights").write_bytes(WEIGHT.tobytes())
    assert loaded(trt, model(external=True)).parser.parse_model_proto()
    monkeypatch.chdir("/")
    assert not loaded(trt, model(external=True)).parser.parse_model_proto()
    built = Built(trt, model(external=True))
    assert built.parser.parse(built.data, path=str(tmp_path / "graph.onnx"))
    (tmp_path / "graph.onnx").write_bytes(built.data)
    assert Built(trt, b"").parser.parse_from_file(str(tmp_path / "graph.onnx"))
    (tmp_path / "weights").write_bytes(b"short")
    assert not Built(trt, b"").parser.parse_from_file(str(tmp_path / "graph.onnx"))


@pytest.mark.parametrize(("columns", "taken"), [(8, True), (4, False)])
def test_weights_are_known_by_their_address(trt: Any, columns: int, taken: bool) -> None:
    """Two initializers may lie at one place, and must be of one size then."""

    def weights(name: str, width: int) -> Any:
        tensor = TensorProto(name=name, data_type=HALF, dims=(4, width), data_location=1)
        tensor.external_data.add(key="location", value="weights")
        return tensor

    tensors = [weights("w", 8), weights("v", columns)]
    nodes = [helper.make_node("MatMul", ["x", t.name], [f"{t.name}_out"], name=t.name) for t in tensors]
    results = [helper.make_tensor_value_info(n.output[0], HALF, None) for n in nodes]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", HALF, (2, 4))], results, tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    built, place = loaded(trt, made.SerializeToString()), np.zeros(32, np.float16)
    assert built.parser.load_initializer("w", place.ctypes.data, 64)
    assert built.parser.load_initializer("v", place.ctypes.data, 8 * columns)
    assert built.parser.parse_model_proto() == taken
    assert errors(built) == [] if taken else "Weights of same values but of diff" in errors(built)[0][2]


BEFORE = """
import gc, mmap, sys
import numpy as np
from tests.trt.built import Built, model
if sys.argv[1] == "real":
    from tests.rtx import real_trt
    trt = real_trt()
else:
    import tensorrt as trt
"""
FREED = {
    "the network of a parser": (
        """
built = Built(trt, model())
del built.network
gc.collect()
print("now", flush=True)
built.parser.parse(built.data)
""",
        "the network of a parser was freed before it parsed\n",
    ),
    "weights before the build": (
        """
pages = mmap.mmap(-1, 1 << 16)
weight = np.frombuffer(pages, np.float16, 32)
built = Built(trt, model(external=True))
assert built.parser.load_model_proto(built.data)
assert built.parser.load_initializer("w", weight.ctypes.data, weight.nbytes)
assert built.parser.parse_model_proto()
del weight
pages.close()
print("now", flush=True)
built.plan(parse=False)
""",
        "the buffer of initializer w at the time of the build lies in memory that was freed\n",
    ),
}


@pytest.mark.parametrize("case", FREED)
@pytest.mark.parametrize("library", ["pretended", "real"])
def test_what_is_not_kept_alive(library: str, case: str, tmp_path: Path) -> None:
    """The real one reads freed memory and crashes; the pretended one says so."""
    code, violation = FREED[case]
    if library == "real":
        real_trt()
    told, root = tmp_path / "violations", str(Path(__file__).parents[2])
    path = root if library == "real" else os.pathsep.join([str(FAKES), root])
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + code, library],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "FAKE_TENSORRT_VIOLATIONS": str(told)},
        check=False,
    )
    assert done.stdout == "now\n", done.stderr
    if library == "real":
        assert done.returncode < 0, done.stderr
    else:
        assert told.read_text() == violation


# The config


def test_levels_and_streams_out_of_range(trt: Any) -> None:
    config = Built(trt, model()).config
    config.builder_optimization_level = 9
    assert config.builder_optimization_level == 5
    config.builder_optimization_level = -1
    assert config.builder_optimization_level == 5
    config.builder_optimization_level = True
    assert config.builder_optimization_level == 1
    config.max_aux_streams = 2
    config.max_aux_streams = -5
    assert config.max_aux_streams == 2


@pytest.mark.parametrize("first", ["REFIT", "REFIT_IDENTICAL", "REFIT_INDIVIDUAL"])
@pytest.mark.parametrize("second", ["REFIT", "REFIT_IDENTICAL", "REFIT_INDIVIDUAL"])
def test_of_the_flags_for_refitting_the_last_holds(trt: Any, first: str, second: str) -> None:
    built = Built(trt, model())
    for name in ("STRIP_PLAN", first, second):
        built.config.set_flag(getattr(trt.BuilderFlag, name))
    names = ("STRIP_PLAN", "REFIT", "REFIT_IDENTICAL", "REFIT_INDIVIDUAL", "TF32")
    held = [name for name in names if built.config.get_flag(getattr(trt.BuilderFlag, name))]
    assert held == ["STRIP_PLAN", second, "TF32"]
    assert built.said("mutually exclusive") == (first != second)


BAD_CALLS: dict[str, Callable[[Built], Any]] = {
    "unknown option": lambda b: setattr(b.config, "builder_optimisation_level", 3),
    "number for a flag": lambda b: b.config.set_flag(6),
    "string for a number": lambda b: setattr(b.config, "builder_optimization_level", "3"),
    "fraction for a number": lambda b: setattr(b.config, "builder_optimization_level", 3.0),
    "number for an enumeration": lambda b: setattr(b.config, "profiling_verbosity", 2),
    "number for a monitor": lambda b: setattr(b.config, "progress_monitor", 3),
    "workspace below zero": lambda b: b.config.set_memory_pool_limit(b.trt.MemoryPoolType.WORKSPACE, -1),
    "no cache": lambda b: b.config.create_timing_cache(None),
    "no logger": lambda b: b.trt.Builder(None),
    "no network": lambda b: b.trt.OnnxParser(None, b.logger),
    "no writer": lambda b: b.builder.build_serialized_network_to_stream(b.network, b.config, None),
    "string for a model": lambda b: b.parser.parse("model"),
    "path": lambda b: b.parser.parse_from_file(Path("graph.onnx")),
    "wrong keyword": lambda b: b.config.set_timing_cache(b.config.create_timing_cache(b""), ignore_mismatches=False),
    "missing argument": lambda b: b.config.set_timing_cache(b.config.create_timing_cache(b"")),
    "constructed": lambda b: b.trt.IBuilderConfig(),
    "length of a plan": lambda b: len(b.plan()),
    "part of a plan": lambda b: b.plan()[:4],
    "shift by a flag": lambda b: 1 << b.trt.BuilderFlag.TF32,
}


@pytest.mark.filterwarnings("ignore:.*Timing cache")
@pytest.mark.parametrize("case", BAD_CALLS)
def test_calls_that_the_binding_refuses(trt: Any, case: str) -> None:
    with pytest.raises((TypeError, AttributeError)):
        BAD_CALLS[case](Built(trt, model()))


@pytest.mark.filterwarnings("ignore:.*Timing cache")
def test_a_corrupt_timing_cache_is_an_empty_one(trt: Any) -> None:
    """With TensorRT for RTX a cache is empty for ever; that TensorRT's grows is tested on the stand-in alone."""
    built = Built(trt, model())
    config = built.config
    assert config.get_timing_cache() is None
    empty = bytes(config.create_timing_cache(b"").serialize())
    for content in (b"garbage", b"g" * 5000, empty[:-9]):
        built.log.clear()
        cache = config.create_timing_cache(content)
        assert bytes(cache.serialize()) == empty
        assert any(severity == "ERROR" for severity, _ in built.log)
    assert cache.combine(config.create_timing_cache(b""), ignore_mismatch=False)
    assert config.set_timing_cache(cache, ignore_mismatch=False)
    assert built.plan() is not None
    assert config.get_timing_cache() is not None


# Profiles


def dynamic(trt: Any) -> tuple[Built, Any]:
    """The model for any number of rows, parsed, and an empty profile."""
    built = Built(trt, model(dims=("n", 4)))
    assert built.parser.parse(built.data)
    return built, built.builder.create_optimization_profile()


def test_dynamic_inputs_need_a_profile(trt: Any) -> None:
    built, profile = dynamic(trt)
    assert built.plan(parse=False) is None
    assert built.said("no optimization profile")
    profile.set_shape("x", (1, 4), (2, 4), (3, 4))
    assert [tuple(shape) for shape in profile.get_shape("x")] == [(1, 4), (2, 4), (3, 4)]
    assert profile.get_shape("z") == []
    assert built.config.add_optimization_profile(profile) == 0
    assert built.config.num_optimization_profiles == 1
    assert built.plan(parse=False) is not None


@pytest.mark.parametrize("shapes", [((3, 4), (2, 4), (1, 4)), ((1, 4), (2,), (3, 4))], ids=["downwards", "two ranks"])
def test_a_profile_that_is_no_range_is_not_taken(trt: Any, shapes: Any) -> None:
    """The shapes themselves are, without a word."""
    built, profile = dynamic(trt)
    built.log.clear()
    assert profile.set_shape("x", *shapes) is None
    assert [tuple(shape) for shape in profile.get_shape("x")] == list(shapes)
    assert built.log == []
    assert not profile
    assert built.config.add_optimization_profile(profile) == -1
    assert built.said("Invalid optimization profiles for input tensors x")
    assert built.config.num_optimization_profiles == 0


def test_shapes_that_are_none(trt: Any) -> None:
    _, profile = dynamic(trt)
    with pytest.raises(RuntimeError, match="Shape provided for min is inconsistent"):
        profile.set_shape("x", (-1, 4), (2, 4), (3, 4))
    assert profile.get_shape("x") == []


@pytest.mark.parametrize("shape", [("1", "4"), (1.5, 4.5), (1,) * 9], ids=["strings", "fractions", "9 axes"])
def test_shapes_that_the_binding_refuses(trt: Any, shape: Any) -> None:
    _, profile = dynamic(trt)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        profile.set_shape("x", shape, shape, shape)
    assert profile.get_shape("x") == []


MISFITS = {
    "another size": (("x", (1, 5)), "Dimension mismatch for tensor x and profile 0. At dimension axis 1"),
    "another input": (("z", (1, 4)), "Dynamic input tensor x is missing dimensions in profile 0"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_profile_for_another_network(trt: Any, case: str) -> None:
    """It is taken, and the build fails."""
    ((name, shape), message) = MISFITS[case]
    built, profile = dynamic(trt)
    profile.set_shape(name, shape, shape, shape)
    assert built.config.add_optimization_profile(profile) == 0
    assert built.plan(parse=False) is None
    assert built.said(message)


def test_memory_beyond_the_first_profile(trt: Any) -> None:
    _, profile = dynamic(trt)
    for value in (2.0, -1.0):
        profile.extra_memory_target = value
        assert profile.extra_memory_target == 1.0
    profile.extra_memory_target = 0.0
    assert profile.extra_memory_target == 0.0


# The build


def test_progress(trt: Any) -> None:
    """Phases lie in each other; how many there are differs."""
    built, steps = Built(trt, model()), list[str]()
    built.config.progress_monitor = monitor(trt, lambda: True, steps)
    assert built.plan() is not None
    assert steps[0].startswith("None > Building engine")
    assert steps[1].startswith("Building engine > ")
    assert steps[-1] == "Building engine"
    assert len([s for s in steps if ">" in s]) == len([s for s in steps if ">" not in s])


@pytest.mark.parametrize("answer", [lambda: False, lambda: None, lambda: 1 / 0, lambda: "yes"])
def test_a_monitor_that_does_not_say_true_cancels(trt: Any, answer: Callable[[], Any]) -> None:
    built = Built(trt, model())
    built.config.progress_monitor = monitor(trt, answer, [])
    assert built.plan() is None
    assert built.said("BuildCanceled")


def test_a_monitor_that_does_not_call_its_base(trt: Any) -> None:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="must be called when overriding"):
        Built(trt, model()).config.progress_monitor = Monitor()


def test_a_plan_is_a_buffer_and_nothing_else(trt: Any) -> None:
    """Of floats, says its format, whatever they may mean."""
    plan = Built(trt, model()).plan()
    view = memoryview(plan)
    assert view.format == "f"
    assert view.nbytes == plan.nbytes == len(bytes(plan)) == len(bytes(view))
    assert bytes(plan) == bytes(view)


def writer(trt: Any, answer: Callable[[int], Any], got: list[bytes]) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> Any:
            got.append(data)
            return answer(len(data))

    return Writer()


ANSWERS: dict[str, Callable[[int], Any]] = {
    "all of it": lambda size: size,
    "less": lambda size: size - 1,
    "nothing": lambda size: 0,
    "below zero": lambda size: -1,
    "None": lambda size: None,
    "a string": lambda size: "yes",
    "an exception": lambda size: 1 / 0,
}


@pytest.mark.parametrize("case", ANSWERS)
def test_a_plan_goes_to_a_writer_at_once_whatever_it_answers(trt: Any, case: str) -> None:
    """So a writer must itself remember that it failed. What TensorRT does is not documented: it may stop."""
    built, got = Built(trt, model()), list[bytes]()
    assert built.parser.parse(built.data)
    assert built.builder.build_serialized_network_to_stream(
        built.network, built.config, writer(trt, ANSWERS[case], got)
    )
    (data,) = got
    assert type(data) is bytes
    assert len(data) > WEIGHT.nbytes


class Full(io.BytesIO):
    """A file that takes nothing."""

    name = "engine.plan"

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, data: Any) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(errno.ENOSPC, "full"), EngineError), (MemoryError(), MemoryError), (ValueError(), ValueError)],
    ids=["full disk", "no memory", "other"],
)
def test_a_plan_that_cannot_be_written(trt: Any, error: Exception, raised: type[Exception]) -> None:
    """The library says that it built the engine."""
    built = Built(trt, model())
    assert built.parser.parse(built.data)
    plan = make_plan_file(trt, Full(error))
    assert built.builder.build_serialized_network_to_stream(built.network, built.config, plan)
    with pytest.raises(raised):
        plan.require_written()


def test_a_plan_in_its_file(trt: Any) -> None:
    built, file = Built(trt, model()), io.BytesIO()
    assert built.parser.parse(built.data)
    plan = make_plan_file(trt, file)
    assert built.builder.build_serialized_network_to_stream(built.network, built.config, plan)
    plan.require_written()
    assert len(file.getvalue()) > WEIGHT.nbytes
    assert plan.digest == hashlib.sha256(file.getvalue()).hexdigest()


def test_where_there_is_no_plan_a_writer_gets_nothing(trt: Any) -> None:
    built, got = Built(trt, model()), list[bytes]()
    stream = writer(trt, lambda size: size, got)
    assert not built.builder.build_serialized_network_to_stream(built.network, built.config, stream)
    assert built.said("Network must have at least one output")
    assert built.parser.parse(built.data)
    built.config.progress_monitor = monitor(trt, lambda: False, [])
    assert not built.builder.build_serialized_network_to_stream(built.network, built.config, stream)
    assert built.said("BuildCanceled")
    assert got == []


def test_a_writer_that_does_not_call_its_base(trt: Any) -> None:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

    built = Built(trt, model())
    with pytest.raises(TypeError, match="must be called when overriding"):
        built.builder.build_serialized_network_to_stream(built.network, built.config, Writer())


def test_errors_are_recorded(trt: Any) -> None:
    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self.told: list[tuple[str, str]] = []

        def report_error(self, arg0: Any, arg1: str) -> bool:
            self.told.append((arg0.name, arg1))
            return False

        def num_errors(self) -> int:
            return len(self.told)

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self.told.clear()

    built, _ = dynamic(trt)
    recorder = Recorder()
    built.builder.error_recorder = recorder
    assert built.plan(parse=False) is None
    ((code, text),) = recorder.told
    assert code == "INVALID_CONFIG"
    assert "no optimization profile" in text


def test_what_is_no_plan(trt: Any) -> None:
    """Of a good one the real library makes nothing without a GPU, either."""
    assert Built(trt, model()).runtime.deserialize_cuda_engine(b"not a plan") is None
