"""`diffbuild bench`: what it measures, what it says, and what it refuses before it measures."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests.tiny import recipe_for
from toolchain.bench.page import page
from toolchain.bench.rebuilt import for_openvino, rebuilt
from toolchain.bench.results import BenchReport, ContenderResult, Spread, spread, summarize
from toolchain.bench.run import _forecast_mb, bench, measure
from toolchain.bench.worker import CONTENDERS, Parts
from toolchain.bench.workload import workload
from toolchain.bundle.bundle import read_bundle
from toolchain.bundle.forecast import forecast
from toolchain.cli.main import cli
from toolchain.engines.openvino.build import OpenVinoBuilder
from toolchain.engines.openvino.device import openvino_device
from toolchain.errors import BundleError, DiffbuildError, UsageError
from toolchain.recipe import Calibration, ComponentRecipe, Quantize
from toolchain.recipe.options import OnnxRuntimeOptions

ROUNDS = [
    {"text_ms": 1.0, "denoise_ms": 10.0, "overhead_ms": 0.5, "total_ms": 11.5, "launches": 6.0},
    {"text_ms": 3.0, "denoise_ms": 14.0, "overhead_ms": 0.5, "total_ms": 17.5, "launches": 6.0},
]

WITHOUT = summarize({}, ROUNDS, {"peak_mb": None})


@pytest.fixture
def report() -> BenchReport:
    ours = summarize({"process_ms": 50.0, "first_picture_ms": 20.0}, ROUNDS, {"peak_mb": 400.0, "grown_mb": 300.0})
    theirs = ContenderResult({"load_ms": 900.0}, {"denoise_ms": Spread(30, 29, 31)}, Spread(35, 34, 36), None, {})
    return BenchReport(
        bundle="bundle",
        recipe="tiny",
        workload={"prompt": "<script>alert(1)</script>", "batch": 2, "size": "64x64", "steps": 4}
        | {"scheduler": "euler", "guidance": 5.0},
        repeats=2,
        machine={"cpu": "a <processor>"},
        versions={"diffbuild": "1"},
        contenders={"diffbuild": ours, "diffusers": theirs},
        ratios={"diffusers": [2.0, 4.0]},
        likeness_db={"diffusers": 89.25},
        sweeps={"steps": [{"steps": "5", "total_ms": 5.0, "images": 1}, {"steps": "10", "total_ms": 9.0, "images": 1}]},
        forecast_mb=330.0,
        pictures={name: np.full((64, 96, 3), 200, np.uint8) for name in ("diffbuild", "diffusers")},
    )


def test_spread_of_rounds() -> None:
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0)
    assert spread([float(n) for n in range(11)]) == Spread(5.0, 1.0, 9.0)


def test_stages_are_medians_of_the_rounds(report: BenchReport) -> None:
    ours = report.contenders["diffbuild"]
    assert list(ours.stages) == ["text_ms", "denoise_ms", "overhead_ms"]
    assert (ours.stages["denoise_ms"].median, ours.total.median, ours.cold_ms) == (12.0, 14.5, 70.0)
    assert ours.counts == {"launches": 6.0}


def test_the_page_needs_nothing_and_escapes_everything(report: BenchReport) -> None:
    html = page(report)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "a &lt;processor&gt;" in html
    assert not re.search(r'https?://|src="(?!data:image/png;base64,)|@import|url\(', html)
    assert "<b>3.00 times</b>" in html
    assert "PSNR 89.2 dB" in html
    assert html.count('class="bars"') == 4  # stages, memory, cold start, one sweep
    assert html.count("<img") == html.count("<figcaption") == 2


def test_the_terminal_says_the_same(report: BenchReport) -> None:
    text = "\n".join(report.lines())
    assert "diffusers takes 3.00 times as long" in text
    assert "137.93 images/s" in text
    assert json.dumps(report.to_json())
    assert "pictures" not in report.to_json()


def test_memory_is_held_against_its_forecast(report: BenchReport) -> None:
    said = "300 MB came with the engines; the forecast was 330 MB (+10.0%)"
    assert f"\nmemory: {said}\n" in "\n".join(report.lines())
    assert said in page(report)
    assert (report.to_json()["forecast_mb"], report.to_json()["contenders"]["diffbuild"]["grown_mb"]) == (330, 300)
    unmeasured = replace(report, contenders={"diffbuild": WITHOUT}, ratios={})
    assert "memory: the forecast is 330 MB; what came with the engines alone could not be told" in unmeasured.lines()
    nothing = replace(report, forecast_mb=None)
    assert "memory:" not in "\n".join(nothing.lines())
    assert "Memory:" not in page(nothing)


def test_the_page_shows_memory_by_what_took_it(report: BenchReport) -> None:
    """400 MB of ours, of which 300 came with the engines; the others tell no peak here."""
    html = page(report)
    assert "diffbuild: 400 MB" in html
    assert 'title="process 100.0 MB" style="background:#888;width:25.00%"' in html
    assert 'title="engines 300.0 MB" style="background:#2b6cb0;width:75.00%"' in html
    ours = replace(report.contenders["diffbuild"], gpu_mb=220.0)
    assert "diffbuild on the GPU: 220 MB" in page(replace(report, contenders={"diffbuild": ours}, ratios={}))
    assert "Resident" not in page(replace(report, contenders={"diffbuild": WITHOUT}, ratios={}))


def test_on_a_gpu_its_memory_counts(report: BenchReport) -> None:
    ours = replace(report.contenders["diffbuild"], gpu_mb=220.0)
    on_gpu = replace(report, contenders={**report.contenders, "diffbuild": ours})
    text = "\n".join(on_gpu.lines())
    assert ", peak 400 MB, on the GPU 220 MB" in text
    assert "memory: 220 MB came with the engines; the forecast was 330 MB (+50.0%)" in text
    assert "220 MB" in page(on_gpu)


def test_the_forecast_is_of_the_buckets_that_draw(tiny_bundle: Path) -> None:
    """The others have warmed up alone. A batch of three is three times the bucket of one."""
    bundle = read_bundle(tiny_bundle)
    found = forecast(bundle)
    assert found.total is not None
    for batch, size, drawn in ((1, (64, 64), "1x64x64"), (3, (64, 64), "1x64x64"), (2, (64, 96), "2x64x96")):
        work = workload(bundle, None, batch, size, None)
        ran = ("text_encoder", f"denoiser {drawn}", f"vae_decoder {drawn}")
        saved = sum(e.activations or 0 for e in found.engines if e.name not in ran)
        assert _forecast_mb(bundle, work) == pytest.approx((found.total - saved) / 1e6)
    on_gpu = _forecast_mb(replace(bundle, device={"kind": "cuda"}), work)
    opened = [e for e in found.engines if e.name in (*ran, f"vae_encoder {drawn}")]
    block = max(e.activations or 0 for e in opened)
    assert on_gpu == pytest.approx((sum(e.total for e in opened) + block) / 1e6)


def test_a_run_against_diffusers(tiny_bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Two rounds of both; the pictures are the same, so the contenders do the same work."""
    arguments = ["bench", str(tiny_bundle), "--model", str(tiny_model), "--against", "diffusers", "--repeats", "2"]
    arguments += ["--sweep", "batch", "--html", str(tmp_path / "bench.html"), "--json"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    ours, theirs = data["contenders"]["diffbuild"], data["contenders"]["diffusers"]
    assert float(data["likeness_db"]["diffusers"]) >= 60  # "inf" where the pictures are equal
    stages = sum(ours["stages"][s]["median"] for s in ("tokenize_ms", "text_ms", "denoise_ms", "decode_ms"))
    assert 0 < stages <= ours["total"]["p90"] * 1.01
    assert set(ours["start"]) >= {"process_ms", "imports_ms", "verify_ms", "open_and_warm_up_ms", "first_picture_ms"}
    # Prompt and empty prompt, four evaluations, the decoder: nothing else is launched.
    assert (ours["counts"]["evaluations"], ours["counts"]["launches"]) == (4, 7)
    assert theirs["peak_mb"] > 100
    assert 0 < ours["grown_mb"] < ours["peak_mb"]
    assert theirs["grown_mb"] is None
    assert data["forecast_mb"] > 0
    assert len(data["ratios"]["diffusers"]["rounds"]) == 2
    assert [point["batch"] for point in data["sweeps"]["batch"]] == ["1"]
    html = (tmp_path / "bench.html").read_text()
    assert "<!doctype html>" in html
    assert html.count("<img") == 2


def test_a_run_against_openvino(
    tiny_bundle: Path, tiny_model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same loop from the same noise: only the engine is another, and float32 rounds differently there."""
    monkeypatch.setenv("DIFFBUILD_STORE", str(store))
    found = measure(tiny_bundle, model=str(tiny_model), against=("openvino",), repeats=1)
    ours, theirs = found.contenders["diffbuild"], found.contenders["openvino"]
    assert theirs.counts["launches"] == ours.counts["launches"]
    assert theirs.stages["denoise_ms"].median > 0
    assert theirs.start.keys() == ours.start.keys()
    likeness = found.likeness_db["openvino"]
    assert likeness is not None
    assert likeness >= 60
    assert found.to_json()["precisions"] == {"diffbuild": "float32", "openvino": "float32"}
    assert any(line.startswith("openvino (float32): ") for line in found.lines())
    assert "its picture and ours: PSNR " in page(found)
    assert "; it computes in float32" in page(found)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells resident memory")
def test_memory_with_openvino_is_near_its_forecast(openvino_bundle: Path) -> None:
    found = measure(openvino_bundle, repeats=2)
    assert found.contenders["diffbuild"].grown_mb == pytest.approx(found.forecast_mb, rel=0.2)


def test_openvino_is_built_from_the_same_graphs(
    tiny_bundle: Path, tiny_model: Path, store: Path, tmp_path: Path
) -> None:
    """What a build of the bundle left in the store is not made again; the second time nothing is."""
    bundle = read_bundle(tiny_bundle)
    first: list[str] = []
    rebuilt(bundle, tiny_model, tmp_path / "first", first.append, store)
    assert {text.split()[1] for text in first} <= {"weights", "engine"}
    again: list[str] = []
    against = rebuilt(bundle, tiny_model, tmp_path / "again", again.append, store)
    assert (against.backend, against.buckets, again) == ("openvino", bundle.buckets, [])


WIDENED = [
    ({"dtype": "float16"}, (), {"dtype": "float32"}),
    ({"dtype": "bfloat16", "keep_float32": ("conv_out",)}, ("float16",), {"dtype": "float32"}),
    (
        {"dtype": "bfloat16", "keep_float32": ("conv_out",)},
        ("bfloat16",),
        {"dtype": "bfloat16", "keep_float32": ("conv_out",)},
    ),
    ({"quantize": Quantize(weights="int8"), "tokens": 77}, (), {"tokens": 77}),
]


@pytest.mark.parametrize(("given", "short", "expected"), WIDENED)
def test_what_openvino_cannot_do_is_widened(
    given: dict[str, Any], short: tuple[str, ...], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`short` are the types below float32 in which the CPU computes."""

    def refuses(self: object, what: object, options: object) -> str | None:
        return None if what in ("float32", *short) else "not here"

    monkeypatch.setattr(OpenVinoBuilder, "refuses_dtype", refuses)
    monkeypatch.setattr(OpenVinoBuilder, "refuses_quantized", refuses)
    recipe = replace(
        recipe_for("denoiser", **given),
        onnxruntime=OnnxRuntimeOptions(threads=3),
        calibration=Calibration(("a prompt",)),
    )
    against = for_openvino(recipe)
    assert against.component("denoiser") == ComponentRecipe(**expected)
    assert (against.backend, against.openvino.threads, against.calibration) == ("openvino", 3, None)
    assert for_openvino(replace(recipe, backend="tensorrt")).openvino.threads == 0


def test_what_is_refused_before_anything_starts(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = read_bundle(tiny_bundle)
    work = workload(bundle, None, 1, None, None)
    with pytest.raises(UsageError, match="own backend is openvino"):
        bench(
            replace(bundle, backend="openvino", device=openvino_device()), work, against=("openvino",), model=tmp_path
        )
    with pytest.raises(UsageError, match="needs the model"):
        bench(bundle, work, against=("diffusers",))
    with pytest.raises(UsageError, match="no engine was built for this size"):
        workload(bundle, None, 1, (64, 72), None)
    with pytest.raises(BundleError, match="cannot run here"):
        bench(replace(bundle, device={**bundle.device, "cpu": "another"}), work)
    monkeypatch.setattr("toolchain.bench.run.find_spec", lambda name: None)
    for name, extra in (("compile", "build"), ("openvino", "openvino")):
        with pytest.raises(UsageError, match=rf"(?s)not installed.*diffbuild\[{extra}\]"):
            bench(bundle, work, against=(name,), model=tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [["--repeats", "0"], ["--against", "nobody"], ["--html", "no/such/folder/a.html"], ["--batch", "0"]],
)
def test_wrong_usage_is_exit_code_2(tiny_bundle: Path, arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, ["bench", str(tiny_bundle), *arguments]).exit_code == 2


def test_a_contender_that_fails_says_why(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(DiffbuildError, match="diffusers failed while it was measured"):
        measure(tiny_bundle, model=str(tmp_path), against=("diffusers",), repeats=1)


def test_diffusers_loads_what_a_build_loads(tiny_bundle: Path, tiny_copy: Path) -> None:
    """Weights that exist in one variant alone: diffusers' own loader does not find them unless it is told."""
    name = "diffusion_pytorch_model"
    (tiny_copy / "unet" / f"{name}.safetensors").rename(tiny_copy / "unet" / f"{name}.fp16.safetensors")
    draw = CONTENDERS["diffusers"](str(tiny_bundle), str(tiny_copy), Parts())
    stages, picture = draw(vars(workload(read_bundle(tiny_bundle), None, 1, None, 1)))
    assert picture.size == (64, 64)
    assert 0 < stages["denoise_ms"] < stages["total_ms"]


def test_diffusers_draws_with_the_scheduler_of_its_model(tiny_bundle: Path, tiny_copy: Path) -> None:
    """model_index.json names its class, whatever the scheduler's config says: as diffusers loads it."""
    work = vars(workload(read_bundle(tiny_bundle), None, 1, None, 2)) | {"scheduler": "model"}

    def drawn(scheduler: str) -> np.ndarray:
        path = tiny_copy / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"scheduler": ["diffusers", scheduler]}))
        draw = CONTENDERS["diffusers"](str(tiny_bundle), str(tiny_copy), Parts())
        first, again = (np.asarray(draw(work)[1]) for _ in range(2))
        assert np.array_equal(first, again)
        return first

    assert not np.array_equal(drawn("PNDMScheduler"), drawn("EulerDiscreteScheduler"))
