"""Opening, binding and launching TensorRT engines, on the pretended TensorRT and GPU."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.pretend import pretended
from tests.step_engine import SPEC, STATE, WEIGHT, bound, expected, opened, run, write_engine
from toolchain.cuda.driver import ALLOCATION
from toolchain.engines.tensorrt.engine import TensorRtMemory, open_memory
from toolchain.engines.tensorrt.library import TENSORRT
from toolchain.engines.tensorrt.open_plan import read_facts
from toolchain.errors import DiffbuildError, EngineError


@pytest.fixture(scope="module")
def trt() -> Iterator[Any]:
    with pretended() as module:
        yield module


@pytest.fixture(autouse=True)
def _rules_are_kept(trt: Any) -> Iterator[None]:
    from cuda.bindings import runtime

    yield
    assert trt.violations == []
    assert runtime._VIOLATIONS == []
    assert runtime._live() == []


@pytest.fixture
def memory(trt: Any) -> Iterator[TensorRtMemory]:
    made = TensorRtMemory(TENSORRT)
    yield made
    made.close()


@pytest.fixture
def folder(trt: Any, tmp_path: Path) -> Path:
    return write_engine(trt, tmp_path / "engine")


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_two_bindings_swap_their_states(folder: Path, memory: TensorRtMemory, steps: int) -> None:
    engine = opened(folder, memory)
    state, counter = run(engine, memory, steps)
    np.testing.assert_array_equal(state, expected(steps))
    assert counter == steps
    counters = memory.counters
    assert (counters.captures, counters.launches, counters.synchronisations) == (2, steps, 3)  # two for the captures
    engine.close()


@pytest.mark.parametrize("failure", ["", "conditional"])
def test_a_whole_run_is_one_launch(folder: Path, failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_FAIL", failure)
    memory = TensorRtMemory(TENSORRT, "loop")
    engine = opened(folder, memory)
    states, counters, launches = bound(engine, memory)
    memory.loop(*launches)(6)
    state, counter = memory.read(states[0], counters[0])
    np.testing.assert_array_equal(state, expected(6))
    assert counter[0] == 6
    assert memory.counters.launches == 1
    engine.close()
    assert (memory._loops, memory.graphs._executables) == ({}, {})  # they hold the contexts' kernels
    memory.close()


@pytest.mark.parametrize("failure", ["off", "capture", "instantiate"])
def test_without_cuda_graphs_the_result_is_the_same(
    folder: Path, trt: Any, failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAKE_CUDA_FAIL", failure)
    memory = TensorRtMemory(TENSORRT, "off" if failure == "off" else "step")
    engine = opened(folder, memory)
    state, _ = run(engine, memory, 3)
    np.testing.assert_array_equal(state, expected(3))
    assert memory.counters.launches == 0
    assert len([m for m in caplog.messages if "launched without" in m]) == (failure != "off")
    engine.close()
    memory.close()


def test_a_thousand_launches_allocate_nothing(folder: Path, memory: TensorRtMemory) -> None:
    engine = opened(folder, memory)
    states, counters, launches = bound(engine, memory)
    before = vars(memory.counters).copy()
    for index in range(1000):
        launches[index % 2]()
    assert vars(memory.counters) == before | {"launches": 1000}
    memory.write(states[0], STATE)
    launches[0]()
    state, counter = memory.read(states[1], counters[0])
    np.testing.assert_array_equal(state, expected(1))
    assert counter[0] == 1000
    engine.close()


def test_outputs_that_nobody_wants_share_a_buffer(folder: Path, memory: TensorRtMemory) -> None:
    engine = opened(folder, memory)
    bound(engine, memory)
    assert list(engine._buffers._unread) == ["preview"]
    one = memory.zeros((2, 4), np.float16)
    states, counters, _ = bound(engine, memory)
    ends = {"next_state": states[1], "next_step": counters[1], "preview": one}
    engine.bind({"state": states[0], "step": counters[0], **ends})()
    np.testing.assert_array_equal(memory.read(one)[0], expected(1).astype(np.float16))
    engine.close()


def test_engines_share_their_activations(trt: Any, folder: Path, tmp_path: Path) -> None:
    other = write_engine(trt, tmp_path / "other", activation_bytes=1 << 20)
    memory = open_memory(TENSORRT, [folder, other], "step")
    engines = [opened(place, memory) for place in (folder, other)]
    for engine in engines:
        run(engine, memory, 2)
    blocks = {binding.context._block for engine in engines for binding in engine._bindings}
    assert [size for _, size in blocks] == [1 << 20]
    for engine in engines:
        engine.close()
    memory.close()
    assert open_memory(TENSORRT, [], "step").close() is None


@pytest.mark.parametrize(
    ("free_mb", "stripped", "open_buckets", "need_mb"),
    [
        (7, False, None, None),
        (6, False, None, 7),
        (7, True, None, 8),
        (6, False, 2, 7),
        (5, False, 1, None),
        (4, False, 1, 5),
    ],
)
def test_engines_that_may_not_fit_are_told(
    trt: Any,
    tmp_path: Path,
    free_mb: int,
    stripped: bool,
    open_buckets: int | None,
    need_mb: int | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A component's plans of 2 and 3 MB that share activations of 2 MB, and a weight file of 1 MB for stripped ones."""
    monkeypatch.setenv("FAKE_CUDA_MEMORY_MB", str(free_mb))
    (tmp_path / "weights.safetensors").write_bytes(bytes(1 << 20))
    folders = [
        write_engine(trt, tmp_path / "a", plan_bytes=2 << 20, activation_bytes=2 << 20, stripped=stripped),
        write_engine(trt, tmp_path / "b", plan_bytes=3 << 20, activation_bytes=1 << 20),
    ]
    open_memory(TENSORRT, folders, "step", open_buckets).close()
    told = [line.split(". ")[0] for line in caplog.messages]
    expected = f"the engines need {need_mb} MB of GPU memory; {free_mb} MB are free"
    assert told == ([] if need_mb is None else [expected])


class TestStripped:
    @pytest.fixture
    def folder(self, trt: Any, tmp_path: Path) -> Path:
        return write_engine(trt, tmp_path / "engine", strip=True)

    @pytest.fixture
    def weights(self, tmp_path: Path) -> Path:
        # A tensor before it moves the one that is wanted to an address that is no multiple of four.
        save_file({"a": np.uint8([1, 2, 3]), "weight": WEIGHT}, tmp_path / "weights.safetensors")
        return tmp_path / "weights.safetensors"

    def test_weights_come_from_the_weight_file(self, folder: Path, weights: Path, memory: TensorRtMemory) -> None:
        engine = opened(folder, memory, weights=weights)
        np.testing.assert_array_equal(run(engine, memory, 3)[0], expected(3))
        engine.close()

    def test_a_weight_file_of_another_model(self, folder: Path, memory: TensorRtMemory, tmp_path: Path) -> None:
        save_file({"weights": WEIGHT}, tmp_path / "other.safetensors")
        with pytest.raises(DiffbuildError, match=r"no tensor 'weight'(.|\n)*did you mean 'weights'"):
            opened(folder, memory, weights=tmp_path / "other.safetensors")

    def test_a_weight_of_another_size(self, folder: Path, memory: TensorRtMemory, tmp_path: Path) -> None:
        save_file({"weight": WEIGHT[:2]}, tmp_path / "other.safetensors")
        with pytest.raises(EngineError, match="cannot fill the engine with its weights"):
            opened(folder, memory, weights=tmp_path / "other.safetensors")

    def test_weights_that_stay_missing(
        self, folder: Path, weights: Path, memory: TensorRtMemory, monkeypatch: pytest.MonkeyPatch, trt: Any
    ) -> None:
        monkeypatch.setattr(trt.OnnxParserRefitter, "refit_model_proto", lambda self: True)
        with pytest.raises(EngineError, match="no weights for weight and 1 in all"):
            opened(folder, memory, weights=weights)

    def test_a_plan_that_holds_its_weights(
        self, trt: Any, weights: Path, memory: TensorRtMemory, tmp_path: Path
    ) -> None:
        folder = write_engine(trt, tmp_path / "whole", stripped=True)
        with pytest.raises(EngineError, match="cannot fill the engine with its weights"):
            opened(folder, memory, weights=weights)

    def test_its_graph_is_missing(self, folder: Path, weights: Path, memory: TensorRtMemory) -> None:
        (folder / "graph.onnx").unlink()
        with pytest.raises(EngineError, match=r"cannot be read(.|\n)*graph\.onnx"):
            opened(folder, memory, weights=weights)


@pytest.mark.parametrize(
    ("side", "change"),
    [
        ("inputs", lambda t: replace(t[0], dtype="float16")),
        ("inputs", lambda t: replace(t[0], shape=(2, 5))),
        ("inputs", lambda t: replace(t[0], name="latents")),
        ("outputs", lambda t: replace(t[0], dtype="int64")),
        ("outputs", lambda t: replace(t[0], shape=(4, 2))),
    ],
)
def test_an_engine_of_another_signature(folder: Path, memory: TensorRtMemory, side: str, change: Any) -> None:
    tensors = getattr(SPEC, side)
    spec = replace(SPEC, **{side: (change(tensors), *tensors[1:])})
    with pytest.raises(EngineError) as caught:
        opened(folder, memory, spec)
    assert "other inputs or outputs than its manifest" in caught.value.what
    assert len(caught.value.expected) == len(caught.value.got) == 1  # the difference alone
    assert caught.value.got[0].startswith(f"{side.removesuffix('s')} ")


def test_buffers_must_fit(folder: Path, memory: TensorRtMemory) -> None:
    engine = opened(folder, memory)
    state, step = memory.zeros((2, 4), np.float32), memory.zeros((1,), np.int64)
    wrong: list[tuple[str, Mapping[str, Any]]] = [
        ("a buffer is missing", {"state": state}),
        ("a buffer does not fit", {"state": state, "step": memory.zeros((1,), np.int32)}),
        ("a buffer does not fit", {"state": state[:1], "step": step}),
        ("a buffer does not fit", {"state": state, "step": step, "preview": state}),
        ("a buffer does not fit", {"state": memory.zeros((3, 4), np.float32)[1:], "step": step}),  # at 16 bytes
    ]
    for what, buffers in wrong:
        with pytest.raises(EngineError, match=what):
            engine.bind(buffers)
    assert engine._bindings == []
    engine.close()


def test_a_damaged_plan(folder: Path, memory: TensorRtMemory) -> None:
    plan = folder / "engine.plan"
    whole = plan.read_bytes()
    plan.write_bytes(b"x" * len(whole))
    with pytest.raises(EngineError, match=r"cannot open the engine(.|\n)*Magic tag(.|\n)*hint: build it again"):
        opened(folder, memory)
    plan.write_bytes(whole[:-1])
    with pytest.raises(EngineError, match=rf"{len(whole) - 1} bytes where engine\.json says {len(whole)}"):
        opened(folder, memory)
    plan.write_bytes(b"")
    with pytest.raises(EngineError, match="plan cannot be read"):
        opened(folder, memory)
    plan.unlink()
    with pytest.raises(EngineError, match="plan cannot be read"):
        opened(folder, memory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 1}', "cannot be read"),
        ('{"format": 2, "activation_bytes": 1, "plan_bytes": 1, "stripped": true, "options": {}}', "got: format 2$"),
        ('{"format": 1, "activation_bytes": 1, "plan_bytes": 1, "stripped": 1, "options": {}}', "stripped 1$"),
        ('{"format": 1, "activation_bytes": 1.5, "plan_bytes": 1, "stripped": true, "options": {}}', "bytes 1.5$"),
    ],
)
def test_a_damaged_description(folder: Path, text: str | None, message: str) -> None:
    (folder / "engine.json").unlink()
    if text is not None:
        (folder / "engine.json").write_text(text)
    with pytest.raises(EngineError, match=r"(?m)" + message):
        read_facts(folder)
    with pytest.raises(EngineError):
        open_memory(TENSORRT, [folder], "step")


def test_code_for_the_host_is_not_run(folder: Path, memory: TensorRtMemory) -> None:
    engine = opened(folder, memory)
    assert engine._plan._runtime.engine_host_code_allowed is False
    engine.close()


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("no_device", "cannot start its runtime"),
        ("deserialize_none", r"cannot open the engine(.|\n)*injected"),
        ("enqueue_false", r"cannot run the engine(.|\n)*Cuda Runtime \(injected failure\)"),
    ],
)
def test_failures_of_tensorrt_tell_its_words(
    folder: Path, memory: TensorRtMemory, failure: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_FAIL", failure)
    with pytest.raises(EngineError, match=message):
        bound(opened(folder, memory), memory)


def test_a_context_that_cannot_be_made(
    folder: Path, memory: TensorRtMemory, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(folder, memory)
    monkeypatch.setattr(trt.ICudaEngine, "create_execution_context", lambda self, strategy: None)
    with pytest.raises(EngineError, match="cannot make an execution context"):
        bound(engine, memory)
    engine.close()


def test_warnings_of_tensorrt_are_passed_on(
    folder: Path, memory: TensorRtMemory, trt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = opened(folder, memory)
    with caplog.at_level(logging.DEBUG, "toolchain"):
        engine._plan._log.log(trt.ILogger.Severity.INFO, "chatter")
        engine._plan._log.log(trt.ILogger.Severity.WARNING, "across devices\n")
        engine._plan._log.log(trt.ILogger.Severity.ERROR, "broken")
    assert caplog.messages == ["TensorRT: across devices"]
    assert list(engine._plan._log.lines) == ["across devices", "broken"]
    engine.close()


def test_tensors_that_tensorrt_wants_on_the_host(
    folder: Path, memory: TensorRtMemory, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt.ICudaEngine, "get_tensor_location", lambda self, name: trt.TensorLocation.HOST)
    with pytest.raises(EngineError, match="host float32"):
        opened(folder, memory)


@pytest.mark.parametrize("mode", ["step", "off"])
@pytest.mark.parametrize("memory_first", [False, True])
def test_closing_frees_everything_in_order(folder: Path, memory_first: bool, mode: str) -> None:
    memory = TensorRtMemory(TENSORRT, mode)
    engine = opened(folder, memory)
    _, _, launches = bound(engine, memory)
    launches[0]()  # on its way when everything is closed
    freed: list[str] = []
    things = {"runtime": engine._plan._runtime, "engine": engine._plan.engine, "context": engine._bindings[0].context}
    for name, thing in things.items():
        weakref.finalize(thing, freed.append, name)
    del things, thing
    if memory_first:
        memory.close()
    engine.close()
    engine.close()
    gc.collect()
    assert freed == ["context", "engine", "runtime"]
    memory.close()
    assert memory.graphs._executables == {}


def test_contexts_and_plans_are_not_freed_while_another_thread_allocates_or_captures(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = TensorRtMemory(TENSORRT)
    engine = opened(write_engine(trt, tmp_path / "locked"), memory)
    bound(engine, memory)
    memory.release(*engine._launches)
    monkeypatch.setattr(memory, "release", lambda *launches: None)  # it waits too, for the graphs that it destroys
    (first, *_), (plan,) = engine._bindings, memory._plans.values()
    closing = threading.Thread(target=engine.close)
    with ALLOCATION:
        closing.start()
        closing.join(0.5)
        assert first.context is not None
        assert plan.engine is not None
    closing.join()
    assert first.context is None
    assert plan.engine is None
    memory.close()
