"""What users of diffusers and numpy write: taken, or answered with our name for it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toolchain
from tests.parity import diffusers_pipeline, least_psnr_db, random_images
from toolchain.errors import RequestError
from toolchain.runtime.habits import DEFAULTS, OURS, SAME
from toolchain.runtime.request import Options

PROMPT = "a red circle on a white background"
RUN = {"seed": 3, "steps": 4, "guidance": 2.0, "size": (64, 96)}


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> toolchain.Pipeline:
    return toolchain.load(tiny_bundle, warm_up=False)


def asked(**options: Any) -> Options:
    return Options.of(PROMPT, **options)


class TorchGenerator:
    """As far as a caller of a pipeline can see one."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def initial_seed(self) -> int:
        return self._seed


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 2.0, "num_inference_steps": 4, "height": 64, "width": 96, "seed": 3},
        {"seed": np.int64(3), "steps": np.uint8(4), "guidance": np.float32(2), "size": np.array([64, 96])},
        {"seed": [np.int32(3)], "steps": np.array(4), "guidance": np.float64(2), "size": [np.int16(64), 96]},
        {"seed": np.array([3]), "steps": 4, "guidance": 2, "size": [64, 96], "clip_skip": np.int64(0)},
        RUN | {"output_type": "pil", "num_images_per_prompt": 1, "eta": 0.0, "return_dict": True},
        RUN | {"cross_attention_kwargs": {}, "generator": None},
        RUN | {"negative_prompt": None, "clip_skip": None, "callback": None, "prompt_embeds": None, "crop": None},
    ],
    ids=["diffusers", "scalars", "zero-dimensional", "arrays", "defaults", "empty", "none"],
)
def test_it_draws_the_same_picture(pipe: toolchain.Pipeline, options: dict[str, Any]) -> None:
    expected = pipe(PROMPT, **RUN)
    drawn = pipe(PROMPT, **options)
    assert np.array_equal(drawn.latents, expected.latents)
    assert drawn.request.size == (64, 96)
    assert {type(v) for v in (*drawn.request.size, *drawn.seeds, drawn.request.steps)} == {int}


def test_prompts_and_other_texts_from_numpy() -> None:
    options = Options.of(np.array(["a", "b"]), negative_prompt=np.str_("c"), crop_top_left=np.array([1, 2]))
    assert (options.prompt, options.negative_prompt, options.crop_top_left) == (["a", "b"], "c", [1, 2])
    assert type(options.negative_prompt) is str


@pytest.mark.parametrize("latents", [np.zeros((1, 4, 8, 8), np.float32)])
def test_arrays_stay_arrays(latents: np.ndarray) -> None:
    assert asked(latents=latents).latents is latents


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"generator": TorchGenerator(7)}, "seed=7 "),
        ({"generator": [TorchGenerator(7), TorchGenerator(8)]}, r"seed=\[7, 8\] "),
        ({"generator": []}, r"seed=\[\] "),
        ({"output_type": "latent"}, "decode=False"),
        ({"output_type": "np"}, r"np\.asarray"),
        ({"prompt_embeds": np.zeros((1, 2, 3))}, "give the prompt itself"),
        ({"negative_pooled_prompt_embeds": np.zeros((1, 2, 3))}, "give the prompt itself"),
        ({"num_images_per_prompt": 4}, r"\[prompt\] \* 4"),
        ({"eta": 0.5}, "ddim:eta=0.5"),
        ({"callback_on_step_end": print}, "callback=f"),
        ({"max_sequence_length": 256}, r"components\.text_encoder_2\.tokens"),
        ({"guidance_scale": 2.0, "guidance": 3.0}, "guidance is given twice"),
        ({"height": 64}, "height and width go together"),
        ({"height": 64, "width": 64, "size": (64, 64)}, "height and width go together"),
        ({"num_inference_step": 4}, r"did you mean steps\?"),
    ],
)
def test_what_is_another_thing_here_is_answered(options: dict[str, Any], part: str) -> None:
    with pytest.raises(RequestError, match=part):
        asked(**options)


def test_a_callback_is_a_function(pipe: toolchain.Pipeline) -> None:
    with pytest.raises(RequestError, match="callback cannot be called"):
        pipe("a", callback=3)


def test_every_argument_of_diffusers_is_taken_or_answered() -> None:
    import diffusers

    known = {f.name for f in fields(Options)} | {"height", "width", "generator"} | SAME.keys() | OURS.keys()
    for family in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux"):
        for kind in ("", "Img2Img"):
            call = inspect.signature(getattr(diffusers, f"{family}{kind}Pipeline").__call__)
            names = {name for name in call.parameters if not name.endswith("_embeds")}
            assert names - known - {"self", "kwargs"} == set()
            for name in names & DEFAULTS.keys():
                asked(**{name: call.parameters[name].default})


def test_our_names_are_options() -> None:
    assert set(SAME.values()) <= {f.name for f in fields(Options)}
    assert DEFAULTS.keys() <= OURS.keys()


@pytest.mark.parametrize(
    ("given", "options", "part"),
    [
        ((None,), {}, "prompt is not text(.|\n)*None"),
        ((), {}, "prompt is not text"),
        (("a", "b"), {}, "options are given by name"),
        (("a",), {"prompt": "b"}, "options are given by name"),
    ],
)
def test_the_prompt_is_one_text_or_several(
    pipe: toolchain.Pipeline, given: tuple[Any, ...], options: dict[str, Any], part: str
) -> None:
    with pytest.raises(RequestError, match=part):
        pipe(*given, **options)


def test_editors_see_every_option() -> None:
    signature = inspect.signature(toolchain.Pipeline.__call__)
    assert list(signature.parameters) == ["self", *(f.name for f in fields(Options))]
    assert signature.parameters["steps"].default is None
    assert signature.parameters["prompt"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert signature.parameters["seed"].annotation == "int | Sequence[int] | None"
    assert signature.return_annotation == "Result"
    document = toolchain.Pipeline.__call__.__doc__
    assert all(f.name.rstrip("_23").removeprefix("negative_") in document for f in fields(Options))


def test_a_pipeline_is_a_context_and_says_what_it_is(tiny_bundle: Path) -> None:
    with toolchain.load(str(tiny_bundle), warm_up=False) as pipe:
        assert pipe.sizes == [(64, 64), (64, 96)]
        for part in ("tiny", "sd", "onnxruntime", "1x64x64, 2x64x96", str(tiny_bundle)):
            assert part in repr(pipe)
        assert "closed" not in repr(pipe)
        result = repr(pipe(["a", "b"], seed=5, steps=1, scheduler="euler"))
    for part in ("2 images", "64x64", "euler, 1 steps", "seeds [5, 6]"):
        assert part in result
    assert len(result) < 200
    assert "closed" in repr(pipe)
    with pytest.raises(RequestError, match="the pipeline is closed"):
        pipe("a")


def test_decode_draws_what_a_call_draws(pipe: toolchain.Pipeline) -> None:
    prompts = ["a red circle", "a blue square", "a background"]
    whole = pipe(prompts, seed=1, steps=4, size=(64, 96))
    latents = pipe(prompts, seed=1, steps=4, size=(64, 96), decode=False).latents
    assert latents.shape == (3, 4, 8, 12)
    decoded = pipe.decode(latents)
    assert all(np.array_equal(a, b) for a, b in zip(decoded, whole.images, strict=True))
    # The buffers that it went through start anew with every call.
    assert np.array_equal(pipe(prompts, seed=1, steps=4, size=(64, 96)).latents, latents)


def test_encode_is_the_mean_of_diffusers_encoder_and_with_a_seed_its_sample(
    pipe: toolchain.Pipeline, tiny_model: Path
) -> None:
    import torch

    images = random_images(3, 64, 96)
    vae = diffusers_pipeline(tiny_model, "StableDiffusionPipeline").vae
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    ours = pipe.encode(images)
    assert ours.dtype == np.float32
    assert np.abs(ours - posterior.mean.numpy() * vae.config.scaling_factor).max() < 1e-5
    noise = torch.cat([torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(9 + i)) for i in range(3)])
    sample = (posterior.mean + posterior.std * noise) * vae.config.scaling_factor
    assert np.abs(pipe.encode(images, seed=9) - sample.numpy()).max() < 1e-4
    assert pipe.encode(np.asarray(images[0]), size=[64, 64]).shape == (1, 4, 8, 8)


def test_there_and_back_is_what_the_vae_does(pipe: toolchain.Pipeline, tiny_model: Path) -> None:
    import torch

    (image,) = random_images(1, 64, 64)
    latents = pipe.encode(image)
    vae = diffusers_pipeline(tiny_model, "StableDiffusionPipeline").vae
    with torch.no_grad():
        decoded = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample
    theirs = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    assert least_psnr_db(pipe.decode(latents), theirs) >= 60


@pytest.mark.parametrize(
    ("use", "part"),
    [
        (lambda pipe: pipe.decode(np.zeros((1, 4, 3, 3), np.float32)), r"N x \(4, 8, 8\) or \(4, 8, 12\)"),
        (lambda pipe: pipe.decode(None), "latents have the wrong type or shape"),
        (lambda pipe: pipe.encode(None), "image is not an image"),
        (lambda pipe: pipe.encode(np.zeros((64, 64, 3), np.uint8), size=(8, 8)), "no engine was built for this size"),
        (lambda pipe: pipe.encode(np.zeros((64, 64, 3), np.uint8), seed=-1), "seed is not valid"),
    ],
)
def test_what_the_vae_cannot_take(pipe: toolchain.Pipeline, use: Any, part: str) -> None:
    with pytest.raises(RequestError, match=part):
        use(pipe)


def test_latents_of_torch_are_answered(pipe: toolchain.Pipeline) -> None:
    import torch

    with pytest.raises(RequestError, match=r"latents\.float\(\)\.numpy\(\)"):
        pipe(PROMPT, latents=torch.zeros(1, 4, 8, 8))


def test_the_package_lists_its_interface_and_its_version() -> None:
    from importlib.metadata import version

    assert toolchain.__version__ == version("diffbuild")
    public = {name for name in dir(toolchain) if not name.startswith("_")}
    assert public == set(toolchain.__all__) - {"__version__"}
    assert all(getattr(toolchain, name) is not None for name in dir(toolchain))


def test_the_name_that_pip_knows_is_the_same_interface() -> None:
    code = (
        "import sys, diffbuild; before = set(sys.modules); import toolchain; assert set(sys.modules) == before; "
        "assert not {'torch', 'numpy', 'onnxruntime'} & before; assert dir(diffbuild) == dir(toolchain); "
        "assert all(getattr(diffbuild, n) == getattr(toolchain, n) for n in toolchain.__all__); "
        "from diffbuild import load, Pipeline; assert Pipeline is toolchain.Pipeline"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_paths_may_be_text(tiny_bundle: Path, tiny_recipe: Path, tiny_model: Path, store: Path) -> None:
    assert toolchain.read_bundle(str(tiny_bundle)) == toolchain.read_bundle(tiny_bundle)
    assert toolchain.load_recipe(str(tiny_recipe)) == toolchain.load_recipe(tiny_recipe)
    assert toolchain.verify_bundle(str(tiny_bundle)).problems == ()
    as_text = toolchain.plan_build(str(tiny_recipe), str(tiny_model), store=str(store))
    as_paths = toolchain.plan_build(tiny_recipe, tiny_model, store=store)
    assert [step.name for step in as_text.steps] == [step.name for step in as_paths.steps]
    assert as_text.store.root == as_paths.store.root
