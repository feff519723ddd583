"""Every setting that a diffusers scheduler reads: in the table, refused by name, or without effect, with the reason.

A table that is compiled is verified against the scheduler with that setting, so that one which differs from the plain
table covers it.
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest

from tests.sampler.scheduler_configs import COGVIDEOX, EDM, FLOW, FLOW_SOLVER, SD, SD_V
from toolchain.errors import SamplerError
from toolchain.sampler.compile import compile_table
from toolchain.sampler.schedulers import SCHEDULERS
from toolchain.sampler.table import SamplerTable

DDIM, DDPM, EULER = ({**SD, "_class_name": f"{name}Scheduler"} for name in ("DDIM", "DDPM", "EulerDiscrete"))
LCM, SA, UNIPC = ({**SD, "_class_name": f"{name}Scheduler"} for name in ("LCM", "SASolver", "UniPCMultistep"))
DPM = {**SD, "_class_name": "DPMSolverMultistepScheduler"}
OPEN_ENDED = {**DPM, "final_sigmas_type": "sigma_min", "lower_order_final": False}
SHIFTED = {**FLOW, "use_dynamic_shifting": True}
FLOW_LCM = {**FLOW, "_class_name": "FlowMatchLCMScheduler"}

COVERED: dict[str, tuple[dict[str, Any], Any]] = {
    "algorithm_type": (DPM, "sde-dpmsolver++"),
    "base_image_seq_len": (SHIFTED, 128),
    "base_shift": (SHIFTED, 0.3),
    "beta_end": (SD, 0.015),
    "beta_schedule": (SD, "squaredcos_cap_v2"),
    "beta_start": (SD, 0.001),
    "clip_sample": (DDIM, True),
    "clip_sample_range": ({**DDIM, "clip_sample": True}, 0.5),
    "corrector_order": (SA, 1),
    "disable_corrector": (UNIPC, [0, 1]),
    "euler_at_final": (OPEN_ENDED, True),
    "final_sigmas_type": (DPM, "sigma_min"),
    "flow_shift": (FLOW_SOLVER, 2.0),
    "interpolation_type": (EULER, "log_linear"),
    "invert_sigmas": (FLOW, True),
    "lambda_min_clipped": ({**DPM, "beta_schedule": "squaredcos_cap_v2"}, -3.0),
    "lower_order_final": ({**DPM, "final_sigmas_type": "sigma_min"}, False),
    "max_image_seq_len": (SHIFTED, 2048),
    "max_shift": (SHIFTED, 1.5),
    "num_train_timesteps": (SD, 500),
    "original_inference_steps": (LCM, 30),
    "predict_x0": ({**UNIPC, "final_sigmas_type": "sigma_min"}, False),
    "prediction_type": (SD, "v_prediction"),
    "predictor_order": (SA, 1),
    "rescale_betas_zero_snr": (SD_V, True),
    "rho": (EDM, 5.0),
    "set_alpha_to_one": (DDIM, True),
    "shift": (FLOW, 2.0),
    "shift_terminal": (FLOW, 0.1),
    "sigma_data": (EDM, 0.7),
    "sigma_max": ({**EULER, "use_karras_sigmas": True}, 10.0),
    "sigma_min": ({**EULER, "use_karras_sigmas": True}, 0.1),
    "sigma_schedule": (EDM, "exponential"),
    "skip_prk_steps": (SD, False),
    "snr_shift_scale": (COGVIDEOX, 2.0),
    "solver_order": (DPM, 3),
    "solver_type": (DPM, "heun"),
    "steps_offset": (SD, 0),
    "stochastic_sampling": (FLOW, True),
    "time_shift_type": (SHIFTED, "linear"),
    "timestep_scaling": (LCM, 5.0),
    "timestep_spacing": (SD, "trailing"),
    "timestep_type": ({**EULER, "prediction_type": "v_prediction"}, "continuous"),
    "trained_betas": (SD, np.linspace(0.0001, 0.02, 1000).tolist()),
    "use_beta_sigmas": (EULER, True),
    "use_dynamic_shifting": (FLOW, True),
    "use_exponential_sigmas": (EULER, True),
    "use_flow_sigmas": ({**DPM, "prediction_type": "flow_prediction"}, True),
    "use_karras_sigmas": (EULER, True),
    "use_lu_lambdas": (DPM, True),
    "variance_type": (DDPM, "fixed_large"),
}
REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "scale_factors": (FLOW_LCM, [0.5, 0.5, 0.5, 0.5, 1.0], "resizes"),
    "solver_p": (UNIPC, "PNDMScheduler", "object"),  # an object, which no file can hold
    "tau_func": (SA, "lambda t: 1", "not callable"),
    "thresholding": (DDPM, True, "quantile"),
    "variance_type": (DDPM, "learned_range", "variance"),
}
WITHOUT_EFFECT: dict[str, tuple[dict[str, Any], Any, str]] = {
    "dynamic_thresholding_ratio": (DDIM, 0.9, "thresholding alone reads it, and is refused"),
    "sample_max_value": (DDIM, 2.0, "thresholding alone reads it, and is refused"),
    "upscale_mode": (FLOW_LCM, "nearest", "scale_factors alone reads it, and is refused"),
    # What a file may say beside the settings of its class.
    "_diffusers_version": (SD, "0.1.0", "who wrote the file"),
    "skip_type": (SD, "anything", "no class has it"),
}


def table(config: dict[str, Any]) -> SamplerTable:
    return compile_table("model", 6, config, tokens=1024)


def same(first: SamplerTable, second: SamplerTable) -> bool:
    pairs = [(first.rows, second.rows), (first.timesteps, second.timesteps)]
    return first.init_noise_sigma == second.init_noise_sigma and all(np.array_equal(a, b) for a, b in pairs)


def test_every_setting_has_its_place() -> None:
    classes = {entry.cls for entry in SCHEDULERS.values()}
    read = {key for cls in classes for key in inspect.signature(getattr(diffusers, cls)).parameters} - {"kwargs"}
    assert read == (COVERED.keys() | REFUSED.keys() | WITHOUT_EFFECT.keys()) - {"_diffusers_version", "skip_type"}


@pytest.mark.parametrize("key", COVERED)
def test_settings_that_are_in_the_table(key: str) -> None:
    config, value = COVERED[key]
    assert not same(table(config), table({**config, key: value}))


@pytest.mark.parametrize("key", REFUSED)
def test_settings_that_are_refused(key: str) -> None:
    config, value, message = REFUSED[key]
    with pytest.raises(SamplerError, match=message):
        table({**config, key: value})


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_settings_without_effect(key: str) -> None:
    config, value, _ = WITHOUT_EFFECT[key]
    assert same(table(config), table({**config, key: value}))


def test_shifts_that_a_class_has_no_default_for_are_the_pipelines_own() -> None:
    """SD3's and FLUX's pipelines differ in theirs."""
    config = {**FLOW_SOLVER, "_class_name": "UniPCMultistepScheduler", "use_dynamic_shifting": True}
    for linear_sigmas, most in ((False, 1.16), (True, 1.15)):
        own = compile_table("model", 6, config, tokens=4096, linear_sigmas=linear_sigmas)
        said = compile_table("model", 6, config | {"max_shift": most}, tokens=4096, linear_sigmas=linear_sigmas)
        assert same(own, said)
        assert not same(own, compile_table("model", 6, config | {"max_shift": 1.2}, tokens=4096))
