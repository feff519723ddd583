"""What OpenVINO's backend cannot do here, told as early as it is known, and what another machine's engines are told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import toolchain
from tests.manifests import edit_manifest
from tests.openvino_here import FakeCore, forget, pretend_cpu, pretend_version, remove_openvino
from tests.test_cli import run, run_json
from tests.test_plan import misses
from tests.tiny import RECIPE
from toolchain.builder.plan import Plan
from toolchain.engines.openvino import device
from toolchain.engines.openvino import run as openvino_run
from toolchain.engines.openvino.build import OpenVinoBuilder
from toolchain.engines.openvino.device import EXTRA, installed_version, openvino_device
from toolchain.engines.openvino.run import OpenVinoRunner
from toolchain.errors import BundleError, EngineError, RecipeError
from toolchain.recipe.options import OpenVinoOptions

__all__ = ["forget"]
BUILDER, RUNNER, CPU = OpenVinoBuilder(), OpenVinoRunner(), OpenVinoOptions()
ON_CPU = 'backend = "openvino"\n' + RECIPE
PlanText = Callable[[str], Plan]


@pytest.fixture
def plan(tiny_model: Path, store: Path, tmp_path: Path) -> PlanText:
    """Plans a recipe, given as text, for the tiny model."""

    def made(text: str) -> Plan:
        (tmp_path / "tiny.toml").write_text(text)
        return toolchain.plan_build(tmp_path / "tiny.toml", str(tiny_model), store=store)

    return made


# --- devices ----------------------------------------------------------------------------------------------------------


def test_engines_of_this_machine() -> None:
    here = BUILDER.device()
    assert here.keys() >= {"kind", "cpu", "openvino"}
    assert RUNNER.available() is None
    assert RUNNER.refuse(here, CPU) is None
    assert RUNNER.install(here) is None


def test_engines_of_another_version() -> None:
    built = {**openvino_device(), "openvino": "2026.3.0"}
    reason = str(RUNNER.refuse(built, CPU))
    assert reason == f"built with openvino 2026.3.0, this machine has {installed_version()}"
    assert RUNNER.install(built) == "pip install openvino==2026.3.0"


def test_engines_of_another_processor() -> None:
    built = {**openvino_device(), "cpu": "x86_64-avx2"}
    reason = str(RUNNER.refuse(built, CPU))
    assert reason == f"built on x86_64-avx2, this machine has {openvino_device()['cpu']}"
    assert RUNNER.install({**built, "openvino": "2026.3.0"}) is None, "no version opens them"
    assert RUNNER.install({"kind": "cpu", "cpu": openvino_device()["cpu"]}) is None, "which version is not written"


def test_a_type_is_refused_without_openvino(forget: pytest.MonkeyPatch) -> None:
    """Where the processor's flags tell."""
    forget.setattr(device, "cpu_architecture", lambda: "x86_64")
    forget.setattr(device, "cpu_flags", lambda: frozenset({"avx2"}))
    remove_openvino(forget)
    reason = OpenVinoBuilder().refuses_dtype("bfloat16", CPU)
    assert reason == "this CPU has no bfloat16 (none of avx512_bf16, amx_bf16)"


@pytest.mark.parametrize("name", ["GPU", "NPU"])
def test_engines_of_a_device_that_is_not_here(name: str, forget: pytest.MonkeyPatch) -> None:
    forget.setattr(device, "core", lambda: FakeCore(["CPU"]))
    forget.setattr(openvino_run, "core", device.core)
    built = {**openvino_device(), name.lower(): "Intel Arc"}
    options = OpenVinoOptions(device=name)  # type: ignore[arg-type]
    assert RUNNER.refuse(built, options) == f"OpenVINO finds no {name} here (only CPU)"


def test_engines_of_another_gpu(forget: pytest.MonkeyPatch) -> None:
    """Of one of several, whose processor does not matter."""
    forget.setattr(device, "core", lambda: FakeCore(["CPU", "GPU.0", "GPU.1"]))
    options = OpenVinoOptions(device="GPU")
    here = openvino_device()
    assert here["gpu"] == "Intel GPU"
    assert RUNNER.refuse({**here, "cpu": "x86_64-sse"}, options) is None
    assert RUNNER.refuse({**here, "gpu": "Arc"}, options) == "built on Arc, this machine has Intel GPU"


# --- planning ---------------------------------------------------------------------------------------------------------


def short(dtype: str, text: str = ON_CPU) -> str:
    return f'{text}\n[components.denoiser]\ndtype = "{dtype}"\n[components.vae_decoder]\ndtype = "{dtype}"\n'


CAPABLE = FakeCore(["CPU"], ["FP32", "INT8", "BF16", "FP16"])
REFUSED = [
    (
        "bfloat16",
        FakeCore(["CPU"], ["FP32", "INT8"]),
        (),
        "OpenVINO has no bfloat16 on this CPU (expected float32, or another device)",
    ),
    (
        "bfloat16",
        CAPABLE,
        ("avx512_bf16", "amx_bf16"),
        "this CPU has no bfloat16 (none of avx512_bf16, amx_bf16) (expected float32, or another device)",
    ),
    (
        "float16",
        FakeCore(["CPU"], ["FP32", "INT8", "BF16"]),
        (),
        "OpenVINO has no float16 on this CPU (expected float32, or another device)",
    ),
    (
        "float16",
        CAPABLE,
        ("avx512_fp16", "amx_fp16"),
        "this CPU has no float16 (none of avx512_fp16, amx_fp16) (expected float32, or another device)",
    ),
]


@pytest.mark.parametrize(("dtype", "core", "without", "reason"), REFUSED)
def test_a_type_that_the_cpu_lacks(
    dtype: str, core: FakeCore, without: tuple[str, ...], reason: str, plan: PlanText, forget: pytest.MonkeyPatch
) -> None:
    """OpenVINO itself would take it and widen every value, more slowly than float32."""
    forget.setattr(device, "core", lambda: core)
    forget.setattr(device, "cpu_architecture", lambda: "x86_64")
    every = {name for names in device.INSTRUCTIONS.values() for name in names}
    forget.setattr(device, "cpu_flags", lambda: frozenset(every - {*without}))
    with pytest.raises(RecipeError) as error:
        plan(short(dtype))
    for component in ("denoiser", "vae_decoder"):
        assert f"components.{component}.dtype: {reason}" in str(error.value)


@pytest.mark.parametrize(("dtype", "flag"), [("bfloat16", "amx_bf16"), ("float16", "avx512_fp16")])
def test_a_type_that_the_cpu_has(dtype: str, flag: str, plan: PlanText, forget: pytest.MonkeyPatch) -> None:
    forget.setattr(device, "core", lambda: CAPABLE)
    forget.setattr(device, "cpu_flags", lambda: frozenset({flag}))
    assert plan(short(dtype)).refused is None


def test_float8_is_no_type_of_it(plan: PlanText) -> None:
    weights = '[components.denoiser.quantize]\nweights = "float8"\n'
    with pytest.raises(RecipeError, match="openvino has no products in float8"):
        plan(f"{ON_CPU}\n{weights}")


@pytest.mark.parametrize("name", ["GPU", "NPU"])
def test_a_device_that_is_not_here(name: str, plan: PlanText, tmp_path: Path, forget: pytest.MonkeyPatch) -> None:
    forget.setattr(device, "core", lambda: FakeCore(["CPU"]))
    with pytest.raises(RecipeError) as error:
        plan(f'{short("float16")}\n[openvino]\ndevice = "{name}"\n')
    said = str(error.value)
    assert f"openvino.device: OpenVINO finds no {name} here (expected CPU, or its driver installed)" in said
    assert "no float16" not in said, "whether it has the type is not known"


# --- keys -------------------------------------------------------------------------------------------------------------


def test_another_version_or_processor_builds_engines_anew(plan: PlanText, openvino_bundle: Path) -> None:
    """And nothing else; options of running are no part of it."""
    built = (openvino_bundle.parent / "tiny-openvino.toml").read_text()
    assert misses(plan(built)) == []
    running = "\n[openvino]\nthreads = 1\npin_threads = false\ntensor_parallel = true\n"
    assert misses(plan(built + running)) == []
    engines = [step.name for step in plan(built).steps if step.stage == "engine"]
    for pretend in (lambda patch: pretend_version(patch, "2027.0.0"), only_avx512):
        with pytest.MonkeyPatch.context() as patch:
            openvino_device.cache_clear()
            pretend(patch)
            missed = misses(plan(built))
        openvino_device.cache_clear()
        assert missed == engines
    assert misses(plan(built)) == []


def only_avx512(patch: pytest.MonkeyPatch) -> None:
    """What the recipe needs is not asked."""
    pretend_cpu(patch, without=["avx512_vnni"])


# --- not installed ----------------------------------------------------------------------------------------------------


def test_without_openvino_nothing_is_built(tiny_model: Path, tmp_path: Path, forget: pytest.MonkeyPatch) -> None:
    remove_openvino(forget)
    (tmp_path / "tiny.toml").write_text(short("bfloat16"))
    arguments = [tmp_path / "tiny.toml", "--model", tiny_model, "--store", tmp_path / "store"]
    assert run_json("plan", *arguments)["refused"]["what"] == "OpenVINO is not installed"
    assert EXTRA in run("plan", *arguments).stdout
    said = run("build", *arguments, "-o", tmp_path / "bundle", code=1).stderr
    assert "error: OpenVINO is not installed\n" in said
    assert f"hint: {EXTRA}\n" in said
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(EngineError, match="OpenVINO is not installed"):
        BUILDER.device()


def test_without_openvino_nothing_is_opened(openvino_bundle: Path, forget: pytest.MonkeyPatch) -> None:
    built = installed_version()
    remove_openvino(forget)
    with pytest.raises(BundleError, match="the bundle cannot run here") as error:
        toolchain.load(openvino_bundle)
    assert error.value.got == f"OpenVINO is not installed ({EXTRA})"
    assert error.value.hint == f"pip install openvino=={built}"
    said = run("generate", openvino_bundle, "a red circle", code=1).stderr
    assert f"hint: pip install openvino=={built}\n" in said
    assert run_json("inspect", openvino_bundle)["backend"] == "openvino"


def test_doctor_says_what_is_missing(forget: pytest.MonkeyPatch) -> None:
    remove_openvino(forget)
    told = run_json("doctor")
    assert told["missing"]["openvino"] == ["openvino"]
    assert told["backends"]["openvino"] == {
        "works": False,
        "reason": f"OpenVINO is not installed ({EXTRA})",
        "builds": False,
        "device": None,
    }
    assert EXTRA in run("doctor").stdout


def test_a_library_that_cannot_be_loaded(forget: pytest.MonkeyPatch) -> None:
    """Such as one whose package is there without its files."""
    forget.setitem(__import__("sys").modules, "openvino", None)
    assert str(RUNNER.available()).startswith("OpenVINO cannot be loaded: import of openvino halted")
    assert EXTRA in str(RUNNER.available())


# --- bundles ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(openvino_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(openvino_bundle, tmp_path / "bundle"))


def test_a_bundle_of_another_version(copied: Path) -> None:
    edit_manifest(copied, lambda manifest: manifest["device"].update(openvino="2026.3.0"))
    said = run("generate", copied, "a red circle", code=1).stderr
    assert f"built with openvino 2026.3.0, this machine has {installed_version()}" in said
    assert "hint: pip install openvino==2026.3.0\n" in said


def test_a_bundle_of_another_processor(copied: Path) -> None:
    edit_manifest(copied, lambda manifest: manifest["device"].update(cpu="x86_64-avx2"))
    said = run("generate", copied, "a red circle", code=1).stderr
    assert "built on x86_64-avx2" in said
    assert "hint: build it on this machine, from the same recipe\n" in said


@pytest.mark.parametrize("name", ["1x64x64/model.blob", "weights.safetensors"])
@pytest.mark.parametrize("changed", [False, True], ids=["cut", "changed"])
def test_a_damaged_bundle(name: str, changed: bool, copied: Path) -> None:
    path = copied / "engines" / "denoiser" / name
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:] if changed else data[:-100])
    said = run("generate", copied, "a red circle", code=1).stderr
    assert f"engines/denoiser/{name}" in said
    assert "hint: " in said
    if name.endswith("blob"):  # which would be executed
        said = run("generate", copied, "a red circle", "--no-verify", code=1).stderr
        assert f"engines/denoiser/{name}" in said
