"""The TensorRT backend before and around a build: what is missing here, what a device may run, what will not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from tests.build_graph import options
from tests.pretend import pretended
from toolchain.cli.doctor import doctor_lines
from toolchain.cuda.capacity import load_warning
from toolchain.engines import machine
from toolchain.engines.builders import builder_of
from toolchain.engines.tensorrt.build import TensorRtBuilder
from toolchain.engines.tensorrt.build_memory import build_warning
from toolchain.engines.tensorrt.run import TensorRtRunner, advisory
from toolchain.errors import EngineError

BUILDER, RUNNER = TensorRtBuilder(), TensorRtRunner()
GB = 1 << 30


@pytest.fixture
def h200() -> Iterator[dict[str, Any]]:
    with pretended():
        yield BUILDER.device()


def test_the_device(h200: dict[str, Any]) -> None:
    assert RUNNER.available() is None
    assert h200 == {
        "kind": "cuda",
        "name": "NVIDIA H200",
        "compute_capability": "9.0",
        "sm_count": 132,
        "memory_bytes": 143771 << 20,
        "driver": "13.0",
        "cuda": "13.0",
        "tensorrt": "11.4.0.106",
    }


LACKING = [
    ({"FAKE_TENSORRT_VERSION": "10.12.0.36"}, "TensorRT 10.13 or newer, below 12 is needed: TensorRT 10.12.0.36"),
    ({"FAKE_TENSORRT_VERSION": "12.0.0.1"}, "TensorRT 10.13 or newer, below 12 is needed: TensorRT 12.0.0.1"),
    ({"FAKE_CUDA_FAIL": "no_driver"}, "no NVIDIA driver"),
    ({"FAKE_CUDA_FAIL": "old_driver"}, "the NVIDIA driver knows CUDA 12."),
    ({"FAKE_CUDA_FAIL": "no_device"}, "no NVIDIA GPU can be used"),
]


@pytest.mark.parametrize(("variables", "reason"), LACKING)
def test_what_is_missing_is_named(variables: dict[str, str], reason: str) -> None:
    with pretended(**variables):
        assert str(RUNNER.available()).startswith(reason)
        with pytest.raises(EngineError):
            BUILDER.device()


def test_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    assert str(RUNNER.available()).startswith("TensorRT cannot be imported: ")
    with pytest.raises(EngineError, match=r"pip install 'diffbuild\[tensorrt\]'"):
        BUILDER.device()


OTHER = {"name": "NVIDIA GH200", "compute_capability": "9.0", "sm_count": 132}
ADA = {"name": "NVIDIA L40S", "compute_capability": "8.9", "sm_count": 142}
TURING = {"name": "Tesla T4", "compute_capability": "7.5", "sm_count": 40}
SLICE = {"sm_count": 16}
RUNS = [  # level, what differs where it was built, whether it runs on the H200
    ("none", {}, True),
    ("none", {"driver": "13.2", "memory_bytes": 1}, True),
    ("none", OTHER, False),
    ("none", SLICE, False),
    ("none", ADA, False),
    ("same_compute_capability", OTHER, True),
    ("same_compute_capability", SLICE, True),
    ("same_compute_capability", ADA, False),
    ("ampere_plus", ADA, True),
    ("ampere_plus", OTHER, True),
    ("ampere_plus", TURING, False),
]


@pytest.mark.parametrize(("level", "there", "runs"), RUNS)
def test_gpus_that_an_engine_runs_on(h200: dict[str, Any], level: str, there: dict[str, Any], runs: bool) -> None:
    reason = RUNNER.refuse(h200 | there, options(hardware_compatibility_level=level))
    assert (reason is None) == runs
    if reason:
        for name in (there.get("name", "NVIDIA H200"), "NVIDIA H200", str(there["sm_count"]), "132"):
            assert name in reason


VERSIONS = [("11.4.0.106", True), ("11.4.0.107", False), ("11.3.0.9", False)]  # built with, run with 11.4.0.106


@pytest.mark.parametrize(("version", "runs"), VERSIONS)
def test_versions_that_an_engine_runs_with(h200: dict[str, Any], version: str, runs: bool) -> None:
    reason = RUNNER.refuse(h200 | {"tensorrt": version}, options())
    assert (reason is None) == runs
    if reason:
        assert f"built with TensorRT {version}, this machine has 11.4.0.106" in reason


def test_engines_of_another_kind_of_device(h200: dict[str, Any]) -> None:
    assert RUNNER.refuse({"kind": "cpu"}, options()) == "built on cpu, this machine is cuda"


PROBLEMS = [
    ("11.4.0.106", {}, []),
    ("11.4.0.106", {"build_route": "-a=1"}, []),
    ("11.0.0.114", {"build_route": "-a=1"}, ["build_route: TensorRT 11.0.0.114 has no build routes"]),
    ("10.13.3.9", {"build_route": "-a=1"}, ["build_route: TensorRT 10.13.3.9 has no build routes"]),
    ("11.4.0.106", {"strip_plan": True}, []),
]


@pytest.mark.parametrize(("version", "given", "expected"), PROBLEMS)
def test_options_that_cannot_be_had(version: str, given: dict[str, Any], expected: list[str]) -> None:
    with pretended(FAKE_TENSORRT_VERSION=version):
        found = BUILDER.problems(options(**given))
    assert len(found) == len(expected)
    assert all(f.startswith(e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize(("version", "flawed"), [("10.16.1.11", True), ("11.0.0.114", False), (None, False)])
def test_versions_with_known_flaws(version: str | None, flawed: bool) -> None:
    line = advisory(version)
    assert (line is not None) == flawed
    assert line is None or ("CVE-2026-24268" in line and "10.16.1.11" in line)


def test_doctor_tells_of_them(tmp_path: Path) -> None:
    with pretended(FAKE_TENSORRT_VERSION="10.16.1.11"):
        facts = machine.examine(tmp_path)
        assert facts["backends"]["tensorrt"] == {
            "works": True,
            "reason": None,
            "builds": True,
            "device": BUILDER.device(),
        }
        told = "\n".join(doctor_lines(facts))
        assert "name NVIDIA H200, compute capability 9.0, sm count 132, memory bytes" in told
        assert "tensorrt 10.16.1.11" in told
        assert any(line.startswith("warning: TensorRT 10.16.1.11 has known") for line in doctor_lines(facts))


def test_graphs_are_left_alone_but_for_bfloat16() -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT16, [2])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, [2])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    model = ir.from_proto(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y])))
    assert BUILDER.prepare(model) is model
    assert BUILDER.packer(options()) is None
    assert builder_of("tensorrt").name == "tensorrt"


@pytest.mark.parametrize(
    ("weights", "workspace_mb", "free", "warning"),
    [
        (2 * GB, 0, 4 * GB, None),
        (2 * GB, 1024, 5 * GB, None),
        (
            2 * GB,
            2048,
            5 * GB,
            "needs 6144 MB of GPU memory at least; 5120 MB are free. Set tensorrt.workspace_mb to 1024",
        ),
        (2 * GB, 0, 3 * GB, "needs 4096 MB of GPU memory at least; 3072 MB are free. End what else uses the GPU"),
        (2 * GB, 512, 3 * GB, "needs 4608 MB of GPU memory at least; 3072 MB are free. End what else uses the GPU"),
    ],
)
def test_a_build_that_may_not_fit(weights: int, workspace_mb: int, free: int, warning: str | None) -> None:
    found = build_warning(weights, options(workspace_mb=workspace_mb), free)
    assert found is None if warning is None else warning in str(found)


def test_engines_that_may_not_fit() -> None:
    assert load_warning(2 * GB, GB, 3 * GB) is None
    assert "need 3072 MB of GPU memory; 3071 MB are free" in str(load_warning(2 * GB, GB, 3 * GB - 1))
