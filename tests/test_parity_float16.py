"""Every family in float16, all of it, on the CPU: how far its pictures are from diffusers' in float32.

What the product refuses stays in float32: the VAE of SDXL, and the sums of T5's blocks. ONNX Runtime rounds what goes
in and out of its operators and widens in between, so that a GPU may differ more. The limits are some four decibels
below what was measured on tiny models, and say nothing about published ones.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity import Build, draw_with_diffusers, least_psnr_db
from tests.test_recipes import MODELS as MAKERS

PROMPTS, SEEDS, STEPS = ["a red circle on a white background", "a blue square"], [3, 9], 4
PIPELINES = {
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
}
SCHEDULERS = {"sd": "ddim", "sdxl": "model", "sd3": "model", "flux": "model"}
GUIDANCE = {"sd": 5.0, "sdxl": 5.0, "sd3": 4.5, "flux": 3.5}
T5 = {"sd3": "text_encoder_3", "flux": "text_encoder_2"}
T5_WIDE = '["encoder.block.*.layer.1.DenseReluDense.wo"]'
TOKENS = {"sd3": {"max_sequence_length": 24}, "flux": {"max_sequence_length": 24}}
LEAST_PSNR_DB = {"sd": 60.0, "sdxl": 58.0, "sd3": 56.0, "flux": 46.0}
"""Measured, the worse of both pictures: 63.9, 62.0, 59.9 and 49.7."""
RECIPE = """\
backend = "{backend}"
family = "{family}"
buckets = ["1x64x64"]
classifier_free_guidance = {guided}
[sampling]
scheduler = "model"
steps = 4
schedulers = ["{scheduler}"]
step_counts = [4]
{components}
[check]
prompts = ["a"]
"""


def recipe_of(family: str, dtype: str = "float16", backend: str = "onnxruntime") -> str:
    """All of a family in one type, as far as the type has the range for it."""
    from toolchain.models.registry import MODELS

    components = ""
    for component in MODELS[family].components:
        narrow = dtype == "float16"
        wide = narrow and family == "sdxl" and component.name.startswith("vae")
        own = "tokens = 24\n" if component.name == T5.get(family) else ""
        own += f"keep_float32 = {T5_WIDE}\n" if own and narrow else ""
        components += f'[components.{component.name}]\ndtype = "{"float32" if wide else dtype}"\n{own}'
    guided = "false" if family == "flux" else "true"
    return RECIPE.format(
        backend=backend, family=family, guided=guided, scheduler=SCHEDULERS[family], components=components
    )


@pytest.mark.parametrize("family", MAKERS)
def test_pictures(family: str, build: Build, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = MAKERS[family](tmp_path_factory.mktemp(f"half-{family}"))
    pipe = build(f"half-{family}", model, recipe_of(family))
    worst = []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        scheduler, guidance = SCHEDULERS[family], GUIDANCE[family]
        ours = pipe([prompt], seed=[seed], steps=STEPS, scheduler=scheduler, guidance=guidance).images
        asked: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": guidance, "height": 64, "width": 64}
        asked |= TOKENS.get(family, {})
        theirs = draw_with_diffusers(PIPELINES[family], model, [prompt], [seed], scheduler, **asked)
        worst.append(least_psnr_db(ours, theirs))
    pipe.close()
    # Equal would mean that nothing ran in float16.
    assert LEAST_PSNR_DB[family] <= min(worst) < 90
