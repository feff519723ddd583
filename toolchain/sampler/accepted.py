"""Which options of a spec each diffusers scheduler class takes: by name, because planning imports none of them."""

from __future__ import annotations

_SIGMAS = ("karras", "exponential", "beta")

ACCEPTED: dict[str, tuple[str, ...]] = {
    "CogVideoXDDIMScheduler": ("rescale-zero-snr", "spacing", "eta"),
    "DDIMInverseScheduler": ("rescale-zero-snr", "spacing"),
    "DDIMParallelScheduler": ("rescale-zero-snr", "spacing", "eta"),
    "DDIMScheduler": ("rescale-zero-snr", "spacing", "eta"),
    "DDPMParallelScheduler": ("rescale-zero-snr", "spacing", "timesteps"),
    "DDPMScheduler": ("rescale-zero-snr", "spacing", "timesteps"),
    "DEISMultistepScheduler": (*_SIGMAS, "order", "spacing"),
    "DPMSolverMultistepInverseScheduler": (*_SIGMAS, "sde", "order", "spacing"),
    "DPMSolverMultistepScheduler": (*_SIGMAS, "sde", "rescale-zero-snr", "order", "spacing", "timesteps"),
    "DPMSolverSinglestepScheduler": (*_SIGMAS, "sde", "order", "timesteps"),
    "EDMDPMSolverMultistepScheduler": ("sde", "order"),
    "EDMEulerScheduler": ("sigmas",),
    "EulerAncestralDiscreteScheduler": ("rescale-zero-snr", "spacing"),
    "EulerDiscreteScheduler": (*_SIGMAS, "rescale-zero-snr", "spacing", "timesteps", "sigmas"),
    "FlowMatchEulerDiscreteScheduler": (*_SIGMAS, "timesteps", "sigmas"),
    "FlowMatchHeunDiscreteScheduler": (),
    "FlowMatchLCMScheduler": (*_SIGMAS, "timesteps", "sigmas"),
    "HeunDiscreteScheduler": (*_SIGMAS, "spacing", "timesteps"),
    "IPNDMScheduler": (),
    "KDPM2AncestralDiscreteScheduler": (*_SIGMAS, "spacing"),
    "KDPM2DiscreteScheduler": (*_SIGMAS, "spacing"),
    "LCMScheduler": ("rescale-zero-snr", "spacing", "timesteps"),
    "LMSDiscreteScheduler": (*_SIGMAS, "spacing"),
    "PNDMScheduler": ("spacing",),
    "SASolverScheduler": (*_SIGMAS, "spacing"),
    "TCDScheduler": ("rescale-zero-snr", "spacing", "eta", "timesteps"),
    "UniPCMultistepScheduler": (*_SIGMAS, "rescale-zero-snr", "order", "spacing", "sigmas"),
}
