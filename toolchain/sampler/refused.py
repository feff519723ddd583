"""Settings of a scheduler that no table can reproduce, or that diffusers refuses: known without importing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolchain.errors import SamplerError

CONFIG = "scheduler/scheduler_config.json"
READERS: dict[str, frozenset[str]] = {
    "thresholding": frozenset(
        {
            "DDIMParallelScheduler",
            "DDIMScheduler",
            "DDPMParallelScheduler",
            "DDPMScheduler",
            "DEISMultistepScheduler",
            "DPMSolverMultistepInverseScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "EDMDPMSolverMultistepScheduler",
            "LCMScheduler",
            "SASolverScheduler",
            "TCDScheduler",
            "UniPCMultistepScheduler",
        }
    ),
    "scale_factors": frozenset({"FlowMatchLCMScheduler"}),
    "variance_type": frozenset(
        {
            "DDPMParallelScheduler",
            "DDPMScheduler",
            "DPMSolverMultistepInverseScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "SASolverScheduler",
        }
    ),
}
"""Setting -> the classes that read it; in the config of another class it has no effect."""
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
MORE_BETA_SCHEDULES = dict.fromkeys(("DDPMParallelScheduler", "DDPMScheduler"), ("sigmoid", "laplace"))


def require_linear(cls: str, config: Mapping[str, Any]) -> None:
    """SamplerError for settings that scale by a quantile, resize or split the network's output, in classes that read
    them, and for betas that diffusers has no formula for.

    cls     the diffusers class
    config  the model's scheduler_config.json
    """
    if cls in READERS["thresholding"] and config.get("thresholding"):
        raise SamplerError(
            f"{cls} thresholds its estimate of the image by a quantile of it, which is not linear",
            where=CONFIG,
            expected='"thresholding": false',
            hint='models that denoise latents do not want it: set "thresholding": false in the model\'s '
            "scheduler_config.json, or name another scheduler, such as euler",
        )
    if cls in READERS["scale_factors"] and config.get("scale_factors"):
        raise SamplerError(
            f"{cls} resizes its estimate of the image between steps, and an engine has one size",
            where=CONFIG,
            expected='"scale_factors": null',
            got=config["scale_factors"],
        )
    if cls in READERS["variance_type"] and config.get("variance_type") in ("learned", "learned_range"):
        raise SamplerError(
            f"{cls} takes half of the network's output as a variance, which is not linear",
            where=CONFIG,
            expected="a variance_type other than learned and learned_range",
            got=config["variance_type"],
        )
    betas = (*BETA_SCHEDULES, *MORE_BETA_SCHEDULES.get(cls, ()))
    if "beta_schedule" in config and config["beta_schedule"] not in betas and not config.get("trained_betas"):
        raise SamplerError(
            f"diffusers refuses to make the scheduler {cls}: it has no such beta_schedule",
            where=CONFIG,
            expected=" or ".join(betas),
            got=config["beta_schedule"],
        )
