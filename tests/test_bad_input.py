"""What a user can get wrong, in one table: each is told with an exit code, what and where it is, and what to do.

Nothing that was there before may change: not the model, the recipe, an older bundle or picture, nor the store.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import toolchain
from tests.manifests import edit_manifest
from tests.test_plan import own_store
from toolchain.cli.main import cli
from toolchain.errors import RequestError
from toolchain.store.artifacts import Store

__all__ = ["own_store"]

PROMPT = "a red circle"
UNET = "unet/diffusion_pytorch_model.safetensors"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@dataclass(frozen=True)
class World:
    """Everything that a command may touch, and that a wrong input must leave alone."""

    root: Path
    recipe: Path
    model: Path
    bundle: Path
    picture: Path
    store: Path

    def build(self, *options: object, **given: object) -> list[object]:
        args = {"model": self.model, "store": self.store, "output": self.bundle, **given}
        return ["build", self.recipe, *options, *(x for k, v in args.items() for x in (f"--{k}", v))]

    def generate(self, *options: object, output: Path | None = None) -> list[object]:
        return ["generate", self.bundle, PROMPT, "--seed", 0, *options, "--output", output or self.picture]

    def snapshot(self) -> dict[str, str]:
        """Digest of every file, link and folder of the world, and the artifacts of the store."""
        found = {str(p): _identity(p) for p in sorted(self.root.rglob("*")) if ".locks" not in p.parts}
        artifacts = {f"{a.stage}/{a.key}": "artifact" for a in Store(self.store).artifacts()}
        bundles = self.store / ".bundles.json"
        return {**found, **artifacts, "bundles": bundles.read_text() if bundles.exists() else ""}


def _identity(path: Path) -> str:
    if path.is_symlink():
        return f"link {os.readlink(path)}"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path, tiny_recipe: Path, tiny_bundle: Path, own_store: Path) -> World:
    root = tmp_path / "world"
    root.mkdir()
    recipe = Path(shutil.copy(tiny_recipe, root / "tiny.toml"))
    picture = root / "old.png"
    picture.write_bytes(b"an older picture")
    model = Path(shutil.copytree(tiny_model, root / "model"))
    return World(root, recipe, model, Path(shutil.copytree(tiny_bundle, root / "bundle")), picture, own_store)


# --- how to damage things ---------------------------------------------------------------------------------------------

Prepare = Callable[[World], list[object]]


def recipe_with(old: str, new: str) -> Prepare:
    def prepare(w: World) -> list[object]:
        text = w.recipe.read_text()
        assert old in text
        w.recipe.write_text(text.replace(old, new))
        return w.build()

    return prepare


def model_json(name: str, change: Callable[[dict[str, Any]], object]) -> Prepare:
    def prepare(w: World) -> list[object]:
        edit_json(w.model / name, change)
        return w.build()

    return prepare


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def model_file(change: Callable[[World], object]) -> Prepare:
    def prepare(w: World) -> list[object]:
        change(w)
        return w.build()

    return prepare


def bundle_file(change: Callable[[World], object], command: str = "generate") -> Prepare:
    def prepare(w: World) -> list[object]:
        change(w)
        return w.generate() if command == "generate" else [command, w.bundle]

    return prepare


def manifest(change: Callable[[dict[str, Any]], object]) -> Prepare:
    return bundle_file(lambda w: edit_manifest(w.bundle, change))


def request(*options: object, **given: Any) -> Prepare:
    return lambda w: w.generate(*options, **given)


def to_shards(w: World) -> None:
    index = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (w.model / UNET).unlink()
    (w.model / f"{UNET}.index.json").write_text(json.dumps(index))


def rewrite_header(w: World, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the header of the UNet's weights; the data follow it as they were."""
    path = w.model / UNET
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def rename(header: dict[str, Any]) -> None:
    header["conv_in.wait"] = header.pop("conv_in.weight")


def reshape(header: dict[str, Any]) -> None:
    header["conv_in.weight"]["shape"] = header["conv_in.weight"]["shape"][::-1]


def only_pickles(w: World) -> None:
    (w.model / UNET).rename(w.model / "unet" / "diffusion_pytorch_model.bin")


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def nan_weight(w: World) -> None:
    (length,) = struct.unpack("<Q", (w.model / UNET).read_bytes()[:8])
    overwrite(w.model / UNET, 8 + length, np.float32(np.nan).tobytes())


def flip_byte(w: World) -> None:
    path = w.bundle / "engines/denoiser/weights.safetensors"
    overwrite(path, path.stat().st_size // 2, bytes([path.read_bytes()[path.stat().st_size // 2] ^ 1]))


def link_outside(w: World) -> None:
    path = w.bundle / "engines/denoiser/weights.safetensors"
    path.rename(w.root / "elsewhere.safetensors")
    path.symlink_to(w.root / "elsewhere.safetensors")


def link_inside(w: World) -> None:
    path = w.bundle / "engines/denoiser/weights.safetensors"
    path.rename(path.with_name("other.safetensors"))
    path.symlink_to("other.safetensors")


def add_file(name: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["files"][name] = {"sha256": "0" * 64, "size": 1}

    return change


def thresholding(w: World) -> list[object]:
    edit_manifest(w.bundle, lambda d: d["settings"]["scheduler"].update(thresholding=True))
    return w.generate("--scheduler", "dpm++2m")


def other_folder(w: World) -> list[object]:
    (w.root / "photos").mkdir()
    (w.root / "photos" / "a.jpg").write_text("a")
    return w.build(output=w.root / "photos")


def file_in_the_bundle(w: World) -> list[object]:
    (w.bundle / "notes.txt").write_text("years of work")
    return w.build()


def five_block_vae(w: World) -> list[object]:
    edit_json(w.model / "vae/config.json", lambda c: c.update(block_out_channels=[16, 16, 32, 32, 32]))
    w.recipe.write_text(w.recipe.read_text().replace("2x64x96", "2x64x72"))
    return w.build()


def damaged_bundle_list(w: World) -> list[object]:
    own = w.root / "store"
    own.mkdir()
    (own / ".bundles.json").write_text("{")
    return ["cache", "gc", "--store", own]


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """name; how to prepare the world, giving the arguments; the exit code; parts of the message; part of the hint."""

    name: str
    prepare: Prepare
    code: int
    parts: tuple[str, ...]
    hint: str | None = None
    marks: tuple[pytest.MarkDecorator, ...] = ()


RECIPES = [
    Case(
        "missing recipe",
        lambda w: ["build", w.root / "none.toml", "--model", w.model, "--output", w.bundle],
        2,
        ("the recipe cannot be read", "none.toml", "No such file"),
        "recipes nearby: ",
    ),
    Case(
        "recipe is a folder",
        lambda w: ["plan", w.root, "--model", w.model, "--store", w.store],
        2,
        ("the recipe cannot be read", "Is a directory"),
        "tiny.toml",
    ),
    Case("recipe is not TOML", recipe_with("[sampling]", "[sampling"), 2, ("the recipe is not TOML", "tiny.toml:4")),
    Case("unknown key", recipe_with("family", "famly"), 2, ("famly: unknown key, did you mean 'family'?", "tiny.toml")),
    Case("wrong type", recipe_with("steps = 4", 'steps = "4"'), 2, ("sampling.steps: wrong type", "got '4'")),
    Case(
        "several problems at once",
        recipe_with("guidance = 5.0", 'guidance = -1\nstps = 4\nscheduler2 = ""'),
        2,
        ("3 problems", "sampling.guidance: out of range", "sampling.stps: unknown key", "scheduler2"),
    ),
    Case("bucket not in eights", recipe_with("2x64x96", "2x64x90"), 2, ("buckets[1]: not a multiple of 8",)),
    Case("bucket against the VAE", five_block_vae, 2, ("2x64x72 has sides that are no multiples of 16",)),
    Case("duplicate bucket", recipe_with("2x64x96", "1x64x64"), 2, ("buckets[1]: duplicate", "'1x64x64'")),
    Case(
        "unknown scheduler in the recipe",
        recipe_with('"euler-a"', '"eulr"'),
        2,
        ("no scheduler is called 'eulr'", "did you mean euler?"),
        None,
    ),
    Case(
        "unknown component",
        recipe_with("[check]", '[components.unet]\ndtype = "float16"\n\n[check]'),
        2,
        ("components.unet: unknown component", "denoiser"),
    ),
    Case(
        "unknown backend",
        recipe_with("[sampling]", 'backend = "onnxrt"\n[sampling]'),
        2,
        ("onnxrt",),
        "diffbuild doctor",
    ),
    Case("unknown family", recipe_with('"sd"', '"sdd"'), 1, ("unknown family", "sdd", "sd"), None),
]

MODELS = [
    *(
        Case(
            f"no model at {path}",
            lambda w, path=path: w.build(model=path.replace("ROOT", str(w.root))),  # type: ignore[misc]
            1,
            ("no such folder or file", "a diffusers folder, or a .safetensors file"),
            "check the spelling",
        )
        for path in (
            "ROOT/none",
            "ROOT/no/model",
            "./none",
            "../none",
            "~/none-of-this-name/model",
            "none/",
            "owner/name/",
            "none.safetensors",
            "owner/name.safetensors",
            "owner/name/unet",
            "tests/no-model-of-this-name",  # where the tests run, the folder `tests` is
        )
    ),
    Case("model without a name", lambda w: w.build(model="none"), 1, ("no such model", "owner/name"), "check --model"),
    Case(
        "hub id without a network",
        lambda w: w.build(model="nobody/nothing-of-this-name"),
        1,
        ("nobody/nothing-of-this-name", "cannot be reached"),
        "HF_HUB_OFFLINE",
    ),
    Case(
        "model is a file, and no network",
        lambda w: w.build(model=w.model / UNET),
        1,
        ("single file cannot be had", "the hub's stable-diffusion-v1-5"),
        "--config DIR",
    ),
    Case(
        "no model_index.json",
        model_file(lambda w: (w.model / "model_index.json").unlink()),
        1,
        ("model_index.json is missing",),
        "download it again",
    ),
    Case(
        "model_index.json is not JSON",
        model_file(lambda w: (w.model / "model_index.json").write_text("<html>")),
        1,
        ("model_index.json cannot be read",),
    ),
    Case(
        "unknown pipeline class",
        model_json("model_index.json", lambda d: d.update(_class_name="StableDifusionPipelin")),
        1,
        ("StableDifusionPipelin is not supported", "expected: one of "),
        "StableDiffusionPipeline",
    ),
    Case(
        "pipeline of its own code",
        model_json("model_index.json", lambda d: d.update(_class_name=["pipeline", "Mine"])),
        1,
        ("its own code, which is not run", "Mine"),
    ),
    Case(
        "component of its own code",
        model_json("model_index.json", lambda d: d.update(unet=["mine", "UNet"])),
        1,
        ("the unet needs code from outside", "mine"),
        "drop the component",
    ),
    Case("missing component", model_json("model_index.json", lambda d: d.pop("vae")), 1, ("the model has no vae",)),
    Case(
        "missing config of the UNet",
        model_file(lambda w: (w.model / "unet/config.json").unlink()),
        1,
        ("config.json is missing from the model", "unet"),
        "download it again",
    ),
    Case(
        "config without a key",
        model_json("vae/config.json", lambda d: d.pop("latent_channels")),
        1,
        ("vae/config.json", "latent_channels"),
        None,
    ),
    Case("inpainting UNet", model_json("unet/config.json", lambda d: d.update(in_channels=9)), 1, ("inpainting", "9")),
    Case(
        "missing weights",
        model_file(lambda w: (w.model / UNET).unlink()),
        1,
        ("there are no weights", "unet"),
        "download the model again",
    ),
    Case(
        "half-downloaded weights",
        model_file(lambda w: truncate(w.model / UNET, 500_000)),
        1,
        ("a tensor lies beyond the end of the file", "unet"),
        "download the file again",
    ),
    Case(
        "header is not JSON",
        model_file(lambda w: overwrite(w.model / UNET, 8, b"\xff" * 16)),
        1,
        ("the header of the weight file is not JSON", "unet"),
        "download the file again",
    ),
    Case(
        "header longer than the file",
        model_file(lambda w: overwrite(w.model / UNET, 0, struct.pack("<Q", 1 << 40))),
        1,
        ("truncated, or not a safetensors file", str(1 << 40)),
        "download the file again",
    ),
    Case("only pickles", model_file(only_pickles), 1, ("pickles, which are not opened", ".bin"), "safe_serialization"),
    Case("missing shard", model_file(to_shards), 1, ("a shard is missing", "00001-of-00002"), "download it again"),
    Case(
        "missing tensor",
        model_file(lambda w: rewrite_header(w, rename)),
        1,
        ("conv_in.weight: missing; the nearest is conv_in.wait",),
        "belong together",
    ),
    Case(
        "tensor of another shape",
        model_file(lambda w: rewrite_header(w, reshape)),
        1,
        ("conv_in.weight: expected shape [32, 4, 3, 3], got [3, 3, 4, 32]",),
        "belong together",
    ),
    Case("weight that is no number", model_file(nan_weight), 1, ("infinite or NaN in the checkpoint",)),
]

BUNDLES = [
    Case(
        "bundle is not there",
        bundle_file(lambda w: shutil.rmtree(w.bundle)),
        1,
        ("not a bundle", "no such folder"),
        "build",
    ),
    Case(
        "not a bundle",
        bundle_file(lambda w: (w.bundle / "bundle.json").unlink()),
        1,
        ("not a bundle",),
        "diffbuild build",
    ),
    Case(
        "changed byte", bundle_file(flip_byte), 1, ("was changed", "weights.safetensors", "sha256"), "build the bundle"
    ),
    Case(
        "missing file",
        bundle_file(lambda w: (w.bundle / "samplers/euler.json").unlink()),
        1,
        ("a file of the bundle is missing", "euler.json"),
        "copy it again",
    ),
    Case(
        "truncated file",
        bundle_file(lambda w: truncate(w.bundle / "engines/denoiser/weights.safetensors", 1000)),
        1,
        ("was changed", "got: 1000 bytes"),
        "copy it again",
    ),
    Case(
        "newer format", manifest(lambda d: d.update(format=99)), 1, ("a newer format", "format 99"), "update diffbuild"
    ),
    Case("older format", manifest(lambda d: d.update(format=0)), 1, ("an older format",), "build the bundle again"),
    Case(
        "manifest is not JSON",
        bundle_file(lambda w: (w.bundle / "bundle.json").write_text("{")),
        1,
        ("bundle.json cannot be read",),
        "build the bundle again",
    ),
    Case(
        "manifest lacks a field",
        manifest(lambda d: d.pop("engines")),
        1,
        ("bundle.json is damaged", "engines"),
        "build the bundle again",
    ),
    Case(
        "manifest without a denoiser",
        manifest(lambda d: d["engines"].pop("denoiser")),
        1,
        ("bundle.json is damaged", "denoiser"),
        "build the bundle again",
    ),
    Case(
        "manifest without a text encoder",
        manifest(lambda d: d["engines"].pop("text_encoder")),
        1,
        ("the bundle has no such engine", "text_encoder"),
        "build the bundle again",
    ),
    Case(
        "extra file in an engine's folder",
        bundle_file(lambda w: (w.bundle / "engines/denoiser/1x64x64/more.bin").write_text("x")),
        1,
        ("does not list", "more.bin"),
        "move it",
    ),
    Case("path above the bundle", manifest(add_file("../x")), 1, ("leaves the bundle", "../x")),
    Case("absolute path", manifest(add_file("/etc/passwd")), 1, ("leaves the bundle", "/etc/passwd")),
    Case("link out of the bundle", bundle_file(link_outside), 1, ("leaves the bundle", "weights.safetensors")),
    Case("link in the bundle", bundle_file(link_inside), 1, ("weights.safetensors", "a regular file"), "copy it again"),
    Case(
        "other device",
        manifest(lambda d: d["device"].update(cpu="riscv64")),
        1,
        ("cannot run here", "built on riscv64, this machine is "),
        "build it on this machine",
    ),
    Case(
        "other onnxruntime",
        manifest(lambda d: d["device"].update(onnxruntime="0.9.1")),
        1,
        ("built with onnxruntime 0.9.1, this machine has ", "hint: pip install onnxruntime"),
        "==0.9.1",
    ),
    Case(
        "unknown backend in a bundle",
        manifest(lambda d: d.update(backend="x")),
        2,
        ("unknown backend",),
        "diffbuild doctor",
    ),
    Case("inspect no bundle", lambda w: ["inspect", w.model], 1, ("not a bundle",), "diffbuild build"),
    Case("check no bundle", lambda w: ["check", w.model, "--model", w.model], 1, ("not a bundle",), "diffbuild build"),
    Case(
        "inspect --verify of a changed bundle",
        lambda w: (flip_byte(w), ["inspect", w.bundle, "--verify"])[1],
        1,
        ("was changed",),
        "build the bundle",
    ),
]

REQUESTS = [
    Case(
        "no prompt", lambda w: ["generate", w.bundle], 2, ("Missing argument 'PROMPT...'",), "diffbuild generate --help"
    ),
    Case("prompt is no text", lambda w: ["generate", w.bundle, "\udcff", "-o", w.picture], 2, ("not valid Unicode",)),
    Case("zero steps", request("--steps", 0), 2, ("'--steps'", "0 is not in the range"), "diffbuild generate --help"),
    Case("too many steps", request("--steps", 100_000), 2, ("steps is not a number of steps", "100000")),
    Case(
        "negative seed", request("--seed", -1), 2, ("'--seed'", "-1 is not in the range"), "diffbuild generate --help"
    ),
    Case("seed too large", request("--seed", 2**64), 2, ("'--seed'", "not in the range"), "diffbuild generate --help"),
    Case("size not built", request("--size", "48x64"), 2, ("no engine", "1x64x64, 2x64x96", "got: 48x64"), "--crop"),
    Case(
        "size too large", request("--size", "512x512", "--crop"), 2, ("1x64x64, 2x64x96", "512x512"), "add the bucket"
    ),
    Case(
        "malformed size",
        request("--size", "64"),
        2,
        ("'64' is not HEIGHTxWIDTH", "512x768"),
        "diffbuild generate --help",
    ),
    Case(
        "negative size", request("--size", "-64x64"), 2, ("'-64x64' is not HEIGHTxWIDTH",), "diffbuild generate --help"
    ),
    Case(
        "unknown scheduler",
        request("--scheduler", "eulr"),
        2,
        ("no scheduler is called 'eulr'",),
        "did you mean euler?",
    ),
    Case("scheduler with a wrong option", request("--scheduler", "ddim:eta=7"), 2, ("eta", "a number from 0 to 1")),
    Case("nonlinear scheduler", thresholding, 1, ("which is not linear",), "another scheduler"),
    Case(
        "scheduler of another family",
        request("--scheduler", "flow-euler"),
        1,
        ("is for flow models", "expected: one of"),
    ),
    Case("guidance is no number", request("--guidance", "nan"), 2, ("guidance is not a number", "nan")),
    Case(
        "output in a missing folder",
        lambda w: w.generate(output=w.root / "none" / "a.png"),
        2,
        ("the folder of the output is missing", "none"),
        "mkdir -p",
    ),
    Case("image is missing", request("--image", "none.png"), 2, ("the image cannot be read", "none.png")),
    Case("image is no image", lambda w: w.generate("--image", w.model / "model_index.json"), 2, ("cannot be read",)),
    Case("aspect is no ratio", request("--aspect", "wide"), 2, ("'wide' is not WIDTH:HEIGHT",)),
    Case("strength without image", request("--strength", "0.5"), 2, ("strength is for image to image",)),
    Case("second prompt of one encoder", request("--prompt-2", "a"), 2, ("no text encoder for prompt_2",)),
    Case(
        "component that cannot be left out",
        recipe_with("[sampling]", 'without = ["denoiser"]\n[sampling]'),
        2,
        ("without: denoiser cannot be left out (expected vae_encoder)",),
    ),
    Case("output is a folder", lambda w: w.generate(output=w.root), 2, ("the output is a folder",), "a.png"),
    Case("output is no PNG", lambda w: w.generate(output=w.root / "a.jpg"), 2, ("written as PNG", "ends in .png")),
    Case(
        "report in a missing folder",
        lambda w: ["check", w.bundle, "--model", w.model, "--report", w.root / "none/a.json"],
        2,
        ("the folder of the output is missing",),
        "mkdir -p",
    ),
]

PLACES = [
    Case("bundle onto other files", other_folder, 2, ("holds other files, not a bundle", "photos"), "an empty folder"),
    Case(
        "bundle with other files in it",
        file_in_the_bundle,
        2,
        ("holds other files beside the bundle", "notes.txt"),
        "move them elsewhere",
    ),
    Case("bundle onto a file", lambda w: w.build(output=w.picture), 2, ("the output cannot be written", "old.png")),
    Case(
        "bundle below a file",
        lambda w: w.build(output=w.picture / "b"),
        2,
        ("the output cannot be written", "old.png"),
        "give a path in a folder that you may write to",
    ),
    Case(
        "store is a file", lambda w: w.build(store=w.picture), 2, ("'--store'", "is a file"), "diffbuild build --help"
    ),
    Case(
        "store below a file",
        lambda w: w.build(store=w.picture / "s", output=w.root / "b"),
        1,
        ("old.png", "Not a directory"),
        "a file lies where a folder is needed",
    ),
    Case(
        "store that cannot be written",
        lambda w: w.build(store="/proc/diffbuild", output=w.root / "b"),
        1,
        ("/proc/diffbuild",),
        None,
        (LINUX,),
    ),
    Case(
        "bundle where nothing can be written",
        lambda w: w.build(output="/proc/diffbuild/b"),
        1,
        ("cannot write a folder", "/proc/diffbuild"),
        None,
        (LINUX,),
    ),
    Case(
        "damaged list of bundles",
        damaged_bundle_list,
        1,
        ("the list of bundles is damaged",),
        "build each bundle again",
    ),
    Case(
        "negative age",
        lambda w: ["cache", "gc", "--min-age", -1, "--store", w.store],
        2,
        ("'--min-age'",),
        "cache gc --help",
    ),
]

CASES = [*RECIPES, *MODELS, *BUNDLES, *REQUESTS, *PLACES]


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name.replace(" ", "-"), marks=c.marks) for c in CASES])
def test_bad_input(case: Case, world: World) -> None:
    arguments = [str(a) for a in case.prepare(world)]
    before = world.snapshot()
    result = CliRunner().invoke(cli, arguments, prog_name="diffbuild")
    assert world.snapshot() == before
    assert result.exit_code == case.code, result.output
    assert "Traceback" not in result.output
    assert "this is a bug" not in result.output
    told = result.stderr
    assert result.stdout == ""
    assert "error: " in told
    for part in case.parts:
        assert part in told, told
    hint = told.rpartition("\n  hint: ")[2] if "\n  hint: " in told else None
    if case.hint is not None:
        assert hint is not None, told
        assert case.hint in hint, told


@pytest.mark.parametrize("case", [RECIPES[0], BUNDLES[0], REQUESTS[2], PLACES[0]], ids=lambda case: case.name)
def test_bad_input_as_json(case: Case, world: World) -> None:
    result = CliRunner().invoke(cli, [*map(str, case.prepare(world)), "--json"], prog_name="diffbuild")
    assert result.exit_code == case.code
    document = json.loads(result.stdout)
    assert document["schema"] == 1
    assert set(document["error"]) == {"what", "where", "expected", "got", "hint"}
    assert f"error: {document['error']['what']}" in result.stderr


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


IMAGE = np.zeros((64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("prompt", "settings", "part"),
    [
        ([], {}, "empty list"),
        (7, {}, "prompt is not text"),
        (PROMPT, {"steps": 0}, "steps is not a number of steps"),
        (PROMPT, {"steps": 4.0}, "steps is not a number of steps"),
        (PROMPT, {"seed": -1}, "seed is not valid"),
        (PROMPT, {"seed": 2**64}, "seed is not valid"),
        (PROMPT, {"seed": True}, "seed is not valid"),
        (PROMPT, {"seed": [1, 2]}, "as many seeds as prompts"),
        (PROMPT, {"size": (64.0, 64.0)}, "size is not a size"),
        (PROMPT, {"size": [64, 64, 64]}, "size is not a size"),
        (PROMPT, {"guidance": float("inf")}, "guidance is not a number"),
        (PROMPT, {"guidance": "5"}, "guidance is not a number"),
        (PROMPT, {"negative_prompt": ["a", "b"]}, "as many negative prompts"),
        (PROMPT, {"latents": np.zeros((1, 4, 3, 3), np.float32)}, "latents have another shape"),
        (PROMPT, {"negativ_prompt": "a"}, "did you mean negative_prompt?"),
        (PROMPT, {"prompt_2": "a"}, "no text encoder for prompt_2"),
        (PROMPT, {"negative_prompt_2": "a"}, "no text encoder for negative_prompt_2"),
        (PROMPT, {"clip_skip": 3}, "an integer from 0 to 2"),
        (PROMPT, {"clip_skip": True}, "clip_skip is not a number of layers"),
        (PROMPT, {"guidance_rescale": 1.5}, "guidance_rescale is out of range"),
        (PROMPT, {"true_cfg": 2.0}, "no true classifier-free guidance"),
        (PROMPT, {"original_size": (64, 64)}, "not conditioned on sizes"),
        (PROMPT, {"size": (64, 64), "aspect": 1.0}, "exclude each other"),
        (PROMPT, {"aspect": 0.0}, "aspect is out of range"),
        (PROMPT, {"strength": 0.5}, "strength is for image to image"),
        (PROMPT, {"image": IMAGE, "strength": 0.1}, "leaves no step to run"),
        (PROMPT, {"image": IMAGE, "strength": 1.1}, "strength is out of range"),
        (PROMPT, {"image": IMAGE.astype(np.float32)}, "image is not an image"),
        (PROMPT, {"image": [IMAGE, IMAGE]}, "as many images as prompts"),
        (PROMPT, {"image": IMAGE, "latents": np.zeros((1, 4, 8, 8), np.float32)}, "exclude each other"),
        (PROMPT, {"image": IMAGE, "scheduler": "ddim-inverse"}, "cannot noise an image"),
    ],
)
def test_bad_request_in_python(tiny_bundle: Path, prompt: Any, settings: dict[str, Any], part: str) -> None:
    pipe = toolchain.load(tiny_bundle, warm_up=False)
    with pytest.raises(RequestError, match=part):
        pipe(prompt, **settings)
    pipe.close()
