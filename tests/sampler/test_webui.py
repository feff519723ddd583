"""Names of web UIs and k-diffusion are answered with ours, and ours exist."""

from __future__ import annotations

import pytest

from toolchain.errors import RequestError
from toolchain.sampler.schedulers import create, parse
from toolchain.sampler.webui import OURS, SCHEDULES, ours

CONFIG = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "skip_prk_steps": True,
}
# Left: what AUTOMATIC1111, ComfyUI and k-diffusion show.
NAMES = {
    "Euler": "euler",
    "Euler a": "euler-a",
    "euler_ancestral": "euler-a",
    "Euler SGM Uniform": "euler:spacing=trailing",
    "Heun": "heun",
    "LMS Karras": "lms:karras",
    "DPM2": "dpm2",
    "DPM2 a Karras": "dpm2-a:karras",
    "dpm_2_ancestral": "dpm2-a",
    "DPM++ 2M": "dpm++2m",
    "DPM++ 2M Karras": "dpm++2m:karras",
    "dpm++ 2m karras": "dpm++2m:karras",
    "dpmpp_2m": "dpm++2m",
    "DPM++ 2M SDE Karras": "dpm++2m-sde:karras",
    "DPM++ 2M SDE Exponential": "dpm++2m-sde:exponential",
    "dpmpp_2m_sde": "dpm++2m-sde",
    "DPM++ 3M SDE Karras": "dpm++2m-sde:order=3,karras",
    "DPM++ SDE Karras": "dpm++2s:sde,karras",
    "DPM++ 2S a Karras": "dpm++2s:karras",
    "PLMS": "pndm",
    "DDIM": "ddim",
    "UniPC": "unipc",
    "uni_pc": "unipc",
    "LCM": "lcm",
    "dpm++2m_karras": "dpm++2m:karras",
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_a_name_is_answered_with_ours(name: str, expected: str) -> None:
    with pytest.raises(RequestError) as error:
        parse(name)
    assert error.value.hint == f"did you mean {expected}?"
    assert create(parse(expected), CONFIG) is not None


def test_every_answer_is_a_scheduler_and_every_schedule_an_option_of_it() -> None:
    for spec in OURS.values():
        create(parse(spec), CONFIG)
    for option in filter(None, SCHEDULES.values()):
        create(parse(f"dpm++2m:{option}"), CONFIG)


@pytest.mark.parametrize("name", ["", "Restart", "karras", "DPM adaptive"])
def test_what_has_no_counterpart_gets_no_answer(name: str) -> None:
    assert ours(name) is None
