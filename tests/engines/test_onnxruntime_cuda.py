"""ONNX Runtime on a GPU, as far as it goes without one: what the session is told, on the pretended GPU's memory."""

from __future__ import annotations

import gc
import math
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tests.device_contract import others_may_allocate
from tests.pretend import pretended
from toolchain.engines.onnxruntime import package as onnxruntime_package
from toolchain.engines.onnxruntime_cuda import run as onnxruntime_cuda
from toolchain.engines.onnxruntime_cuda.build import OnnxRuntimeCudaBuilder
from toolchain.engines.onnxruntime_cuda.run import OnnxRuntimeCudaRunner
from toolchain.errors import EngineError
from toolchain.recipe.options import OnnxRuntimeCudaOptions
from toolchain.signature import GraphSpec, TensorSpec

BUILDER, RUNNER = OnnxRuntimeCudaBuilder(), OnnxRuntimeCudaRunner()
OPTIONS = OnnxRuntimeCudaOptions("extended")
SPEC = GraphSpec(
    (TensorSpec("state", "float32", (2, 3)),),
    (TensorSpec("next_state", "float32", (2, 3)), TensorSpec("preview", "float32", (2, 3))),
)


class Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, tuple[Any, ...]] = {}
        self.outputs: dict[str, tuple[Any, ...]] = {}

    def bind_input(self, name: str, *place: Any) -> None:
        self.inputs[name] = place

    def bind_output(self, name: str, *place: Any) -> None:
        self.outputs[name] = place


class RunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class Session:
    """next_state = preview = state + 1, on the stream that it was given."""

    made: Session
    provides = ("CUDAExecutionProvider", "CPUExecutionProvider")

    def __init__(self, graph: bytes, settings: Any, providers: list[Any], **_: Any) -> None:
        Session.made = self
        self.graph, self.settings, self.providers = graph, settings, providers
        self.fallback = True
        self.runs: list[dict[str, str]] = []
        self.error: Exception | None = None

    def get_providers(self) -> list[str]:
        return list(self.provides)

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name=t.name, shape=list(t.shape)) for t in SPEC.inputs]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=t.name, shape=list(t.shape)) for t in SPEC.outputs]

    def disable_fallback(self) -> None:
        self.fallback = False

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding, options: RunOptions) -> None:
        from cuda.bindings import runtime

        if self.error:
            raise self.error
        self.runs.append(dict(options.entries))
        stream = int(self.providers[0][1]["user_compute_stream"])

        def array(place: tuple[Any, ...]) -> Any:
            device, number, dtype, shape, address = place
            assert (device, number) == ("cuda", 0)
            return runtime._view(address, math.prod(shape) * dtype.itemsize, "ort").view(dtype).reshape(shape)

        def compute() -> None:
            for place in binding.outputs.values():
                array(place)[...] = array(binding.inputs["state"]) + 1

        runtime._enqueue(stream, compute, "ort")


@pytest.fixture
def gpu() -> Iterator[Any]:
    with pretended():
        from cuda.bindings import runtime

        yield runtime
        assert runtime._live() == []
        assert runtime._VIOLATIONS == []


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    names = ("SessionOptions", "GraphOptimizationLevel", "get_available_providers")
    stub = SimpleNamespace(
        **{name: getattr(onnxruntime, name) for name in names},
        InferenceSession=Session,
        RunOptions=RunOptions,
        preload_dlls=lambda: print("a library is missing"),
        __spec__=onnxruntime.__spec__,
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", stub)
    onnxruntime_cuda.require_provider.cache_clear()
    yield stub
    onnxruntime_cuda.require_provider.cache_clear()


@pytest.fixture
def memory(gpu: Any) -> Iterator[Any]:
    made = RUNNER.memory([], OPTIONS)
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "graph.onnx").write_bytes(b"the graph")
    return tmp_path


def opened(folder: Path, memory: Any, **options: bool) -> Any:
    return RUNNER.open(folder, {"weights": folder / "weights.safetensors"}, SPEC, replace(OPTIONS, **options), memory)


def test_the_session_works_on_the_memorys_stream(
    ort: Any, memory: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = opened(folder, memory, prefer_nhwc=True, tf32=False)
    session = Session.made
    assert session.graph == b"the graph"
    assert session.fallback is False
    assert session.providers == [
        (
            "CUDAExecutionProvider",
            {
                "device_id": "0",
                "user_compute_stream": str(memory.stream),
                "enable_cuda_graph": "1",
                "prefer_nhwc": "1",
                "use_tf32": "0",
                "arena_extend_strategy": "kSameAsRequested",
            },
        ),
        "CPUExecutionProvider",
    ]
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # the graph was optimised when it was built
    assert session.settings.graph_optimization_level == level
    assert capsys.readouterr().out == ""
    engine.close()


def test_an_engine_that_refuses_a_cuda_graph_is_opened_without(
    ort: Any, memory: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Partitioned(Session):
        def __init__(self, graph: bytes, settings: Any, providers: list[Any], **_: Any) -> None:
            if providers[0][1]["enable_cuda_graph"] == "1":
                raise RuntimeError("all compute graph nodes have not been partitioned to the CUDAExecutionProvider")
            super().__init__(graph, settings, providers)

    monkeypatch.setattr(ort, "InferenceSession", Partitioned)
    opened(folder, memory).close()
    assert Session.made.providers[0][1]["enable_cuda_graph"] == "0"
    (told,) = caplog.messages
    assert told.startswith("an engine runs without a CUDA graph")
    assert "have not been partitioned" in told


def test_a_graph_that_cannot_be_opened_at_all(
    ort: Any, memory: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot open the graph(.|\n)*no such operator"):
        opened(folder, memory)
    assert caplog.messages == []


def test_no_other_error_opens_an_engine_twice(
    ort: Any, memory: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        opens.append(args)
        raise RuntimeError("CUDA failure 2: out of memory")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(EngineError, match="out of memory"):
        opened(folder, memory)
    assert len(opens) == 1


def test_an_engine_whose_capture_fails_is_launched_without(
    ort: Any, memory: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Halfway, with the stream still capturing."""

    class Halfway(Session):
        def run_with_iobinding(self, binding: Binding, options: RunOptions) -> None:
            from cuda.bindings import runtime

            if options.entries["gpu_graph_id"] != "-1":
                stream = int(self.providers[0][1]["user_compute_stream"])
                runtime.cudaStreamBeginCapture(stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal)
                raise RuntimeError("Graph capture did not complete after 3 runs")
            super().run_with_iobinding(binding, options)

    monkeypatch.setattr(ort, "InferenceSession", Halfway)
    engine = opened(folder, memory)
    states = [memory.zeros((2, 3), np.float32) for _ in range(2)]
    launch = engine.bind({"state": states[0], "next_state": states[1]})
    launch()
    assert memory.read(states[1])[0].tolist() == [[1, 1, 1]] * 2
    (told,) = caplog.messages
    assert told.startswith("an engine runs without a CUDA graph")
    assert "Graph capture did not complete" in told
    engine.close()


def test_nothing_is_allocated_while_it_captures(
    ort: Any, memory: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []

    class Slow(Session):
        def run_with_iobinding(self, binding: Binding, options: RunOptions) -> None:
            thread.start()
            time.sleep(0.2)
            order.append("captured")
            super().run_with_iobinding(binding, options)

    def allocate() -> None:
        memory.zeros((4,), np.float32)
        order.append("allocated")

    thread = threading.Thread(target=allocate)
    state = memory.zeros((2, 3), np.float32)
    monkeypatch.setattr(ort, "InferenceSession", Slow)
    engine = opened(folder, memory)
    engine.bind({"state": state, "next_state": memory.zeros((2, 3), np.float32), "preview": state})
    thread.join()
    assert order == ["captured", "allocated"]
    engine.close()


def test_every_thread_captures_alone_whoever_had_its_identity_before(
    ort: Any, memory: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread's identity is given to the next one, the graphs that ONNX Runtime captured in it are not."""
    guarded, identities = [], []

    class Watched(Session):
        def run_with_iobinding(self, binding: Binding, options: RunOptions) -> None:
            guarded.append(not others_may_allocate())
            super().run_with_iobinding(binding, options)

    monkeypatch.setattr(ort, "InferenceSession", Watched)
    engine = opened(folder, memory)
    states = [memory.zeros((2, 3), np.float32) for _ in range(2)]
    launch = engine.bind({"state": states[0], "next_state": states[1]})

    def work() -> None:
        identities.append(threading.get_ident())
        launch()
        launch()

    for _ in range(8):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(set(identities)) < len(identities)
    assert guarded == [True] + [True, False] * 8
    engine.close()


def test_argmax_gets_floats() -> None:
    """Of token ids, as CLIP has it; ONNX Runtime on the CPU computes the same with and without."""
    tensors = [helper.make_tensor_value_info(n, TensorProto.INT64, s) for n, s in (("ids", [1, 5]), ("place", [1]))]
    node = helper.make_node("ArgMax", ["ids"], ["place"], axis=-1, keepdims=0)
    graph = helper.make_graph([node], "g", tensors[:1], tensors[1:])
    plain = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    made = ir.to_proto(BUILDER.prepare(ir.from_proto(plain)))
    kinds = [n.op_type for n in made.graph.node]
    assert kinds == ["Cast", "ArgMax"]
    ids = np.array([[49406, 3, 49407, 49407, 2]])
    for proto in (plain, made):
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        assert session.run(None, {"ids": ids})[0].tolist() == [2]


def test_bindings_are_at_device_addresses_and_have_graphs_of_their_own(ort: Any, memory: Any, folder: Path) -> None:
    engine = opened(folder, memory)
    states = [memory.zeros((2, 3), np.float32) for _ in range(2)]
    launches = [engine.bind({"state": states[a], "next_state": states[b]}) for a, b in ((0, 1), (1, 0))]
    assert [run["gpu_graph_id"] for run in Session.made.runs] == ["1", "2"]
    assert {run["disable_synchronize_execution_providers"] for run in Session.made.runs} == {"1"}
    synchronised = memory.counters.synchronisations
    memory.write(states[0], 5)
    launches[0]()
    launches[1]()
    launches[0]()
    assert memory.counters.synchronisations == synchronised
    assert memory.read(*states)[1].tolist() == [[8, 8, 8]] * 2
    assert [run["gpu_graph_id"] for run in Session.made.runs[2:]] == ["1", "2", "1"]
    engine.close()


def test_a_provider_whose_libraries_are_missing(ort: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime has it in its list, and opens sessions on the CPU."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(Session, "provides", ("CPUExecutionProvider",))
    for found, first in (("onnxruntime-gpu", ""), ("onnxruntime", "pip uninstall -y onnxruntime && ")):
        onnxruntime_cuda.require_provider.cache_clear()
        monkeypatch.setattr(onnxruntime_package, "installed", lambda found=found: {found: "1.31.1"})
        said = f"cannot load its CUDA provider: {first}pip install 'diffbuild[cuda]'"
        assert said in str(RUNNER.available())


def test_a_gpu_that_a_session_cannot_use(ort: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA failure 46: device is busy\nat somewhere")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert RUNNER.available() == "ONNX Runtime cannot use the GPU: CUDA failure 46: device is busy"


def test_the_model_of_one_node_is_one() -> None:
    found = onnx.load_model_from_string(onnxruntime_cuda.NEGATION)
    onnx.checker.check_model(found)
    assert [node.op_type for node in found.graph.node] == ["Neg"]


@pytest.mark.parametrize(("open_buckets", "needed_mb"), [(None, 300), (1, 200)])
def test_weights_that_may_not_fit_are_warned_of(
    ort: Any, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    open_buckets: int | None, needed_mb: int,
) -> None:  # fmt: skip
    """Each open bucket's session has its own copy on the GPU."""
    monkeypatch.setenv("FAKE_CUDA_MEMORY_MB", "150")
    folders = [tmp_path / part for part in ("denoiser/1x64x64", "denoiser/1x64x96", "vae_decoder/any")]
    for folder in folders:
        folder.mkdir(parents=True)
        with (folder.parent / "weights.safetensors").open("wb") as file:
            file.truncate(100 << 20)
    RUNNER.memory(folders, OPTIONS, open_buckets).close()
    (told,) = caplog.messages
    assert told.startswith(f"the engines need {needed_mb} MB of GPU memory; 150 MB are free. Keep fewer buckets open")


def test_buffers_must_fit(ort: Any, memory: Any, folder: Path) -> None:
    engine = opened(folder, memory)
    with pytest.raises(EngineError, match="a buffer is missing"):
        engine.bind({})
    for wrong in (memory.zeros((2, 3), np.float16), memory.zeros((3, 2), np.float32)):
        with pytest.raises(EngineError, match="a buffer does not fit"):
            engine.bind({"state": wrong})
    engine.close()


def test_an_error_of_a_run_is_told_with_its_engine(ort: Any, memory: Any, folder: Path) -> None:
    engine = opened(folder, memory)
    launch = engine.bind({"state": memory.zeros((2, 3), np.float32)})
    Session.made.error = RuntimeError("CUDA failure 700\nat somewhere")
    with pytest.raises(EngineError, match=r"CUDA failure 700$"):
        launch()
    engine.close()


def test_closing_lets_go_of_the_session(ort: Any, memory: Any, folder: Path) -> None:
    engine = opened(folder, memory)
    launch = engine.bind({"state": memory.zeros((2, 3), np.float32)})
    launch()
    session = weakref.ref(Session.made)
    del Session.made
    engine.close()
    engine.close()
    gc.collect()
    assert session() is None
    with pytest.raises(AssertionError, match="closed"):
        launch()


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_an_engine_on_the_cpu_after_all_is_an_error(folder: Path, memory: Any) -> None:
    """The real ONNX Runtime without CUDA's libraries, or without the provider, goes on with the CPU and only warns."""
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in ("state", "next_state")]
    graph = helper.make_graph([helper.make_node("Neg", ["state"], ["next_state"])], "g", tensors[:1], tensors[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match=r"cannot use an execution provider(.|\n)*expected: CUDAExecutionProvider"):
        opened(folder, memory, cuda_graph=False)


def test_reasons_and_facts(ort: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "no CUDA execution provider" in str(RUNNER.available())
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert RUNNER.available() is None
    device = BUILDER.device()
    assert device == {"kind": "cuda", "name": "NVIDIA H200", "onnxruntime": device["onnxruntime"]}
    assert RUNNER.refuse({**device, "name": "NVIDIA L4"}, OPTIONS) is None
    assert RUNNER.refuse({**device, "kind": "cpu"}, OPTIONS) == "built on cpu, this machine is cuda"
    assert "this machine has" in str(RUNNER.refuse({**device, "onnxruntime": "1.2.0"}, OPTIONS))
    monkeypatch.setenv("FAKE_CUDA_FAIL", "no_driver")
    assert RUNNER.available() == "no NVIDIA driver"
