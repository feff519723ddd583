"""The layout of a step graph: what a family of schedulers asks of it. Decides graphs, and so imports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_EVALUATIONS = 1024  # rows that the compiled step graph has room for; longer tables are written part by part
DEFAULTED = "_use_default_values"  # diffusers' own key: settings that another class does not take from this config

BETA = "beta"
FAMILIES = {
    "CogVideoXDDIMScheduler": "cogvideox",
    "EDMDPMSolverMultistepScheduler": "edm",
    "EDMEulerScheduler": "edm",
    "FlowMatchEulerDiscreteScheduler": "flow",
    "FlowMatchHeunDiscreteScheduler": "flow",
    "FlowMatchLCMScheduler": "flow",
    "IPNDMScheduler": "continuous",
}
"""Class -> the family of networks that it is for; others are for BETA.

beta: trained on a table of betas (SD, SDXL); flow: flow matching (SD3, FLUX); edm: preconditioned by sigma; cogvideox:
betas shifted in SNR; continuous: timesteps from 1 down to 0
"""


@dataclass(frozen=True)
class Layout:
    """The size of a step graph and of the rows of its table.

    states   of the sampler's memory; PNDM's Runge-Kutta steps need the fifth
    clamps   whether the step clamps an estimate of the picture: columns for u, v, limit and w of

                 estimate = clamp(u * state[0] + v * e, -limit, limit)
                 state'   = A state + b e + c z + w estimate
    """

    states: int = 4
    clamps: bool = False

    @property
    def width(self) -> int:
        """Columns of a row, in this order: A (row-major), b, c, scale, then u, v, limit, w."""
        n = self.states
        return n * n + 2 * n + 1 + (3 + n if self.clamps else 0)


PLAIN = Layout()
LAYOUTS = {layout.width: layout for layout in (PLAIN, Layout(clamps=True), Layout(5), Layout(5, clamps=True))}
"""Every layout by its width, which tells them apart."""
MAX_STATES = PLAIN.states
ROW = PLAIN.width


def family_of(model_config: Mapping[str, Any]) -> str:
    """The family of networks (see `FAMILIES`) that a scheduler_config.json belongs to."""
    family = FAMILIES.get(str(model_config.get("_class_name")), BETA)
    is_flow = model_config.get("prediction_type") == "flow_prediction" or model_config.get("use_flow_sigmas") is True
    return "flow" if family == BETA and is_flow else family


def layout_for(model_config: Mapping[str, Any]) -> Layout:
    """The layout of a model's step graph, large enough for every scheduler that can drive the model.

    A config that says neither "clip_sample": false nor "skip_prk_steps": true leaves open what diffusers' defaults ask
    of DDIM, DDPM and PNDM.
    """
    if family_of(model_config) != BETA:
        return PLAIN
    said = {key: value for key, value in model_config.items() if key not in model_config.get(DEFAULTED, ())}
    return Layout(4 if said.get("skip_prk_steps") else 5, clamps=bool(said.get("clip_sample", True)))
