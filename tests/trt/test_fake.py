"""The pretended TensorRT itself: it computes, and it punishes what the real one punishes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.pretend import pretended

WEIGHT = np.arange(32, dtype=np.float16).reshape(4, 8)


@pytest.fixture
def trt() -> Iterator[Any]:
    with pretended() as module:
        yield module


def model(weight: np.ndarray[Any, Any] = WEIGHT, *, external: bool = False, dims: Any = (2, 4)) -> bytes:
    """z = float32(x @ w)"""
    tensor = numpy_helper.from_array(weight, "w")
    if external:
        tensor.ClearField("raw_data")
        tensor.data_location = 1
        for key, value in (("location", "weights"), ("offset", "0"), ("length", str(weight.nbytes))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="mm"),
        helper.make_node("Cast", ["y"], ["z"], to=1, name="c"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, dims)
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, [dims[0], weight.shape[1]])
    graph = helper.make_graph(nodes, "g", [x], [z], [tensor])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(made.SerializeToString())


class Built:
    """A parsed network and its config; `plan()` builds it."""

    def __init__(self, trt: Any, data: bytes) -> None:
        self.trt, self.log = trt, []  # type: ignore[var-annotated]
        log = self.log

        class Log(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                log.append((severity.name, msg))

        self.logger = Log()
        self.builder = trt.Builder(self.logger)
        strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self.builder.create_network(strong)
        self.parser = trt.OnnxParser(self.network, self.logger)
        self.data = data
        self.config = self.builder.create_builder_config()
        self.config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        self.runtime = trt.Runtime(self.logger)

    def plan(self, parse: bool = True) -> Any:
        if parse:
            assert self.parser.parse(self.data), self.log
        return self.builder.build_serialized_network(self.network, self.config)

    def engine(self) -> Any:
        plan = self.plan()
        assert plan is not None, self.log
        return self.runtime.deserialize_cuda_engine(plan)

    def said(self, text: str) -> bool:
        return any(text in message for _, message in self.log)


def aligned(nbytes: int) -> np.ndarray[Any, Any]:
    raw = np.zeros(nbytes + 256, np.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + nbytes]


class Bound:
    """A context with everything set, on host memory and the stream 0."""

    def __init__(self, built: Built, engine: Any) -> None:
        self.context = engine.create_execution_context(built.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self.block = aligned(engine.device_memory_size_v2)
        self.context.set_device_memory(self.block.ctypes.data, self.block.nbytes)
        self.x, self.z = aligned(16), aligned(64)
        self.x.view(np.float16)[:] = np.arange(8)
        self.context.set_tensor_address("x", self.x.ctypes.data)
        self.context.set_tensor_address("z", self.z.ctypes.data)

    def run(self) -> np.ndarray[Any, Any]:
        assert self.context.execute_async_v3(0)
        return self.z.view(np.float32).reshape(2, 8)


EXPECTED = np.arange(8, dtype=np.float32).reshape(2, 4) @ WEIGHT.astype(np.float32)


def test_it_computes(trt: Any) -> None:
    built = Built(trt, model())
    np.testing.assert_array_equal(Bound(built, built.engine()).run(), EXPECTED)
    assert trt.violations == []
    assert built.said("default stream")


@pytest.mark.parametrize("version", ["10.13.3.9", "11.4.0.106"])
def test_weights_by_pointer(version: str) -> None:
    with pretended(FAKE_TENSORRT_VERSION=version) as trt:
        built, weight = Built(trt, model(external=True)), WEIGHT.copy()
        assert built.parser.load_model_proto(built.data)
        assert built.parser.load_initializer("w", weight.ctypes.data, weight.nbytes)
        assert not built.parser.load_initializer("v", weight.ctypes.data, weight.nbytes)
        assert not built.parser.load_initializer("w", weight.ctypes.data, 2)
        assert built.parser.parse_model_proto()
        engine = built.runtime.deserialize_cuda_engine(bytes(built.plan(parse=False)))
        np.testing.assert_array_equal(Bound(built, engine).run(), EXPECTED)


def test_weights_are_read_when_the_network_is_built(trt: Any) -> None:
    built, weight = Built(trt, model(external=True)), WEIGHT.copy()
    built.parser.load_model_proto(built.data)
    built.parser.load_initializer("w", weight.ctypes.data, weight.nbytes)
    assert built.parser.parse_model_proto()
    weight[0, 0] = 7
    with pytest.raises(AssertionError, match="changed or reused before the build"):
        built.plan(parse=False)
    assert len(trt.violations) == 1


def test_weights_that_were_unmapped(trt: Any) -> None:
    import mmap

    pages = mmap.mmap(-1, 1 << 16)
    weight = np.frombuffer(pages, np.float16, 32)
    built = Built(trt, model(external=True))
    built.parser.load_model_proto(built.data)
    built.parser.load_initializer("w", weight.ctypes.data, weight.nbytes)
    assert built.parser.parse_model_proto()
    del weight
    pages.close()
    with pytest.raises(AssertionError, match="freed"):
        built.plan(parse=False)


def test_weights_that_nobody_gave(trt: Any) -> None:
    built = Built(trt, model(external=True))
    assert not built.parser.parse(built.data)
    assert "external weights of w" in built.parser.get_error(0).desc()


BROKEN_RULES: dict[str, tuple[Callable[[Built, Bound], Any], str]] = {
    "alignment": (lambda b, c: c.context.set_tensor_address("x", c.x.ctypes.data + 2), "not aligned"),
    "unknown tensor": (lambda b, c: c.context.set_tensor_address("xx", c.x.ctypes.data), "no tensor named xx"),
    "small block": (lambda b, c: c.context.set_device_memory(c.block.ctypes.data, 16), "the engine needs"),
    "no block": (
        lambda b, c: bound_without_block(b, c).execute_async_v3(0),
        "without device memory",
    ),
    "unbound": (lambda b, c: c.context.engine.create_execution_context().execute_async_v3(0), "no address was set"),
    "own memory": (
        lambda b, c: c.context.engine.create_execution_context().set_device_memory(c.block.ctypes.data, 1 << 20),
        "manages its own memory",
    ),
}


def bound_without_block(built: Built, bound: Bound) -> Any:
    managed = built.trt.ExecutionContextAllocationStrategy.USER_MANAGED
    context = bound.context.engine.create_execution_context(managed)
    context.set_tensor_address("x", bound.x.ctypes.data)
    context.set_tensor_address("z", bound.z.ctypes.data)
    return context


@pytest.mark.parametrize("case", BROKEN_RULES)
def test_broken_rules(trt: Any, case: str) -> None:
    built = Built(trt, model())
    bound = Bound(built, built.engine())
    call, message = BROKEN_RULES[case]
    with pytest.raises(AssertionError, match=message):
        call(built, bound)
    assert len(trt.violations) == 1


BAD_CALLS: dict[str, Callable[[Built], Any]] = {
    "unknown option": lambda b: setattr(b.config, "builder_optimisation_level", 3),
    "number for a flag": lambda b: b.config.set_flag(6),
    "string for a number": lambda b: setattr(b.config, "builder_optimization_level", "3"),
    "path": lambda b: b.parser.parse_from_file(__import__("pathlib").Path("graph.onnx")),
    "wrong keyword": lambda b: b.config.set_timing_cache(b.config.create_timing_cache(b""), ignore_mismatches=False),
    "missing argument": lambda b: b.config.set_timing_cache(b.config.create_timing_cache(b"")),
    "constructed": lambda b: b.trt.IBuilderConfig(),
    "length of a plan": lambda b: len(b.plan()),
    "shift by a flag": lambda b: 1 << b.trt.BuilderFlag.TF32,
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_calls_that_the_binding_refuses(trt: Any, case: str) -> None:
    with pytest.raises((TypeError, AttributeError)):
        BAD_CALLS[case](Built(trt, model()))


def monitor(trt: Any, answer: Any, steps: list[str]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            steps.append(f"{parent_phase} > {phase_name} {num_steps}")

        def step_complete(self, phase_name: str, step: int) -> Any:
            return answer()

        def phase_finish(self, phase_name: str) -> None:
            steps.append(phase_name)

    return Monitor()


def test_progress(trt: Any) -> None:
    built, steps = Built(trt, model()), list[str]()
    built.config.progress_monitor = monitor(trt, lambda: True, steps)
    assert built.plan() is not None
    assert steps[0].startswith("None > Building engine")
    assert steps[-1] == "Building engine"
    assert len(steps) == 4


@pytest.mark.parametrize("answer", [lambda: False, lambda: None, lambda: 1 / 0])
def test_a_monitor_that_does_not_say_true_cancels(trt: Any, answer: Callable[[], Any]) -> None:
    built = Built(trt, model())
    built.config.progress_monitor = monitor(trt, answer, [])
    assert built.plan() is None
    assert built.said("cancelled")


def test_a_monitor_that_does_not_call_its_base(trt: Any) -> None:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="must be called when overriding"):
        Built(trt, model()).config.progress_monitor = Monitor()


def test_the_timing_cache_grows_and_is_tied_to_the_gpu(trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    built = Built(trt, model())
    empty = bytes(built.config.create_timing_cache(b"").serialize())
    assert built.config.set_timing_cache(built.config.create_timing_cache(b""), ignore_mismatch=False)
    built.plan()
    grown = bytes(built.config.get_timing_cache().serialize())
    assert len(grown) > len(empty)
    first, second = built.config.create_timing_cache(empty), built.config.create_timing_cache(grown)
    assert first.combine(second, ignore_mismatch=False)
    assert bytes(first.serialize()) == grown
    assert built.config.create_timing_cache(b"garbage") is None
    monkeypatch.setenv("FAKE_TENSORRT_GPU", "another")
    assert not built.config.set_timing_cache(second, ignore_mismatch=False)


def test_plans_of_others_are_refused(trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    built = Built(trt, model())
    plan = bytes(built.plan())
    assert built.runtime.deserialize_cuda_engine(plan[:-1] + b"?") is None
    assert built.runtime.deserialize_cuda_engine(b"not a plan") is None
    assert built.said("Magic tag")
    older = plan.replace(b'"11.4.0.106"', b'"11.3.0.106"')
    assert built.runtime.deserialize_cuda_engine(older) is None
    assert built.said("expecting library version 11.4.0.106 got 11.3.0.106")
    monkeypatch.setenv("FAKE_TENSORRT_GPU", "another")
    assert built.runtime.deserialize_cuda_engine(plan) is None
    assert built.said("incompatible device")


def test_version_compatible_plans_need_host_code(trt: Any) -> None:
    built = Built(trt, model())
    built.config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    older = bytes(built.plan()).replace(b'"11.4.0.106"', b'"11.3.0.106"')
    assert built.runtime.deserialize_cuda_engine(older) is None
    built.runtime.engine_host_code_allowed = True
    assert built.runtime.deserialize_cuda_engine(older) is not None


def test_stripped_plans_are_refitted(trt: Any) -> None:
    built = Built(trt, model())
    built.config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    built.config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    plan = bytes(built.plan())
    assert WEIGHT.tobytes() not in plan
    engine = built.runtime.deserialize_cuda_engine(plan)
    assert engine.get_engine_stat(trt.EngineStat.STRIPPED_WEIGHTS_SIZE) == WEIGHT.nbytes
    with pytest.raises(AssertionError, match="refit it first"):
        Bound(built, engine).run()
    refitter = trt.Refitter(engine, built.logger)
    assert refitter.get_missing_weights() == ["w"]
    assert not refitter.refit_cuda_engine()
    with pytest.raises(AssertionError, match="other weights than at build time"):
        trt.OnnxParserRefitter(refitter, built.logger).refit_from_bytes(model(WEIGHT + 1))
    source = trt.OnnxParserRefitter(refitter, built.logger)
    assert source.load_model_proto(model(external=True))
    assert source.load_initializer("w", WEIGHT.ctypes.data, WEIGHT.nbytes)
    assert source.refit_model_proto()
    assert refitter.refit_cuda_engine()
    np.testing.assert_array_equal(Bound(built, engine).run(), EXPECTED)


@pytest.mark.parametrize(("version", "key"), [("10.13.3.9", "Format/Datatype"), ("11.4.0.106", "Datatype")])
def test_the_inspector_tells_types(version: str, key: str) -> None:
    with pretended(FAKE_TENSORRT_VERSION=version) as trt:
        engine = Built(trt, model()).engine()
        json_ = trt.LayerInformationFormat.JSON
        layers = json.loads(engine.create_engine_inspector().get_engine_information(json_))["Layers"]
        assert [layer["Outputs"][0][key] for layer in layers] == ["Half", "Float"]
        names = Built(trt, model())
        names.config.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
        told = json.loads(names.engine().create_engine_inspector().get_engine_information(json_))
        assert told["Layers"] == ["mm", "c"]


def test_a_weakly_typed_network_of_10_runs_in_float() -> None:
    with pretended(FAKE_TENSORRT_VERSION="10.13.3.9") as trt:
        built = Built(trt, model())
        built.network = built.builder.create_network(0)
        built.parser = trt.OnnxParser(built.network, built.logger)
        told = built.engine().create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        assert "Half" not in told


def test_dynamic_inputs_need_a_profile(trt: Any) -> None:
    built = Built(trt, model(dims=("n", 4)))
    assert built.plan() is None
    assert built.said("no optimization profile")


FAILURES = {
    "build_none": lambda b: b.plan() is None,
    "out_of_memory": lambda b: b.plan() is None and b.said("OutOfMemory"),
    "parse_error": lambda b: not b.parser.parse(b.data) and b.parser.get_error(0).node_name() == "mm",
    "deserialize_none": lambda b: b.runtime.deserialize_cuda_engine(b.plan()) is None,
    "enqueue_false": lambda b: not Bound(b, b.engine()).context.execute_async_v3(0),
    "fp32_engine": lambda b: "Half" not in inspected(b),
    "no_device": lambda b: starts_without_device(b),
}


def starts_without_device(built: Built) -> bool:
    with pytest.raises(TypeError, match="factory function returned nullptr"):
        built.trt.Builder(built.logger)
    return True


def inspected(built: Built) -> str:
    json_ = built.trt.LayerInformationFormat.JSON
    layers = json.loads(built.engine().create_engine_inspector().get_engine_information(json_))["Layers"]
    return str(layers)


@pytest.mark.parametrize("name", FAILURES)
def test_injected_failures(trt: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    built = Built(trt, model())
    assert "Half" in inspected(built)
    fresh = Built(trt, model())
    monkeypatch.setenv("FAKE_TENSORRT_FAIL", name)
    assert FAILURES[name](fresh)


def test_a_killed_build_and_a_violation_told_to_the_parent(tmp_path: Any) -> None:
    code = (
        "import sys; from tests.trt.test_fake import *; import tensorrt; b = Built(tensorrt, model()); "
        "b.plan() if sys.argv[1:] else b.runtime.deserialize_cuda_engine(b.plan()).get_tensor_shape('?')"
    )
    told = tmp_path / "violations"
    with pretended(FAKE_TENSORRT_VIOLATIONS=str(told), FAKE_TENSORRT_FAIL="kill_child"):
        assert subprocess.run([sys.executable, "-c", code, "kill"], check=False).returncode == -9
    with pretended(FAKE_TENSORRT_VIOLATIONS=str(told)):
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 1
    assert "no tensor named ?" in told.read_text()


class OnStream:
    """A bound context on a stream of the pretended GPU."""

    def __init__(self, built: Built) -> None:
        from cuda.bindings import runtime

        self.cuda, self.built, self.engine = runtime, built, built.engine()
        self.memory = []  # type: ignore[var-annotated]
        managed = built.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.context = self.engine.create_execution_context(managed)
        need = self.engine.device_memory_size_v2
        self.context.set_device_memory(self.allocate(need), need)
        self.x, self.z = self.allocate(16), self.allocate(64)
        self.context.set_tensor_address("x", self.x)
        self.context.set_tensor_address("z", self.z)
        (_, stream) = runtime.cudaStreamCreateWithFlags(1)
        self.stream = int(stream)
        self.view(self.x, 16).view(np.float16)[:] = np.arange(8)

    def allocate(self, nbytes: int) -> int:
        _, address = self.cuda.cudaMalloc(nbytes)
        return int(address)

    def view(self, address: int, nbytes: int) -> Any:
        return self.cuda._view(address, nbytes, "test")

    def result(self) -> Any:
        return self.view(self.z, 64).view(np.float32).reshape(2, 8)

    def capture(self) -> Any:
        self.cuda.cudaStreamBeginCapture(self.stream, self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        assert self.context.execute_async_v3(self.stream)
        _, graph = self.cuda.cudaStreamEndCapture(self.stream)
        return graph


def on_stream(trt: Any) -> OnStream:
    return OnStream(Built(trt, model()))


def test_work_waits_for_the_stream(trt: Any) -> None:
    on = on_stream(trt)
    assert on.context.execute_async_v3(on.stream)
    assert not np.array_equal(on.result(), EXPECTED)
    on.cuda.cudaStreamSynchronize(on.stream)
    np.testing.assert_array_equal(on.result(), EXPECTED)


def test_memory_that_was_freed(trt: Any) -> None:
    on = on_stream(trt)
    on.cuda.cudaFree(on.z)
    on.context.execute_async_v3(on.stream)
    with pytest.raises(AssertionError, match="tensor z of an engine"):
        on.cuda.cudaStreamSynchronize(on.stream)


def test_graphs(trt: Any) -> None:
    on = on_stream(trt)
    with pytest.raises(AssertionError, match="run once"):
        on.capture()
    on.cuda.cudaStreamEndCapture(on.stream)
    on.context.execute_async_v3(on.stream)
    on.cuda.cudaStreamSynchronize(on.stream)
    graph = on.capture()
    on.context.set_tensor_address("x", on.x)  # the same one
    with pytest.raises(AssertionError, match="capture it again"):
        on.context.set_tensor_address("x", on.allocate(16))
    on.cuda.cudaGraphDestroy(graph)
    assert on.context.set_tensor_address("x", on.allocate(16))


def test_a_context_must_outlive_its_work(trt: Any) -> None:
    on = on_stream(trt)
    on.context.execute_async_v3(on.stream)
    del on.context
    with pytest.raises(AssertionError, match="after the context was freed"):
        on.cuda.cudaStreamSynchronize(on.stream)
