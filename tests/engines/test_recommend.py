"""Which backend `doctor` recommends and `init` takes, by what runs here and what the CPU can do."""

from __future__ import annotations

from typing import Any

import pytest

from toolchain.engines import recommend as module
from toolchain.engines.openvino.build import OpenVinoBuilder
from toolchain.engines.recommend import FLOAT32, best_backend, recommend
from toolchain.engines.runners import RUNNERS

BF16 = frozenset({"avx512f", "avx512_bf16"})
AMX = frozenset({"avx512f", "amx_bf16"})
OLD = frozenset({"avx2"})

MACHINES: list[Any] = [
    ({"tensorrt", "onnxruntime_cuda", "openvino"}, True, BF16, "tensorrt", "tensorrt"),
    ({"onnxruntime_cuda"}, True, OLD, "onnxruntime_cuda", "onnxruntime_cuda"),
    ({"onnxruntime"}, True, OLD, "tensorrt", "onnxruntime"),  # a GPU for which nothing is installed
    ({"openvino", "onnxruntime"}, False, BF16, "openvino", "openvino"),
    ({"openvino"}, False, AMX, "openvino", "openvino"),
    ({"onnxruntime"}, False, BF16, "openvino", "onnxruntime"),  # worth installing
    ({"openvino", "onnxruntime"}, False, OLD, FLOAT32, FLOAT32),
    ({"openvino"}, False, OLD, FLOAT32, "openvino"),
    (set(), False, OLD, FLOAT32, "onnxruntime"),
]


@pytest.mark.parametrize(("runs", "has_gpu", "flags", "recommended", "best"), MACHINES)
def test_the_fastest_of_what_there_is(
    runs: set[str],
    has_gpu: bool,
    flags: frozenset[str],
    recommended: str,
    best: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, runner in RUNNERS.items():
        reason = None if name in runs else f"{name} is not installed"
        monkeypatch.setattr(runner, "available", lambda reason=reason: reason, raising=False)
    monkeypatch.setattr(module, "cpu_flags", lambda: flags)
    monkeypatch.setattr(OpenVinoBuilder, "refuses_dtype", lambda *_: "not here" if flags == OLD else None)
    said = recommend(has_gpu)
    assert (said.backend, best_backend()) == (recommended, best)
    assert said.lacks == (None if recommended in runs else f"{recommended} is not installed")
    if not has_gpu:
        assert said.dtype == ("float32" if flags == OLD else "bfloat16")
        assert said.reason.startswith("this CPU ")
        assert flags == OLD or f"bfloat16 ({'amx_bf16' if flags == AMX else 'avx512_bf16'})" in said.reason
    else:
        assert (said.dtype, said.reason) == (None, "this machine has an NVIDIA GPU")
