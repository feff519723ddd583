"""One TensorRT engine for several buckets, on the pretended TensorRT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from tests.build_graph import options, write_two_buckets
from tests.pretend import pretended
from tests.profile_contract import check_two_buckets
from toolchain.engines.tensorrt.build import TensorRtBuilder
from toolchain.engines.tensorrt.run import TensorRtRunner
from toolchain.errors import EngineError


@pytest.fixture(params=["11.4.0.106", "10.13.3.9"])
def trt(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    record = tmp_path / "violations"
    with pretended(
        FAKE_TENSORRT_VERSION=request.param,
        FAKE_TENSORRT_VIOLATIONS=str(record),
        DIFFBUILD_CACHE=str(tmp_path / "cache"),
    ) as module:
        from cuda.bindings import runtime

        yield module
        assert module.violations == []
        assert runtime._VIOLATIONS == []
        assert runtime._live() == []
    assert not record.exists(), record.read_text()


@pytest.mark.parametrize("cuda_graph", ["step", "off"])
@pytest.mark.parametrize("strip_plan", [False, True])
def test_two_buckets(trt: Any, tmp_path: Path, strip_plan: bool, cuda_graph: str) -> None:
    check_two_buckets(tmp_path, strip_plan=strip_plan, cuda_graph=cuda_graph)
    facts = json.loads((tmp_path / "engine" / "engine.json").read_text())
    assert facts["precision"]["asked"] == {"float16": 3}
    assert facts["precision"]["layers"]["float16"] > 3  # of both profiles
    assert facts["precision"]["wide"] == {}


def test_later_profiles_bring_no_weights(trt: Any, tmp_path: Path) -> None:
    from toolchain.engines.tensorrt.network import add_profiles

    write_two_buckets(tmp_path)
    builder = trt.Builder(trt.Logger())
    config = builder.create_builder_config()
    add_profiles(builder, config, ir.load(tmp_path / "graph.onnx"))
    assert [p.extra_memory_target for p in config._profiles] == [1.0, 0.0]
    assert [p.get_shape("x") for p in config._profiles] == [[(2, 4)] * 3, [(3, 4)] * 3]


def test_a_profile_that_tensorrt_does_not_take(trt: Any, tmp_path: Path) -> None:
    from toolchain.engines.tensorrt.network import add_profiles

    write_two_buckets(tmp_path)
    config = SimpleNamespace(add_optimization_profile=lambda profile: -1)
    with pytest.raises(EngineError, match="does not take the shapes of a bucket"):
        add_profiles(trt.Builder(trt.Logger()), config, ir.load(tmp_path / "graph.onnx"))


@pytest.mark.parametrize("method", ["set_optimization_profile_async", "set_input_shape"])
def test_shapes_that_a_context_does_not_take(
    trt: Any, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = write_two_buckets(tmp_path)
    chosen, weights = options(profile_per_bucket=True), {"weights": tmp_path / "weights.safetensors"}
    out = tmp_path / "engine"
    out.mkdir()
    TensorRtBuilder().build(tmp_path / "graph.onnx", weights, out, chosen)
    memory = TensorRtRunner().memory([out], chosen)
    engine = TensorRtRunner().open(out, weights, specs[1], chosen, memory)
    monkeypatch.setattr(trt.IExecutionContext, method, lambda *args: False)
    x, y = (memory.zeros(t.shape, t.dtype) for t in (*specs[1].inputs, *specs[1].outputs))
    with pytest.raises(EngineError, match="does not take the bucket's shapes"):
        engine.bind({"x": x, "y": y})
    engine.close()
    memory.close()
