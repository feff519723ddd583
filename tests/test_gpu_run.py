"""benchmarks/gpu_run without a GPU: what stays on disk however a run ends, and its parts on the pretended GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_run import gpu_tests, pack, packs, run
from benchmarks.gpu_run.record import Record
from tests.parity import LEAST_PSNR_DB
from tests.pretend import FAKES, pretended
from toolchain.errors import BundleError

ROOT = Path(__file__).parents[1]
GRACE_S = 0.5
DEADLINE_S = 4.0
PLANS = ("denoiser/1x64x64", "text_encoder/any", "vae_decoder/1x64x64")


def start(folder: Path, *names: str, needs: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
    """The script over some of the parts of tests/gpu_run_parts.py; `needs` are the last one's."""
    parts = [
        (f"{i}-{n}", f"tests.gpu_run_parts:{n}", needs if i == len(names) - 1 else ()) for i, n in enumerate(names)
    ]
    code = (
        "import sys; from benchmarks.gpu_run import run\n"
        f"run.GRACE_S = {GRACE_S}\n"
        f"parts = [run.Part(name, what, {DEADLINE_S}, needs) for name, what, needs in {parts!r}]\n"
        "sys.exit(run.main(sys.argv[1:], parts))"
    )
    options = ["--output", str(folder / "out"), "--packed", str(folder / "packed")]
    return subprocess.Popen(
        [sys.executable, "-c", code, *options],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        text=True,
    )


def results(folder: Path) -> dict[str, Any]:
    """What has its final name; another, with a dot in front, is being written."""
    return {path.stem: json.loads(path.read_text()) for path in (folder / "out").glob("[!.]*.json")}


def wait_for(what: Callable[[], Any]) -> Any:
    ends = time.monotonic() + 30
    while time.monotonic() < ends:
        with contextlib.suppress(OSError, KeyError):
            if found := what():
                return found
        time.sleep(0.02)
    raise AssertionError("it never came")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_part_that_ends_badly_costs_the_others_nothing(tmp_path: Path) -> None:
    process = start(tmp_path, "raises", "killed", "hangs", "one_stage_fails", "good")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    found = results(tmp_path)
    ended = found.pop("run")
    states = {name[2:]: part["state"] for name, part in found.items()}
    assert states == {
        "raises": "failed with exit code 1",
        "killed": "killed by SIGKILL",
        "hangs": "past its deadline of 4 s",
        "one_stage_fails": "done",
        "good": "done",
    }
    assert {name[2:]: part["state"] for name, part in ended["parts"].items()} == states
    assert found["0-raises"]["stages"] == {"first": 1}
    assert "nobody expected this" in found["0-raises"]["log"]
    assert found["1-killed"]["stages"] == {"first": 1, "second": {"running": True}}
    assert ended["parts"]["1-killed"]["failed"] == ["second"]
    assert found["3-one_stage_fails"]["stages"] == {
        "bad": {"error": "ZeroDivisionError: integer division or modulo by zero"},
        "good": {"answer": 42},
    }
    assert found["4-good"]["stages"] == {"answer": 42}
    assert not any(map(alive, found["2-hangs"]["stages"]["pids"]))
    for part in (*found.values(), ended):
        assert part["machine"]["cpu"]
        assert part["machine"]["gpus"] == []
        assert part["versions"]["numpy"]
        assert not part["pretended"]
    lines = re.sub(r"\d+ s\b", "N s", said).splitlines()
    assert lines[2:] == [
        "2-hangs: past its deadline of N s, N s, failed: second",
        "3-one_stage_fails: done, N s, failed: bad",
        "4-good: done, N s",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_what_was_measured_until_a_stop_is_on_disk(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "good", "hangs", "good")
    wait_for(lambda: results(tmp_path)["1-hangs"]["stages"]["second"])
    pids = results(tmp_path)["1-hangs"]["stages"]["pids"]
    process.send_signal(number)
    process.communicate(timeout=30)
    found = results(tmp_path)
    assert found.keys() == {"run", "0-good", "1-hangs"}
    assert (found["0-good"]["state"], found["0-good"]["stages"]) == ("done", {"answer": 42})
    assert found["1-hangs"]["stages"]["second"] == {"running": True}
    assert found["run"]["parts"]["0-good"]["state"] == "done"
    state = "running" if number == signal.SIGKILL else f"stopped by {number.name}"
    assert found["1-hangs"]["state"] == found["run"]["parts"]["1-hangs"]["state"] == state
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: not alive(pids[0]))  # its runner's death ends it
    if number != signal.SIGKILL:
        assert not alive(pids[1])
    elif alive(pids[1]):
        os.kill(pids[1], signal.SIGKILL)


def test_no_part_begins_without_time(tmp_path: Path) -> None:
    ran = run.Run(tmp_path, tmp_path, seconds=run.LEAST_S - 1)
    ran.part(run.Part("late", "tests.gpu_run_parts:good", 60))
    assert json.loads((tmp_path / "late.json").read_text())["state"] == "not begun: no time is left"


class TestPacks:
    """Wheels come in pieces, some of them in a later call."""

    PAYLOAD = os.urandom(2500)

    @pytest.fixture
    def packed(self, tmp_path: Path) -> Path:
        archive = tmp_path / "onnxruntime_gpu.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_LZMA) as out:
            out.writestr("brought/__init__.py", "ANSWER = 42\n")
            out.writestr("brought/library.so", self.PAYLOAD)
        small = tmp_path / "small.zip"
        with zipfile.ZipFile(small, "w") as out:
            out.writestr("picture", b"pixels")
        archives = {"rtx_bundle": small, "onnxruntime_gpu": archive}
        calls = pack.split(archives, tmp_path / "packed", room=1500, piece_bytes=1000)
        assert [name for _, complete in calls for name in complete] == ["rtx_bundle", "onnxruntime_gpu"]
        assert len(calls) >= 2
        assert all(0 < nbytes <= 1500 for nbytes, _ in calls)
        return tmp_path / "packed"

    def test_what_is_lacking_is_named_and_the_rest_runs(self, packed: Path, tmp_path: Path) -> None:
        last = sorted(packed.glob("call-*"))[-1].rename(tmp_path / "later")
        late = [path.name for path in last.iterdir() if path.name != packs.MANIFEST]
        start(tmp_path, "good", "good", needs=("onnxruntime_gpu",)).communicate(timeout=30)
        found = results(tmp_path)
        assert found["0-good"]["state"] == "done"
        assert found["1-good"]["state"] == f"not begun: onnxruntime_gpu waits for {', '.join(sorted(late))}"
        assert found["1-good"]["machine"]["cpu"]
        assert (packed / "unpacked" / "rtx_bundle" / "picture").read_bytes() == b"pixels"
        last.rename(packed / "call-9")
        start(tmp_path, "good", "good", needs=("onnxruntime_gpu",)).communicate(timeout=30)
        assert results(tmp_path)["1-good"]["state"] == "done"
        site = packed / "unpacked" / "site"
        assert (site / "brought" / "library.so").read_bytes() == self.PAYLOAD
        done = subprocess.run(
            [sys.executable, "-c", "import brought; print(brought.ANSWER)"],
            env=run.environment(packed),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "42\n"

    def test_a_changed_piece_is_no_wheel(self, packed: Path, tmp_path: Path) -> None:
        piece = sorted(packed.glob("call-*/onnxruntime_gpu.zip.01"))[0]
        data = bytearray(piece.read_bytes())
        data[100] ^= 1
        piece.write_bytes(data)
        start(tmp_path, "good", "good", needs=("onnxruntime_gpu",)).communicate(timeout=30)
        found = results(tmp_path)
        assert found["0-good"]["state"] == "done"
        assert "onnxruntime_gpu.zip.01 is not what was packed" in found["1-good"]["state"]
        assert not (packed / "unpacked" / "site").exists()

    def test_the_calls_run_every_part_and_bring_every_pack(self) -> None:
        names = {part.name for part in run.PARTS}
        assert {part for parts in pack.AFTER.values() for part in parts} == names
        assert {need for part in run.PARTS for need in part.needs} == set(pack.ORDER)
        lines = [*pack.call_lines([(40, ["build"]), (44, []), (30, ["rtx", "rtx_bundle"]), (9, ["onnxruntime_gpu"])])]
        ends = [line.rpartition("--parts ")[2].strip() for line in lines[1::2]]
        assert ends == ["tests torch_steps sd15 sdxl", "true", "rtx", "tests shapes", "sd15", "sdxl"]

    def test_results_fit_through_a_narrow_door(self) -> None:
        """Of the machine that is lent, eight files come back."""
        assert len(run.PARTS) + len(("run.json", "run.log")) <= 8


TESTS = """
import os, signal, time
import pytest

def test_passes(): pass

@pytest.mark.skip(reason="not today")
def test_skipped(): pass

def test_fails(): assert 1 + 1 == 3

def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)

def test_hangs(): time.sleep(600)

def test_comes_last(): pass
"""


def test_each_test_is_told_whatever_the_others_do(tmp_path: Path) -> None:
    file = tmp_path / "test_ways_to_end.py"
    file.write_text(TESTS)
    record = Record(tmp_path / "tests.json", "tests")
    gpu_tests.measure_files(record, (str(file),), test_s=5)
    stages = json.loads((tmp_path / "tests.json").read_text())["stages"]
    outcomes = {name.rpartition("::test_")[2]: found for name, found in stages["test_ways_to_end"].items()}
    assert {name: found["outcome"] for name, found in outcomes.items()} == {
        "passes": "passed",
        "skipped": "skipped",
        "fails": "failed",
        "crashes": "crashed",
        "hangs": "hung",
        "comes_last": "passed",
    }
    assert "not today" in outcomes["skipped"]["why"]
    assert "assert (1 + 1) == 3" in outcomes["fails"]["why"]
    assert outcomes["crashes"]["why"] == "SIGSEGV"
    assert all(name in stages["test_ways_to_end.outcomes"]["error"] for name in ("fails", "crashes", "hangs"))


def test_tests_for_a_gpu_run_on_the_pretended_one(gpu: Any, tmp_path: Path) -> None:
    record = Record(tmp_path / "tests.json", "tests")
    gpu_tests.measure_files(record, gpu_tests.FILES[:1], gpu_tests.TEST_S)
    found = json.loads((tmp_path / "tests.json").read_text())
    assert found["pretended"]
    told = " ".join(found["stages"]["test_gpu_memory"])
    assert all(word in told for word in ("the_driver_takes_the_loop", "what_was_captured", "buffers_start_as_zeros"))
    outcomes = found["stages"]["test_gpu_memory.outcomes"]
    assert outcomes.keys() == {"passed"}
    assert outcomes["passed"] == len(found["stages"]["test_gpu_memory"])


def test_a_file_that_cannot_be_collected_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "test_broken.py"
    file.write_text("import no_such_module")
    record = Record(tmp_path / "tests.json", "tests")
    gpu_tests.measure_files(record, (str(file),), test_s=20)
    assert record.found["stages"]["test_broken.outcomes"]["error"].startswith("no test ran")


def test_the_first_parts_run_on_the_pretended_gpu(tmp_path: Path) -> None:
    """The whole script, its own parts: tests/gpu is the pretended GPU's contract too, and torch draws with its CPU."""
    options = ["--output", str(tmp_path / "out"), "--packed", str(tmp_path / "packed"), "--parts", "torch_steps"]
    environment = {**os.environ, "PYTHONPATH": f"{FAKES}{os.pathsep}{ROOT}"}
    subprocess.run(
        [sys.executable, "benchmarks/gpu_run/run.py", *options], cwd=ROOT, env=environment, check=True, timeout=120
    )
    found = results(tmp_path)["torch_steps"]
    assert found["pretended"]
    stages = found["stages"]
    for way in ("off", "step", "loop"):
        assert [equal["same_bytes"] for equal in stages[way]["equal"].values()] == [True, True]
        assert stages[way]["repeats"]
        assert stages[way]["gpu_ms_per_step"] > 0
        assert stages[way]["host_us_per_step"] > 0
    assert [stages[way]["captures"] for way in ("off", "step", "loop")] == [0, 2, 3]
    assert [stages[way]["while_node"] for way in ("off", "step", "loop")] == [False, False, True]


def test_a_difference_in_one_latent_is_seen(tmp_path: Path) -> None:
    import numpy as np

    from benchmarks.gpu_run.torch_steps import compared, idle_share

    expected = np.linspace(0, 1, 8, dtype=np.float16)
    other = expected.copy()
    other[0] += np.float16(0.25)
    assert compared(expected, expected)["same_bytes"]
    assert compared(other, expected) == {"same_bytes": False, "largest_difference": 0.25, "finite": True}
    assert idle_share([(0, 4), (2, 5), (8, 10)]) == {"spans": 3, "idle_share": pytest.approx(0.3)}
    assert idle_share([(3, 4), (0, 3)])["idle_share"] == 0


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[Any]:
    with pretended(DIFFBUILD_CACHE=str(tmp_path / "cache")) as trt:
        yield trt
        assert trt.violations == []


def small_recipe(path: Path, backend: str = "tensorrt") -> Any:
    from toolchain.recipe import load_recipe

    recipe = load_recipe(path)
    small = {"buckets": recipe.buckets[:1], "without": ("vae_encoder",)}
    return dataclasses.replace(recipe, name="tiny-gpu-run", backend=backend, **small)


def test_a_model_is_measured_on_the_pretended_gpu(
    gpu: Any, tiny_model: Path, tiny_recipe: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu_run import models

    monkeypatch.setattr(models, "REPEATS", 2)
    record = Record(tmp_path / "model.json", "model")
    models.measure_backend(record, small_recipe(tiny_recipe), tiny_model, store.parent, others=("nobody",), check=False)
    stages = json.loads((tmp_path / "model.json").read_text())["stages"]
    assert stages["tensorrt.build"]["device"]["kind"] == "cuda"
    steady = stages["tensorrt.steadiness"]
    assert steady["same_seed_same_bytes"]
    assert steady["different_pictures"] == steady["kinds"] > 1
    assert steady["held_bytes"][0] == steady["held_bytes"][1] > 0
    assert steady["free_bytes"][0] == steady["free_bytes"][1]
    assert steady["synchronisations_per_picture"] == 1
    assert 0 <= stages["tensorrt.gaps"]["idle_share"] < 1
    assert stages["tensorrt.bench"]["contenders"]["diffbuild"]["total"]["median"] > 0
    assert stages["tensorrt.nobody"] == {"error": "KeyError: 'nobody'"}


def test_a_backend_that_cannot_run_is_skipped_with_the_reason(tiny_recipe: Path, tmp_path: Path) -> None:
    from benchmarks.gpu_run import models

    record = Record(tmp_path / "model.json", "model")
    models.measure_backend(record, small_recipe(tiny_recipe), tmp_path, tmp_path, others=(), check=False)
    assert record.found["stages"]["tensorrt"]["skipped"]


def test_models_of_random_weights_are_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.export_scale import PUBLISHED, Published
    from benchmarks.gpu_run import models
    from toolchain.models.hub import resolve_model
    from toolchain.models.registry import family_of

    files = json.loads(json.dumps(PUBLISHED["sd15"].files))
    files["unet/config.json"] |= {"block_out_channels": [32] * 4, "cross_attention_dim": 64, "layers_per_block": 1}
    files["vae/config.json"] |= {"block_out_channels": [32] * 4, "layers_per_block": 1}
    files["text_encoder/config.json"] |= {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 64}
    monkeypatch.setitem(models.PUBLISHED, "sd15", Published(files, "sd15-fp16"))
    found = models.write_model("sd15", tmp_path / "model")
    assert found["parameters"] > 1e6
    assert models.write_model("sd15", tmp_path / "model") == {"kept": True}
    recipe = models.real_recipe("sd15", "onnxruntime_cuda")
    source = resolve_model(str(tmp_path / "model"))
    parts = family_of(source, recipe).parts(recipe)
    assert {part.name for part in parts} == {"text_encoder", "denoiser", "vae_decoder"}
    for part in parts:
        assert sum(p.numel() for p in part.reference(source, recipe).parameters()) > 1e5


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("backend", ["onnxruntime_cuda", "tensorrt"])
def test_recipes_of_real_size_are_recipes(name: str, backend: str) -> None:
    from benchmarks.gpu_run import models
    from toolchain.recipe import Recipe

    recipe = models.real_recipe(name, backend)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.component("denoiser").dtype == "float16"
    assert recipe.component("vae_decoder").dtype == "float32"


@pytest.fixture
def brought(tiny_model: Path, tiny_recipe: Path, store: Path, tmp_path: Path) -> Path:
    """A bundle for RTX, and the picture to hold it against, from a machine without a GPU."""
    from benchmarks.gpu_run import rtx

    with pretended(DIFFBUILD_CACHE=str(tmp_path / "elsewhere")):
        rtx.make(tmp_path / "made", small_recipe(tiny_recipe, "tensorrt_rtx"), tiny_model, store)
    return tmp_path / "made"


def asked(folder: Path, path: Path, **variables: str) -> dict[str, Any]:
    from benchmarks.gpu_run import rtx

    with pretended(DIFFBUILD_CACHE=str(path.with_suffix("")), **variables) as trt:
        record = Record(path, "rtx")
        rtx.measure_folder(record, folder)
        assert trt.violations == []
    stages: dict[str, Any] = json.loads(path.read_text())["stages"]
    return stages


def test_a_bundle_that_was_brought_is_asked_and_drawn(brought: Path, tmp_path: Path) -> None:
    stages = asked(brought, tmp_path / "rtx.json")
    assert stages["gpu"]["compute_capability"] == "9.0"
    assert stages["refusal"] == {"reason": None}
    plans = [f"bundle/engines/{name}/engine.plan" for name in PLANS]
    assert list(stages["validity"]) == plans
    assert {found["answer"] for found in stages["validity"].values()} == {"valid"}
    assert all(stages[f"opened {plan}"] == {"engine": True, "context": True, "said": []} for plan in plans)
    assert stages["picture"]["psnr_db"] >= LEAST_PSNR_DB
    assert stages["picture"]["repeats"]
    assert stages["picture"]["captures"] > 0
    assert "picture_unasked" not in stages


def test_a_gpu_that_the_library_refuses_is_tried_all_the_same(brought: Path, tmp_path: Path) -> None:
    stages = asked(brought, tmp_path / "rtx.json", FAKE_CUDA_CC="7.5")
    assert "compute capability 7.5" in stages["refusal"]["reason"]
    assert {found["answer"] for found in stages["validity"].values()} == {"invalid"}
    assert all("unsupported cc" in found["why"] for found in stages["validity"].values())
    assert "BundleError" in stages["picture"]["error"]
    assert stages["picture_unasked"]["psnr_db"] >= LEAST_PSNR_DB  # the pretended library is more lenient than its word


def test_a_changed_bundle_is_not_opened(brought: Path, tmp_path: Path) -> None:
    plan = next((brought / "bundle").rglob("*.plan"))
    plan.write_bytes(plan.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError):
        asked(brought, tmp_path / "rtx.json")
    assert json.loads((tmp_path / "rtx.json").read_text())["stages"] == {}
    assert not (tmp_path / "rtx" / "built").exists()


def test_the_recipe_of_the_bundle_that_is_brought() -> None:
    from benchmarks.gpu_run import rtx
    from toolchain.recipe import load_recipe

    recipe = load_recipe(rtx.RECIPE)
    assert recipe.backend == "tensorrt_rtx"
    assert (recipe.tensorrt_rtx.targets, recipe.tensorrt_rtx.tf32) == ((), False)
    assert rtx.MODEL.is_dir()
