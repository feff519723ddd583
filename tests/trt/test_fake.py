"""The pretended TensorRT itself: it computes, and it punishes what the real one punishes.

What can be asked without a GPU is asked of both in test_both.py; here is what needs one, or what is the stand-in's own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.pretend import pretended
from tests.trt.built import WEIGHT, Built, model


@pytest.fixture
def trt() -> Iterator[Any]:
    with pretended() as module:
        yield module


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
        "import sys; from tests.trt.built import *; import tensorrt; b = Built(tensorrt, model()); "
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
