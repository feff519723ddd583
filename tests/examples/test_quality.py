"""benchmarks/quality.py on two bundles of the trained model: what it measures is there, and can be told apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import toolchain

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "shapes" / "model"


def build(name: str, store: Path, folder: Path) -> str:
    toolchain.build(ROOT / "recipes" / f"{name}.toml", str(MODEL), folder / name, store=store)
    return str(folder / name)


def test_a_precision_is_compared_with_another(store: Path, tmp_path: Path) -> None:
    bundles = [build(name, store, tmp_path) for name in ("shapes-int8w", "shapes-fp32")]
    output = tmp_path / "quality.json"
    arguments = ["--bundle", bundles[0], "--bundle", bundles[1], "--against", bundles[1]]
    arguments += ["--captions", "6", "--output", str(output)]
    script = str(ROOT / "benchmarks" / "quality.py")
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)
    found = json.loads(output.read_text())
    assert found["captions"] == 6
    small, same = found["bundles"]["shapes-int8w"], found["bundles"]["shapes-fp32"]
    assert 40 < small["psnr_db"]["min"] <= small["psnr_db"]["median"] < 90
    assert same["psnr_db"]["min"] == "inf"
    assert same["ssim"]["min"] == pytest.approx(1)
    assert same["score"] == found["against"]["score"]
    assert set(small["score"]) == {"background", "colours", "shapes", "place", "everything"}
    assert small["share_of_bytes"]["denoiser"] < 0.3
    assert small["times_as_long"] > 0
    if same["flip"] is not None:  # the package has no wheels for some machines
        assert 0 == same["flip"]["max"] < small["flip"]["max"] < 0.1
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["shapes-fp32", "shapes-int8w", "shapes-fp32"]
    assert all(" captions " in line and line.endswith("times as long") for line in lines[1:])
