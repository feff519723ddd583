"""The TensorRT backend's builds, in their process, on the pretended TensorRT: what comes out, and how they fail."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.build_graph import KINDS, SPEC, WEIGHTS, X, Y, options, write_graph, write_network
from tests.pretend import pretended
from toolchain.engines.tensorrt import builder_process
from toolchain.engines.tensorrt.build import TensorRtBuilder
from toolchain.engines.tensorrt.run import TensorRtRunner
from toolchain.errors import EngineError
from toolchain.recipe.options import TensorRtOptions
from toolchain.store.files import file_digest, locked

BUILDER, RUNNER = TensorRtBuilder(), TensorRtRunner()


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFBUILD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(params=["11.4.0.106"])
def trt(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The pretended TensorRT; what its children do against the rules fails the test too."""
    record = tmp_path / "violations"
    with pretended(FAKE_TENSORRT_VERSION=request.param, FAKE_TENSORRT_VIOLATIONS=str(record)) as module:
        yield module
        assert module.violations == []
    assert not record.exists(), record.read_text()


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every builder process that the test started."""
    started: list[Any] = []
    start = builder_process._start

    def recorded(*args: Any) -> Any:
        started.append(start(*args))
        return started[-1]

    monkeypatch.setattr(builder_process, "_start", recorded)
    return started


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def build(folder: Path, given: TensorRtOptions | None = None, **more: Any) -> dict[str, Any]:
    out = folder / "engine"
    out.mkdir()
    weights = {"weights": folder / "weights.safetensors"}
    BUILDER.build(folder / "graph.onnx", weights, out, given or options(), **more)
    facts: dict[str, Any] = json.loads((out / "engine.json").read_text())
    return facts


def run(folder: Path, given: TensorRtOptions | None = None) -> Any:
    """What the engine that was built in `folder` makes of X."""
    memory = RUNNER.memory([folder / "engine"], given or options())
    engine = RUNNER.open(
        folder / "engine", {"weights": folder / "weights.safetensors"}, SPEC, given or options(), memory
    )
    x, y = (memory.zeros(t.shape, t.dtype) for t in (*SPEC.inputs, *SPEC.outputs))
    launch = engine.bind({"x": x, "y": y})
    memory.write(x, X)
    launch()
    (found,) = memory.read(y)
    engine.close()
    memory.close()
    return found


@pytest.mark.parametrize("trt", ["11.4.0.106", "10.13.3.9"], indirect=True)
@pytest.mark.parametrize("dtype", list(KINDS))
def test_an_engine_computes_with_the_weights_of_the_file(trt: Any, tmp_path: Path, dtype: str) -> None:
    write_network(tmp_path, dtype)
    facts = build(tmp_path)
    np.testing.assert_allclose(run(tmp_path), Y, rtol=1e-2)
    assert sorted(f.name for f in (tmp_path / "engine").iterdir()) == ["engine.json", "engine.plan"]
    plan = tmp_path / "engine" / "engine.plan"
    assert (facts["plan_sha256"], facts["plan_bytes"]) == (file_digest(plan), plan.stat().st_size)
    assert facts["tensorrt"] == trt.__version__
    assert facts["device"] == BUILDER.device()
    assert facts["options"] == {k: v for k, v in vars(options()).items() if k != "cuda_graph"}
    assert facts["activation_bytes"] > 0
    assert facts["precision"]["asked"] == {dtype: 3}
    assert facts["precision"]["wide"] == {}
    assert (facts["stripped"], facts["refit"]) == (False, None)


def test_weights_that_another_writer_did_not_align(trt: Any, tmp_path: Path) -> None:
    write_network(tmp_path, "float32")
    entries, data = {"odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"\0"
    for name, weight in WEIGHTS.items():
        entries[name] = {"dtype": "F32", "shape": [4, 4], "data_offsets": [len(data), len(data) + weight.nbytes]}
        data += weight.tobytes()
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    (tmp_path / "weights.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    build(tmp_path)
    np.testing.assert_array_equal(run(tmp_path), Y)


def test_a_stripped_engine_is_filled_from_the_weight_file(trt: Any, tmp_path: Path) -> None:
    write_network(tmp_path, "float32")
    given = options(strip_plan=True)
    facts = build(tmp_path, given)
    assert facts["stripped"]
    assert facts["refit"]["weights"] == list(WEIGHTS)
    assert facts["refit"]["graph_sha256"] == file_digest(tmp_path / "engine" / facts["refit"]["graph"])
    np.testing.assert_array_equal(run(tmp_path, given), Y)
    plan = (tmp_path / "engine" / "engine.plan").read_bytes()
    assert not any(w.tobytes() in plan for w in WEIGHTS.values())


FAILURES = {
    "build_none": ("TensorRT could not build the engine", "TensorRT does not say why", "None"),
    "parse_error": ("TensorRT does not support an operator of the graph", "Cast cast_in: ", "this is TensorRT 11.4.0"),
    "out_of_memory": (
        "TensorRT could not build the engine",
        "out of GPU memory at node {ForeignNode[...]}",
        "lower tensorrt.builder_optimization_level (now 3) or set tensorrt.workspace_mb (now 0; ",
    ),
    "kill_child": ("TensorRT's builder was killed", "SIGKILL", "dmesg"),
    "fp32_engine": (
        "TensorRT built the engine in another precision than the graph's float16",
        "in float32 alone: first, second, third",
        "do not use this version of TensorRT",
    ),
    "no_device": (
        "TensorRT cannot start its builder",
        "the NVIDIA driver is too old for this TensorRT's CUDA",
        "install a newer NVIDIA driver",
    ),
    "deserialize_none": ("TensorRT cannot open the engine that it built", "Internal Error (injected)", "None"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failures(trt: Any, tmp_path: Path, children: list[Any], failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_FAIL", failure)
    write_network(tmp_path)
    with pytest.raises(EngineError) as error:
        build(tmp_path)
    what, got, hint = FAILURES[failure]
    assert what in error.value.what
    assert got in str(error.value.got)
    assert hint in str(error.value.hint)
    assert str(error.value.where) == str(tmp_path / "graph.onnx")
    assert error.value.exit_code == 1
    assert len(children) == 1
    assert gone(children[0].pid)


def test_an_error_shows_what_tensorrt_said_last(trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_FAIL", "out_of_memory")
    write_network(tmp_path)
    with pytest.raises(EngineError) as error:
        build(tmp_path)
    lines = str(error.value.got).splitlines()
    assert lines[-1].strip().startswith("[E] IBuilder::buildSerializedNetwork: Error Code 10")
    assert len(lines) <= 1 + builder_process.LOG_LINES


def test_without_tensorrt_no_process_is_started(tmp_path: Path, children: list[Any]) -> None:
    write_network(tmp_path)
    with pretended(FAKE_CUDA_FAIL="no_device"), pytest.raises(EngineError, match="no NVIDIA GPU"):
        build(tmp_path)
    assert children == []


def test_what_the_parser_may_refuse_is_told_first(trt: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_network(tmp_path)
    build(tmp_path)
    assert not any("may refuse" in line for line in caplog.messages)
    write_graph(tmp_path / "graph.onnx", [helper.make_node("Det", ["x"], ["y"], name="d")], TensorProto.FLOAT)
    (tmp_path / "engine").rename(tmp_path / "before")
    with pytest.raises(EngineError, match="TensorRT"):
        build(tmp_path)
    (told,) = (line for line in caplog.messages if "may refuse" in line)
    assert told == "TensorRT's parser may refuse the graph: Det d: TensorRT has no such operator"


def test_a_weight_that_the_file_lacks(trt: Any, tmp_path: Path) -> None:
    write_network(tmp_path)
    from toolchain.weights.safetensors import write_safetensors

    write_safetensors(tmp_path / "weights.safetensors", [("a", "F16", (4, 4))], lambda key: bytes(32))
    with pytest.raises(EngineError, match="no tensor 'b'"):
        build(tmp_path)


def test_progress_goes_from_0_to_1(trt: Any, tmp_path: Path) -> None:
    write_network(tmp_path)
    told: list[tuple[str, float]] = []
    build(tmp_path, progress=lambda phase, share: told.append((phase, share)))
    shares = [share for _, share in told]
    assert {phase for phase, _ in told} == {"Building engine"}
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


def test_a_cancelled_build_ends_by_itself(trt: Any, tmp_path: Path, children: list[Any]) -> None:
    """SIGINT reaches the monitor, which stops the build: no kill."""
    write_network(tmp_path, idle=3000)

    def cancel(phase: str, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, progress=cancel)
    assert children[0].returncode == 1
    assert gone(children[0].pid)
    assert not (tmp_path / "engine" / "engine.plan").exists()


def test_a_builder_that_does_not_stop_is_killed(
    trt: Any,
    tmp_path: Path,
    children: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_FAIL", "hang")
    monkeypatch.setattr(builder_process, "GRACE_S", 0.5)
    write_network(tmp_path)
    timers = []

    def ctrl_c_soon(phase: str, share: float) -> None:
        timers.append(threading.Timer(2, os.kill, [os.getpid(), signal.SIGINT]))
        timers[-1].start()

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, progress=ctrl_c_soon)
    assert len(timers) == 1
    assert children[0].returncode == -signal.SIGKILL
    assert gone(children[0].pid)
    assert "the builder does not stop; it is killed" in caplog.messages


def test_one_builder_for_each_gpu(trt: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_network(tmp_path)
    build(tmp_path)
    (lock,) = (Path(os.environ["DIFFBUILD_CACHE"]) / "locks").iterdir()
    (tmp_path / "second").mkdir()
    write_network(tmp_path / "second")
    thread = threading.Thread(target=build, args=[tmp_path / "second"])
    with caplog.at_level(logging.WARNING), locked(lock, wait=True, purpose=""):
        thread.start()
        thread.join(3)
        assert thread.is_alive()
        assert not (tmp_path / "second" / "engine" / "engine.plan").exists()
    thread.join()
    assert (tmp_path / "second" / "engine" / "engine.plan").exists()
    assert f"waiting for process {os.getpid()}: it builds an engine on the NVIDIA H200" in caplog.messages


def test_what_was_timed_is_kept(trt: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(os.environ["DIFFBUILD_CACHE"]) / "timing"
    write_network(tmp_path)
    build(tmp_path)
    (cache,) = folder.glob("*.cache")
    assert cache.name == "tensorrt-11.4.0.106-NVIDIA-H200-level-3.cache"
    first = entries(cache)
    (tmp_path / "other").mkdir()
    write_network(tmp_path / "other", "bfloat16")
    build(tmp_path / "other")
    assert entries(cache) > first
    cache.write_bytes(b"damaged")
    (tmp_path / "third").mkdir()
    write_network(tmp_path / "third")
    build(tmp_path / "third")
    assert entries(cache) == first
    assert f"TensorRT does not take the timing cache {cache}; it is measured anew" in caplog.messages


def entries(cache: Path) -> set[str]:
    return set(json.loads(cache.read_bytes().removeprefix(b"FAKECACHE"))["entries"])


def test_level_0_times_nothing(trt: Any, tmp_path: Path) -> None:
    write_network(tmp_path)
    build(tmp_path, options(builder_optimization_level=0))
    assert not (Path(os.environ["DIFFBUILD_CACHE"]) / "timing").exists()


def test_memory_that_will_not_do_is_told(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAKE_CUDA_MEMORY_MB", "100")
    write_network(tmp_path)
    build(tmp_path, options(workspace_mb=200))
    assert any("the build needs 200 MB of GPU memory at least" in line for line in caplog.messages)


# --- in this process: what the child does -----------------------------------------------------------------------------


@pytest.fixture
def builder(trt: Any) -> Any:
    """The child's module, on the pretended TensorRT."""
    import toolchain.engines.tensorrt.build_plan as module

    return module


def build_here(builder: Any, folder: Path, **given: Any) -> dict[str, Any]:
    (folder / "engine").mkdir()
    files = {"graph": folder / "graph.onnx", "weights": folder / "weights.safetensors", "out": folder / "engine"}
    job = {name: str(path) for name, path in files.items()}
    job |= {"backend": "tensorrt", "options": vars(options(**given)), "device": {}, "timing_cache": None}
    facts: dict[str, Any] = builder.build(job, lambda event: None, threading.Event())
    return facts


@pytest.mark.parametrize("lack", ["no call", "refused"])
def test_weights_beside_a_graph_on_disk_where_the_parser_takes_none(
    trt: Any, builder: Any, tmp_path: Path, lack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lack == "no call":
        monkeypatch.delattr(trt.OnnxParser, "load_initializer")
    else:
        monkeypatch.setattr(trt.OnnxParser, "load_initializer", lambda *_: False)
    write_network(tmp_path)
    build_here(builder, tmp_path)
    np.testing.assert_allclose(run(tmp_path), Y, rtol=1e-2)
    assert sorted(f.name for f in (tmp_path / "engine").iterdir()) == ["engine.json", "engine.plan"]


def test_what_the_parser_points_to_lives_until_the_build(
    builder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolchain.engines.tensorrt import network as tensorrt_network

    hand_over, configure = tensorrt_network.hand_over, builder._configure
    given: list[weakref.ref[Any]] = []

    def recorded(parser: Any, *args: Any) -> Any:
        buffers = hand_over(parser, *args)
        given.extend(weakref.ref(thing) for thing in [parser, *buffers])
        return buffers

    def checked(*args: Any) -> Any:
        assert len(given) == 1 + len(WEIGHTS)
        assert all(ref() is not None for ref in given)
        return configure(*args)

    monkeypatch.setattr(tensorrt_network, "hand_over", recorded)
    monkeypatch.setattr(builder, "_configure", checked)
    write_network(tmp_path)
    build_here(builder, tmp_path)


OPTIONS: list[tuple[dict[str, Any], str, Any]] = [
    ({"builder_optimization_level": 5}, "builder_optimization_level", 5),
    ({"tiling_optimization_level": "moderate"}, "tiling_optimization_level.name", "MODERATE"),
    ({"hardware_compatibility_level": "ampere_plus"}, "hardware_compatibility_level.name", "AMPERE_PLUS"),
    ({"max_aux_streams": 0}, "max_aux_streams", 0),
    ({"max_aux_streams": -1}, "max_aux_streams", -1),
    ({"build_route": "-a=1"}, "build_route", "-a=1"),
    ({"workspace_mb": 64}, "WORKSPACE", 64 << 20),
    ({}, "WORKSPACE", 80 << 30),
    ({}, "TF32", True),
    ({"tf32": False}, "TF32", False),
    ({}, "VERSION_COMPATIBLE", False),
    ({}, "STRIP_PLAN", False),
    ({"strip_plan": True}, "STRIP_PLAN", True),
    ({"strip_plan": True}, "REFIT_IDENTICAL", True),
    ({}, "profiling_verbosity.name", "DETAILED"),
]


@pytest.mark.parametrize(("given", "name", "expected"), OPTIONS)
def test_options_reach_the_config(trt: Any, builder: Any, given: dict[str, Any], name: str, expected: Any) -> None:
    config = builder._configure(trt, trt.Builder(trt.Logger()), options(**given))
    if name == "WORKSPACE":
        found = config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
    elif name.isupper():
        found = config.get_flag(trt.BuilderFlag[name])
    else:
        found = config
        for part in name.split("."):
            found = getattr(found, part)
    assert found == expected


def test_attention_without_a_fused_kernel_is_taken_apart(
    trt: Any, builder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_network(tmp_path, "float32")
    shape = helper.make_node("Constant", [], ["four"], value_ints=[1, 1, 2, 4], name="four")
    back = helper.make_node("Constant", [], ["two"], value_ints=[2, 4], name="two")
    nodes = [
        shape,
        back,
        *(helper.make_node("MatMul", ["x", w], [f"x{w}"], name=w) for w in WEIGHTS),
        *(helper.make_node("Reshape", [f"x{w}", "four"], [f"h{w}"], name=f"h{w}") for w in WEIGHTS),
        helper.make_node("Attention", ["ha", "hb", "hc"], ["h"], name="attention"),
        helper.make_node("Reshape", ["h", "two"], ["y"], name="out"),
    ]
    write_graph(tmp_path / "graph.onnx", nodes, TensorProto.FLOAT, opset=23)
    build_here(builder, tmp_path)
    (tmp_path / "engine").rename(tmp_path / "before")
    monkeypatch.setattr(builder, "decompose_attention", lambda trt, network: None)
    with pytest.raises(EngineError, match="could not build"):
        build_here(builder, tmp_path)
