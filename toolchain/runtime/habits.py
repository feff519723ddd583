"""diffusers' names of options: accepted where they mean the same here, else refused with our name for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolchain.errors import RequestError

SAME = {
    "guidance_scale": "guidance",
    "num_inference_steps": "steps",
    "true_cfg_scale": "true_cfg",
    "crops_coords_top_left": "crop_top_left",
    "negative_crops_coords_top_left": "negative_crop_top_left",
}
DEFAULTS: dict[str, tuple[object, ...]] = {
    "output_type": ("pil",),
    "num_images_per_prompt": (1,),
    "eta": (0, 0.0),
    "return_dict": (True,),
    "callback_on_step_end_tensor_inputs": (["latents"],),
    "cross_attention_kwargs": ({},),
    "joint_attention_kwargs": ({},),
    "aesthetic_score": (6.0,),
    "negative_aesthetic_score": (2.5,),
    "skip_layer_guidance_scale": (2.8,),
    "skip_layer_guidance_stop": (0.2,),
    "skip_layer_guidance_start": (0.01,),
}
"""Values that change nothing, and are ignored; None always means not given."""
OURS = {
    "output_type": "result.images are PIL images, np.asarray(image) arrays; decode=False leaves the latents alone",
    "num_images_per_prompt": "repeat the prompt, as in [prompt] * 4; a single seed counts up over the pictures",
    "eta": "it is an option of the scheduler: scheduler='ddim:eta=0.5'",
    "return_dict": "a call returns a Result; its pictures are result.images",
    "callback_on_step_end": "callback=f is called as f(progress): progress.index, progress.timestep, progress.latents",
    "callback_on_step_end_tensor_inputs": "progress.latents are there in every callback",
    "max_sequence_length": "it is fixed when a bundle is built: components.text_encoder_2.tokens (FLUX) or "
    "components.text_encoder_3.tokens (SD3) of the recipe",
    "cross_attention_kwargs": "a LoRA is fused into the model before it is built",
    "joint_attention_kwargs": "a LoRA is fused into the model before it is built",
    "denoising_start": "SDXL's refiner is not supported; to start from a picture: image and strength",
    "denoising_end": "SDXL's refiner is not supported",
    "aesthetic_score": "SDXL's refiner is not supported",
    "negative_aesthetic_score": "SDXL's refiner is not supported",
    "skip_guidance_layers": "guidance that skips layers is not supported",
    "skip_layer_guidance_scale": "guidance that skips layers is not supported",
    "skip_layer_guidance_stop": "guidance that skips layers is not supported",
    "skip_layer_guidance_start": "guidance that skips layers is not supported",
    "mu": "the shift of the schedule follows from the scheduler's config and the size",
    "mask_image": "inpainting is not supported",
    "control_image": "ControlNet is not supported",
    "ip_adapter_image": "IP-Adapter is not supported",
    "negative_ip_adapter_image": "IP-Adapter is not supported",
}


def translate(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by our names, without those that are None or change nothing; names of neither stay as they are.

    RequestError with our name for it where diffusers' name cannot be taken as it is, and for an option given twice.
    """
    ours: dict[str, Any] = {}
    for name, value in options.items():
        if value is None or any(type(value) is type(d) and value == d for d in DEFAULTS.get(name, ())):
            continue
        hint = _hint(name, value)
        if hint is not None:
            raise RequestError(f"diffusers' {name} is another thing here", got=f"{name}={value!r}"[:200], hint=hint)
        ours_name = SAME.get(name, name)
        if ours_name in ours:
            got = " and ".join(_both(ours_name, options))
            raise RequestError(f"{ours_name} is given twice", expected="one of them", got=got)
        ours[ours_name] = value
    return _with_size(ours)


def _hint(name: str, value: Any) -> str | None:
    if name == "generator":
        given = value if isinstance(value, list | tuple) else [value]
        seeds = [g.initial_seed() if hasattr(g, "initial_seed") else 0 for g in given]
        seed = seeds[0] if len(seeds) == 1 else seeds
        return f"seed={seed} starts a generator for each picture that draws what torch's draws on the CPU"
    if name.endswith("_embeds"):
        return "the text encoders are part of the bundle: give the prompt itself"
    return OURS.get(name)


def _both(ours: str, options: Mapping[str, Any]) -> list[str]:
    return [name for name in options if SAME.get(name, name) == ours]


def _with_size(options: dict[str, Any]) -> dict[str, Any]:
    sides = [options.pop(side, None) for side in ("height", "width")]
    if sides == [None, None]:
        return options
    if None in sides or "size" in options:
        got = [f"{name}={side}" for name, side in zip(("height", "width"), sides, strict=True) if side is not None]
        got += [f"size={options['size']}"] if "size" in options else []
        raise RequestError(
            "height and width go together, and take the place of size",
            expected="size=(height, width)",
            got=", ".join(got),
        )
    return options | {"size": tuple(sides)}
