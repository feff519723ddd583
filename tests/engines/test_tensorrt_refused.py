"""Bundles with TensorRT engines that must not be opened: from elsewhere, for another machine, damaged, too large."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import toolchain
from tests.manifests import edit_manifest
from tests.pretend import pretended
from tests.test_signing import write_pair
from toolchain.cli.main import cli
from toolchain.errors import BundleError, EngineError, SignatureError
from toolchain.runtime.pipeline import Pipeline

RECIPE = """\
family = "sd"
backend = "tensorrt"
buckets = ["1x64x64"]
without = ["vae_encoder"]
[tensorrt]
strip_plan = true
[sampling]
scheduler = "euler"
steps = 2
step_counts = [2]
[check]
prompts = ["a red circle"]
"""


@pytest.fixture(scope="module", autouse=True)
def _gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pretended(DIFFBUILD_CACHE=str(tmp_path_factory.mktemp("cache"))):
        yield


@pytest.fixture(scope="module")
def built(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    folder = tmp_path_factory.mktemp("built")
    (folder / "refused.toml").write_text(RECIPE)
    toolchain.build(folder / "refused.toml", str(tiny_model), folder / "bundle", store=store)
    return folder / "bundle"


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "moved"))


def generate(bundle: Path, *more: str | Path) -> tuple[int, str]:
    picture = bundle.parent / "picture.png"
    done = CliRunner().invoke(cli, ["generate", str(bundle), "a red circle", "-o", str(picture), *map(str, more)])
    assert picture.exists() == (done.exit_code == 0)
    return done.exit_code, done.output


def test_a_bundle_that_was_built_here_may_move(bundle: Path) -> None:
    assert generate(bundle)[0] == 0


@dataclass(frozen=True)
class Machine:
    """How another machine differs, what is said there, and what to do."""

    says: str
    hint: str
    variables: tuple[tuple[str, str], ...] = ()
    tensorrt: str | None = None


NO_TENSORRT = "none"
DOCTOR, AGAIN = "diffbuild doctor", "build it on this machine, from the same recipe"
EXACTLY = "hint: pip install tensorrt==11.4.0.106"
MACHINES = {
    "another GPU": Machine(
        "built on NVIDIA H200 (compute capability 9.0, 132 multiprocessors), this machine has NVIDIA L40S",
        AGAIN,
        (("FAKE_CUDA_GPU", "NVIDIA L40S"), ("FAKE_CUDA_CC", "8.9"), ("FAKE_CUDA_SMS", "142")),
    ),
    "another TensorRT": Machine(
        "built with TensorRT 11.4.0.106, this machine has 11.5.0.1", EXACTLY, tensorrt="11.5.0.1"
    ),
    "TensorRT too old": Machine("TensorRT 10.13 or newer, below 12 is needed", EXACTLY, tensorrt="10.12.0.36"),
    "TensorRT too new": Machine("TensorRT 10.13 or newer, below 12 is needed", EXACTLY, tensorrt="12.0.0.1"),
    "no TensorRT": Machine("TensorRT cannot be imported", EXACTLY, tensorrt=NO_TENSORRT),
    "no driver": Machine("no NVIDIA driver", DOCTOR, (("FAKE_CUDA_FAIL", "no_driver"),)),
    "an old driver": Machine("the NVIDIA driver knows CUDA 12", DOCTOR, (("FAKE_CUDA_FAIL", "old_driver"),)),
    "no GPU": Machine("no NVIDIA GPU can be used", DOCTOR, (("FAKE_CUDA_FAIL", "no_device"),)),
}


@pytest.mark.parametrize("name", MACHINES)
def test_another_machine(name: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = MACHINES[name]
    for variable, value in machine.variables:
        monkeypatch.setenv(variable, value)
    if machine.tensorrt == NO_TENSORRT:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
    elif machine.tensorrt:
        monkeypatch.setattr(sys.modules["tensorrt"], "__version__", machine.tensorrt)
    code, said = generate(bundle)
    assert code == 1
    assert "the bundle cannot run here" in said
    assert machine.says in said
    assert machine.hint in said
    assert "Traceback" not in said


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("verify", ["--verify", "--no-verify"])
@pytest.mark.parametrize("name", ["engine.plan", "engine.json", "graph.onnx"])
@pytest.mark.parametrize("damage", [truncated, flipped])
def test_a_changed_engine_is_never_opened(bundle: Path, damage: Callable[[Path], None], name: str, verify: str) -> None:
    damage(bundle / "engines" / "denoiser" / "1x64x64" / name)
    code, said = generate(bundle, *([] if verify == "--verify" else [verify]))
    assert code == 1
    assert "a file of the bundle was changed" in said
    assert name in said


def test_a_bundle_from_elsewhere_needs_a_signature(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFBUILD_CACHE", str(tmp_path / "of somebody else"))
    monkeypatch.delenv("DIFFBUILD_TRUST", raising=False)
    code, said = generate(bundle)
    assert code == 1
    assert "the bundle's engines are machine code, and nobody vouches for it" in said
    assert "diffbuild sign BUNDLE --key private.pem" in said
    keys = write_pair(tmp_path / "keys", Ed25519PrivateKey.generate())
    assert CliRunner().invoke(cli, ["sign", str(bundle), "--key", str(keys.private)]).exit_code == 0
    assert generate(bundle)[0] == 1  # signed by somebody, whom nobody trusts
    assert generate(bundle, "--trust", keys.public)[0] == 0


def test_a_rewritten_manifest_is_not_one_that_was_built_here(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest["recipe"]["sampling"].update(steps=3))
    code, said = generate(bundle)
    assert code == 1
    assert "nobody vouches for it" in said


def test_a_build_with_nothing_to_do_vouches_for_no_other_bundle(
    bundle: Path, built: Path, tiny_model: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle from elsewhere may name the keys of this store's artifacts, and hold what it likes."""
    monkeypatch.setenv("DIFFBUILD_CACHE", str(tmp_path / "cache"))
    name = "engines/denoiser/1x64x64/engine.plan"
    honest = (bundle / name).read_bytes()
    (bundle / name).write_bytes(b"evil")
    evil = {"sha256": hashlib.sha256(b"evil").hexdigest(), "size": 4}
    edit_manifest(bundle, lambda manifest: manifest["files"].update({name: evil}))
    assert generate(bundle)[0] == 1
    toolchain.build(built.parent / "refused.toml", str(tiny_model), bundle, store=store)
    assert (bundle / name).read_bytes() == honest
    assert generate(bundle)[0] == 0


def test_a_pipeline_over_a_bundle_that_was_only_read(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `load` asks is asked below it as well."""
    flipped(bundle / "engines" / "denoiser" / "1x64x64" / "engine.plan")
    with pytest.raises(BundleError, match="a file of the bundle was changed"):
        Pipeline(toolchain.read_bundle(bundle))
    monkeypatch.setenv("DIFFBUILD_CACHE", str(tmp_path / "of somebody else"))
    with pytest.raises(SignatureError, match="nobody vouches for it"):
        Pipeline(toolchain.read_bundle(bundle))


def test_a_build_whose_cache_cannot_be_written_says_what_that_means(
    tiny_model: Path, store: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFBUILD_CACHE", str(tmp_path / "file"))
    toolchain.build(built.parent / "refused.toml", str(tiny_model), tmp_path / "bundle", store=store)
    assert any("it cannot be noted as built here" in message for message in caplog.messages)


def test_too_little_memory_for_an_engine(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT allocates weights and contexts itself, and tells of a failure in its log alone."""
    trt = sys.modules["tensorrt"]

    def refuse(runtime: object, plan: object) -> None:
        runtime.logger.log(
            trt.ILogger.Severity.ERROR, "Error Code 2: OutOfMemory (Requested size was 34359738368 bytes.)"
        )

    from cuda.bindings import runtime

    before = runtime._live()
    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", refuse)
    with pytest.raises(EngineError, match=r"OutOfMemory(.|\n)*open_buckets=1"):
        toolchain.load(built)
    assert runtime._live() == before
