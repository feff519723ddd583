"""The backend tensorrt_rtx on NVIDIA's real builder, which needs no GPU: what a build gives, and how it fails."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.build_graph import KINDS, options, write_graph, write_network, write_two_buckets
from tests.rtx import real_trt
from toolchain.engines.tensorrt import build_monitor, builder_process
from toolchain.engines.tensorrt import library as tensorrt_library
from toolchain.engines.tensorrt.library import TENSORRT_RTX
from toolchain.engines.tensorrt_rtx.build import TensorRtRtxBuilder
from toolchain.engines.tensorrt_rtx.run import TensorRtRtxRunner
from toolchain.errors import EngineError
from toolchain.store.files import file_digest

BUILDER, RUNNER = TensorRtRtxBuilder(), TensorRtRtxRunner()


@pytest.fixture(autouse=True)
def _real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_trt()
    monkeypatch.setenv("DIFFBUILD_CACHE", str(tmp_path / "cache"))


def build(folder: Path, out: str = "engine", progress: Any = lambda phase, share: None, **given: Any) -> dict[str, Any]:
    (folder / out).mkdir()
    weights = {"weights": folder / "weights.safetensors"}
    BUILDER.build(folder / "graph.onnx", weights, folder / out, options("tensorrt_rtx", **given), progress)
    facts: dict[str, Any] = json.loads((folder / out / "engine.json").read_text())
    return facts


@pytest.fixture
def with_child(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], list[Any]]:
    """Has something done to the builder's process as soon as it was started; gives the list of those processes."""

    def install(act: Callable[[int], None]) -> list[Any]:
        start, started = builder_process._start, []

        def acting(*args: Any) -> Any:
            started.append(start(*args))
            act(started[-1].pid)
            return started[-1]

        monkeypatch.setattr(builder_process, "_start", acting)
        return started

    return install


@pytest.mark.parametrize("dtype", list(KINDS))
def test_an_engine(tmp_path: Path, dtype: str) -> None:
    write_network(tmp_path, dtype)
    facts = build(tmp_path)
    plan = tmp_path / "engine" / "engine.plan"
    assert sorted(f.name for f in (tmp_path / "engine").iterdir()) == ["engine.json", "engine.plan"]
    assert (facts["plan_sha256"], facts["plan_bytes"]) == (file_digest(plan), plan.stat().st_size)
    assert facts["tensorrt_rtx"] == real_trt().__version__
    assert facts["device"] == {"kind": "cuda", "tensorrt_rtx": real_trt().__version__} == BUILDER.device()
    assert facts["options"] == {"targets": [], "profile_per_bucket": True, "tf32": True}
    assert type(facts["activation_bytes"]) is int
    assert facts["precision"]["asked"] == {dtype: 3}
    assert facts["precision"]["wide"] == {}
    assert (facts["stripped"], facts["refit"]) == (False, None)
    assert not (tmp_path / "cache").exists()  # nothing is timed, and no GPU is waited for


def test_what_the_log_tells_of_the_layers(tmp_path: Path) -> None:
    """Sixteen products in float16 with a nonlinearity between them, so that they are not folded into one."""
    write_network(tmp_path)
    nodes = [helper.make_node("Cast", ["x"], ["h0"], name="cast_in", to=TensorProto.FLOAT16)]
    for index in range(16):
        nodes.append(helper.make_node("MatMul", [f"h{index}", "abc"[index % 3]], [f"m{index}"], name=f"product{index}"))
        nodes.append(helper.make_node("Sigmoid", [f"m{index}"], [f"h{index + 1}"], name=f"sigmoid{index}"))
    nodes.append(helper.make_node("Cast", ["h16"], ["y"], name="cast_out", to=TensorProto.FLOAT))
    write_graph(tmp_path / "graph.onnx", nodes, TensorProto.FLOAT16)
    facts = build(tmp_path)
    assert facts["precision"]["asked"] == {"float16": 16}
    assert facts["precision"]["layers"]["float16"] >= 1
    assert sum(count for kinds in facts["layers"]["kinds"].values() for count in kinds.values()) >= 1
    assert facts["layers"]["fused_attention"] == 0


def test_what_a_logger_keeps(capfd: pytest.CaptureFixture[str]) -> None:
    trt = real_trt()
    logger = build_monitor.make_logger(trt)
    severity = trt.ILogger.Severity
    logger.log(severity.INFO, "Total Activation Memory: 8514048 bytes")
    logger.log(severity.VERBOSE, "Layers:\nName: a, LayerType: kgen, Inputs: [], Outputs: []")
    logger.log(severity.VERBOSE, "chatter")
    logger.log(severity.INTERNAL_ERROR, build_monitor.CHATTER)
    logger.log(severity.INTERNAL_ERROR, "something that is one")
    assert logger.activation_bytes == 8514048
    assert logger.layers == ["Layers:\nName: a, LayerType: kgen, Inputs: [], Outputs: []"]
    assert capfd.readouterr().err == "[I] Total Activation Memory: 8514048 bytes\n[F] something that is one\n"


def test_a_long_step_is_called_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A builder that says nothing for a while shows no percentage that stands."""
    told: list[dict[str, Any]] = []
    heard = threading.Event()

    def say(event: dict[str, Any]) -> None:
        told.append(event)
        if event["share"] is None:
            heard.set()

    monkeypatch.setattr(build_monitor, "SILENCE_S", 0.05)
    phases = build_monitor.Phases(say)
    phases.start("Building engine", None, 2)
    assert heard.wait(10)
    assert told[0] == {"phase": "Building engine", "share": 0.0}
    assert re.fullmatch(r"Building engine, one long step \(\d+ s so far\)", told[1]["phase"])
    phases.finish("Building engine")


def test_two_builds_are_the_same_byte_for_byte(tmp_path: Path) -> None:
    write_network(tmp_path)
    assert build(tmp_path, "first")["plan_sha256"] == build(tmp_path, "second")["plan_sha256"]


def test_targets(tmp_path: Path) -> None:
    write_network(tmp_path)
    facts = build(tmp_path, targets=("12.0", "8.9"))
    assert facts["options"]["targets"] == ["12.0", "8.9"]
    assert facts["plan_sha256"] != build(tmp_path, "all")["plan_sha256"]


def test_float32_that_is_not_rounded(tmp_path: Path) -> None:
    write_network(tmp_path, "float32")
    facts = build(tmp_path, tf32=False)
    assert facts["options"]["tf32"] is False
    assert facts["plan_sha256"] != build(tmp_path, "rounded")["plan_sha256"]


def test_two_buckets_in_one_engine(tmp_path: Path) -> None:
    write_two_buckets(tmp_path)
    facts = build(tmp_path)
    assert facts["precision"]["wide"] == {}
    assert BUILDER.merges(options("tensorrt_rtx"))
    assert not BUILDER.reads_weights(options("tensorrt_rtx"))


def write_float8(folder: Path) -> None:
    """y = dequantize(quantize(x)) @ dequantize(weight), as recipes in float8 will write it."""
    write_network(folder, "float32")
    scale = numpy_helper.from_array(np.float32(0.5), "scale")
    zero = helper.make_tensor("zero8", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    weight = np.eye(4, dtype=np.float32).astype(ml_dtypes.float8_e4m3fn)
    constant = helper.make_tensor("w8", TensorProto.FLOAT8E4M3FN, [4, 4], weight.tobytes(), raw=True)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero8"], ["xq"], name="q"),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero8"], ["xd"], name="dq"),
        helper.make_node("DequantizeLinear", ["w8", "scale", "zero8"], ["wd"], name="dqw"),
        helper.make_node("MatMul", ["xd", "wd"], ["y"], name="product"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, 4)) for name in "xy")
    graph = helper.make_graph(nodes, "float8", [x], [y], [scale, zero, constant])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "graph.onnx").write_bytes(made.SerializeToString())


def test_float8_is_compiled_for_what_has_it(tmp_path: Path) -> None:
    write_float8(tmp_path)
    assert build(tmp_path)["plan_bytes"] > 0  # the library's own targets would be refused: 8.6 has no float8
    with pytest.raises(EngineError, match=r"a target of the recipe has no float8[\s\S]*8\.6[\s\S]*8\.9 or 12\.0"):
        build(tmp_path, "early", targets=("8.6", "8.9"))
    assert not (tmp_path / "early" / "engine.plan").exists()


def test_a_graph_that_the_parser_refuses(tmp_path: Path) -> None:
    write_network(tmp_path)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["y"], name="mixed"),  # float32 by float16
    ]
    write_graph(tmp_path / "graph.onnx", nodes, TensorProto.FLOAT16)
    with pytest.raises(EngineError, match="TensorRT cannot read the graph") as error:
        build(tmp_path)
    assert "MatMul mixed" in str(error.value.got)


def test_a_weight_that_the_file_lacks(tmp_path: Path) -> None:
    write_network(tmp_path)
    from toolchain.weights.safetensors import write_safetensors

    write_safetensors(tmp_path / "weights.safetensors", [("a", "F16", (4, 4))], lambda key: bytes(32))
    with pytest.raises(EngineError, match="no tensor 'b'"):
        build(tmp_path)


def test_progress(tmp_path: Path) -> None:
    write_network(tmp_path)
    told: list[tuple[str, float | None]] = []
    build(tmp_path, progress=lambda phase, share: told.append((phase, share)))
    shares = [share for phase, share in told if share is not None]
    assert told[0] == ("Building engine", 0.0)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def wide_network(folder: Path, products: int = 300) -> None:
    """One that takes the builder some seconds."""
    write_network(folder)
    names = [f"h{index}" for index in range(products + 1)]
    nodes = [helper.make_node("Cast", ["x"], ["h0"], name="cast_in", to=TensorProto.FLOAT16)]
    for index in range(products):
        nodes.append(helper.make_node("MatMul", [names[index], "abc"[index % 3]], [f"m{index}"], name=f"p{index}"))
        nodes.append(helper.make_node("Sigmoid", [f"m{index}"], [names[index + 1]], name=f"s{index}"))
    nodes.append(helper.make_node("Cast", [names[-1]], ["y"], name="cast_out", to=TensorProto.FLOAT))
    write_graph(folder / "graph.onnx", nodes, TensorProto.FLOAT16)


def test_cancelled(tmp_path: Path, with_child: Any) -> None:
    """It stops between two of its steps, and leaves no plan behind."""
    wide_network(tmp_path)
    started = with_child(lambda pid: None)

    def cancel(phase: str, share: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, progress=cancel)
    assert started[0].returncode in (1, -signal.SIGKILL)
    assert not Path(f"/proc/{started[0].pid}").exists()
    assert not list((tmp_path / "engine").glob("engine.*")) or started[0].returncode == -signal.SIGKILL


def test_killed_in_the_middle(tmp_path: Path, with_child: Any) -> None:
    wide_network(tmp_path)
    started = with_child(lambda pid: None)

    def kill(phase: str, share: float | None) -> None:
        os.kill(started[0].pid, signal.SIGKILL)

    with pytest.raises(EngineError, match="TensorRT's builder was killed") as error:
        build(tmp_path, progress=kill)
    assert str(error.value.got).splitlines()[0] == "SIGKILL"
    assert not (tmp_path / "engine" / "engine.json").exists()


def test_out_of_host_memory(tmp_path: Path, with_child: Any) -> None:
    """The limit leaves room to start, and not to build. Once NVIDIA's library did not give up, and span for minutes."""
    wide_network(tmp_path)

    def limit(pid: int) -> None:
        resource.prlimit(pid, resource.RLIMIT_DATA, (180 << 20, 180 << 20))
        resource.prlimit(pid, resource.RLIMIT_CPU, (60, 60))

    with_child(limit)
    with pytest.raises(EngineError) as error:
        build(tmp_path)
    if "was killed" in error.value.what:
        pytest.skip("NVIDIA's builder spins when memory is refused, until it is killed")
    assert "out of host memory" in f"{error.value.what} {error.value.got}", error.value
    assert "free host memory" in str(error.value.hint)


def test_a_full_disk(tmp_path: Path, with_child: Any) -> None:
    write_network(tmp_path)
    with_child(lambda pid: resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 14, 1 << 14)))
    with pytest.raises(EngineError, match="the engine's plan cannot be written") as error:
        build(tmp_path)
    assert "free space where the store lies" in str(error.value.hint)
    assert "[I]" not in str(error.value.got)  # what went well before is no part of it
    assert not (tmp_path / "engine" / "engine.plan").exists()


def test_two_builders_at_once(tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    threads = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        wide_network(tmp_path / name, 40)
        threads.append(threading.Thread(target=lambda folder=tmp_path / name: found.append(build(folder))))
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({facts["plan_sha256"] for facts in found}) == 1
    assert len(found) == 2, f"one failed, after {time.monotonic() - started:.0f} s"


def test_memory_that_will_not_do_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolchain.engines.tensorrt.build_memory import free_host_bytes, host_build_warning

    gb = 1 << 30
    assert host_build_warning(2 * gb, 6 * gb) is None
    assert host_build_warning(2 * gb, None) is None
    assert "about 5120 MB of memory; 4096 MB are free" in str(host_build_warning(2 * gb, 4 * gb))
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal")) << 10
    assert 0 < free_host_bytes() <= total
    write_network(tmp_path)
    with caplog.at_level(logging.WARNING):
        build(tmp_path)
    assert caplog.messages == []


# --- the library's two halves -----------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the one where the packages are installed, in which there is nothing yet."""
    specs = {"tensorrt_rtx": None}
    find_spec = tensorrt_library.find_spec

    def found(name: str) -> Any:
        if name in specs:
            return None
        spec = find_spec(name)
        if spec is not None and name == "onnxruntime_ep_nv_tensorrt_rtx":
            spec.submodule_search_locations[:] = [str(tmp_path)]
        return spec

    monkeypatch.setattr(tensorrt_library, "find_spec", found)
    tensorrt_library._load_shared_objects.cache_clear()
    yield tmp_path
    tensorrt_library._load_shared_objects.cache_clear()


def put_libraries(place: Path, version: str) -> None:
    for name in tensorrt_library.SHARED_OBJECTS:
        (place / f"{name}.{version}").write_bytes(b"")


def test_halves_of_two_versions(elsewhere: Path) -> None:
    put_libraries(elsewhere, "1.6.0")
    with pytest.raises(EngineError, match="the two halves of TensorRT for RTX are of two versions") as error:
        BUILDER.device()
    assert error.value.expected == "libraries of tensorrt-rtx-cu13-bindings 1.7.1.116"
    assert str(error.value.got).startswith("version 1.6.0, which onnxruntime-ep-nv-tensorrt-rtx-cu13 ")
    assert "tensorrt-rtx-cu13-bindings==1.7.1.116 onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0" in str(error.value.hint)
    said = str(RUNNER.available())  # what doctor and inspect show
    assert all(str(part) in said for part in (error.value.expected, error.value.got, error.value.hint))


def test_libraries_that_are_missing(elsewhere: Path) -> None:
    with pytest.raises(EngineError, match=r"TensorRT for RTX cannot be imported[\s\S]*holds no libcudart\.so") as error:
        BUILDER.device()
    assert error.value.hint == "pip install 'diffbuild[rtx]'"


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("tensorrt_rtx_bindings", "neither tensorrt_rtx nor tensorrt_rtx_bindings is installed"),
        ("onnxruntime_ep_nv_tensorrt_rtx", "onnxruntime-ep-nv-tensorrt-rtx-cu13 brings them"),
    ],
)
def test_a_half_that_is_missing(lacking: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = tensorrt_library.find_spec
    monkeypatch.setattr(tensorrt_library, "find_spec", lambda name: None if name == lacking else find_spec(name))
    tensorrt_library._load_shared_objects.cache_clear()
    with pytest.raises(EngineError, match="TensorRT for RTX cannot be imported") as error:
        BUILDER.device()
    assert said in str(error.value.got)
    tensorrt_library._load_shared_objects.cache_clear()


def test_a_system_without_the_runtime_of_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("libstdc++.so.6: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(tensorrt_library.ctypes, "CDLL", refuse)
    tensorrt_library._load_shared_objects.cache_clear()
    with pytest.raises(EngineError, match="cannot be imported") as error:
        BUILDER.device()
    assert "libstdc++6" in str(error.value.hint)
    tensorrt_library._load_shared_objects.cache_clear()


@pytest.mark.parametrize("version", ["1.6.0.58", "2.0.0.1"])
def test_versions_that_are_not_driven(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_trt(), "__version__", version)
    with pytest.raises(EngineError, match=r"TensorRT for RTX 1\.7 or newer, below 2 is needed") as error:
        BUILDER.device()
    assert error.value.got == f"TensorRT for RTX {version}"


def test_without_cuda_python_it_builds_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' environment may have it, and the builder's process as well."""
    monkeypatch.setitem(sys.modules, "cuda", None)
    assert str(RUNNER.available()).startswith("cuda-python cannot be imported")
    assert "pip install 'diffbuild[rtx]'" in str(RUNNER.available())
    write_network(tmp_path)
    assert build(tmp_path)["plan_bytes"] > 0


def test_doctor(tmp_path: Path) -> None:
    from toolchain.cli.doctor import doctor_lines
    from toolchain.engines import machine

    facts = machine.examine(tmp_path)
    assert facts["backends"]["tensorrt_rtx"]["builds"]
    (line,) = (line for line in doctor_lines(facts) if line.startswith("backend tensorrt_rtx"))
    assert "builds here, runs on an NVIDIA GPU" in line
    assert TENSORRT_RTX.version() in line
