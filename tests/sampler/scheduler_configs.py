"""The scheduler_config.json of one model for each family of networks."""

from __future__ import annotations

from typing import Any

SD: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.42.1",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD_V: dict[str, Any] = {**SD, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
FLOW: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
FLOW_SOLVER: dict[str, Any] = {
    "_class_name": "DPMSolverMultistepScheduler",
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "flow_shift": 3.0,
}
EDM: dict[str, Any] = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
COGVIDEOX: dict[str, Any] = {**SD_V, "_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0}
CONTINUOUS: dict[str, Any] = {"_class_name": "IPNDMScheduler", "num_train_timesteps": 1000}

FAMILIES = {
    "beta": SD,
    "flow": FLOW,
    "edm": EDM,
    "cogvideox": COGVIDEOX,
    "continuous": CONTINUOUS,
}
