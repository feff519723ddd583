"""The names that `--scheduler` takes, and the diffusers scheduler that each stands for.

A spec is `NAME[:option[,option...]]`: `euler`, `dpm++2m:karras,sde`, `ddim:eta=0.5`, `euler:sigmas=14.6 3.9 0.7 0`, or
`model` for the class and settings of the model's own scheduler_config.json. diffusers is imported when a scheduler is
created, not before.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from toolchain.errors import RequestError, SamplerError
from toolchain.sampler import webui
from toolchain.sampler.accepted import ACCEPTED
from toolchain.sampler.layout import BETA, DEFAULTED, FAMILIES, family_of
from toolchain.sampler.refused import require_linear
from toolchain.sampler.silence import quiet
from toolchain.sampler.spec import FLAGS, LISTS, SIGMA_FLAGS, VALUES, OptionValue, SchedulerSpec, read_option

MODEL = "model"


@dataclass(frozen=True)
class Entry:
    """One scheduler: a diffusers class, and what its name fixes of it."""

    cls: str
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """The family of networks that it is for."""
        return FAMILIES.get(self.cls, BETA)


_SDE = {"algorithm_type": "sde-dpmsolver++"}
_ODE = {"algorithm_type": "dpmsolver++"}

SCHEDULERS: dict[str, Entry] = {
    "ddim": Entry("DDIMScheduler"),
    "ddim-parallel": Entry("DDIMParallelScheduler"),
    "ddim-inverse": Entry("DDIMInverseScheduler"),
    "ddpm": Entry("DDPMScheduler"),
    "ddpm-parallel": Entry("DDPMParallelScheduler"),
    "euler": Entry("EulerDiscreteScheduler"),
    "euler-a": Entry("EulerAncestralDiscreteScheduler"),
    "heun": Entry("HeunDiscreteScheduler"),
    "dpm2": Entry("KDPM2DiscreteScheduler"),
    "dpm2-a": Entry("KDPM2AncestralDiscreteScheduler"),
    "dpm++2m": Entry("DPMSolverMultistepScheduler", _ODE | {"solver_order": 2}),
    "dpm++2m-sde": Entry("DPMSolverMultistepScheduler", _SDE | {"solver_order": 2}),
    "dpm++2m-inverse": Entry("DPMSolverMultistepInverseScheduler", _ODE | {"solver_order": 2}),
    "dpm++2s": Entry("DPMSolverSinglestepScheduler", _ODE | {"solver_order": 2}),
    "lms": Entry("LMSDiscreteScheduler"),
    "pndm": Entry("PNDMScheduler"),
    "deis": Entry("DEISMultistepScheduler"),
    "unipc": Entry("UniPCMultistepScheduler"),
    "sa-solver": Entry("SASolverScheduler"),
    "lcm": Entry("LCMScheduler"),
    "tcd": Entry("TCDScheduler"),
    "flow-euler": Entry("FlowMatchEulerDiscreteScheduler"),
    "flow-heun": Entry("FlowMatchHeunDiscreteScheduler"),
    "flow-lcm": Entry("FlowMatchLCMScheduler"),
    "edm-euler": Entry("EDMEulerScheduler"),
    "edm-dpm++2m": Entry("EDMDPMSolverMultistepScheduler", _ODE | {"solver_order": 2}),
    "cogvideox-ddim": Entry("CogVideoXDDIMScheduler"),
    "ipndm": Entry("IPNDMScheduler"),
}

# Classes for betas that have the setting use_flow_sigmas: by name, because planning loads none of them.
FLOW_SIGMAS = frozenset(
    {
        "DEISMultistepScheduler",
        "DPMSolverMultistepInverseScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "SASolverScheduler",
        "UniPCMultistepScheduler",
    }
)

_BROWNIAN = "its noise is one Brownian tree over the whole trajectory, not a draw for each step"
UNSUPPORTED: dict[str, str] = {
    "DPMSolverSDEScheduler": _BROWNIAN,
    "CosineDPMSolverMultistepScheduler": _BROWNIAN,
    "CMStochasticIterativeScheduler": "it clamps its estimate of the image, which is not linear",
    "UnCLIPScheduler": "its network predicts the variance as well",
    "RePaintScheduler": "its step also takes an image and a mask",
    "CogVideoXDPMScheduler": "its step also takes the estimate of the step before",
}


def parse(spec: str) -> SchedulerSpec:
    """The meaning of a spec; RequestError for an unknown name or option, a wrong value, a repetition or a conflict."""
    name, colon, tail = (part.strip() for part in spec.partition(":"))
    if name not in SCHEDULERS and name != MODEL:
        raise _unknown_name(name)
    options: dict[str, OptionValue] = {}
    for text in tail.split(",") if colon else ():
        key, equals, value = (part.strip() for part in text.partition("="))
        if key in options:
            raise RequestError(f"the scheduler option {key} is given twice", got=spec)
        options[key] = read_option(key, value if equals else None)
    for group in (SIGMA_FLAGS, LISTS):
        if sum(key in options for key in group) > 1:
            raise RequestError("a scheduler has one schedule", expected="one of " + ", ".join(group), got=spec)
    return SchedulerSpec(name, tuple(sorted(options.items())))


def steps_of(spec: SchedulerSpec, model_config: Mapping[str, Any], steps: int) -> int:
    """How many steps the list of a spec stands for, as the diffusers pipelines count them; `steps` without a list."""
    for key, values in spec.lists.items():
        cls = SCHEDULERS[spec.name].cls if spec.name != MODEL else model_config.get("_class_name")
        if (cls, key) == ("EulerDiscreteScheduler", "sigmas"):
            return len(values) - 1  # its list holds the sigma after the last step too
        if cls == "HeunDiscreteScheduler":
            return 2 * len(values) - 1  # pipelines count its evaluations
        return len(values)
    return steps


def _unknown_name(name: str) -> RequestError:
    by_class = {entry.cls: known for known, entry in reversed(SCHEDULERS.items())}
    close = difflib.get_close_matches(name, [*SCHEDULERS, MODEL, *by_class], n=1, cutoff=0.5)
    meant = webui.ours(name) or (by_class.get(close[0], close[0]) if close else None)
    return RequestError(
        f"no scheduler is called {name!r}",
        expected="one of " + ", ".join([MODEL, *SCHEDULERS]),
        got=name,
        hint=f"did you mean {meant}?" if meant else None,
    )


def reference_kwargs(spec: SchedulerSpec) -> dict[str, Any]:
    """Arguments of a diffusers pipeline call that reproduce a spec, beside the scheduler."""
    return {**{key: value for key, value in spec.options if key == "eta"}, **spec.lists}


def step_kwargs(spec: SchedulerSpec, scheduler: Any) -> dict[str, Any]:
    """What a diffusers pipeline passes to `scheduler.step` beside the generator.

    Pipelines pass eta wherever `step` takes it, 0 unless told otherwise: TCD's own default of 0.3 never applies.
    """
    if "eta" not in inspect.signature(scheduler.step).parameters:
        return {}
    return {"eta": 0.0} | {key: value for key, value in spec.options if key == "eta"}


def compatible(model_config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the schedulers that can drive a model, by its scheduler_config.json."""
    family = family_of(model_config)
    return tuple(name for name, entry in SCHEDULERS.items() if _drives(entry, family))


def _drives(entry: Entry, family: str) -> bool:
    return entry.family == family or (family == "flow" and entry.cls in FLOW_SIGMAS)


def entry_for(spec: SchedulerSpec, model_config: Mapping[str, Any]) -> Entry:
    """The scheduler of a spec, without importing diffusers. SamplerError where it cannot drive the model."""
    entry, family = _entry(spec, model_config), family_of(model_config)
    if not _drives(entry, family):
        raise SamplerError(
            f"the scheduler {spec.name} is for {entry.family} models, and this model is {family}",
            where="scheduler/scheduler_config.json",
            expected="one of " + ", ".join(compatible(model_config)),
            got=spec.canonical,
        )
    require_linear(entry.cls, model_config)
    _require_options(spec, entry.cls)
    sigmas = [key for key, _ in spec.options if key in SIGMA_FLAGS]
    if family == "flow" and entry.cls in FLOW_SIGMAS and spec.name != MODEL and sigmas:
        raise SamplerError(
            f"{sigmas[0]} sigmas would replace the flow sigmas that this model needs",
            where=entry.cls,
            got=spec.canonical,
            hint=f"leave {sigmas[0]} out, or use flow-euler:{sigmas[0]}",
        )
    if family == "flow" and "timesteps" in spec.lists:
        raise SamplerError(
            "diffusers' pipelines of flow-matching models take no timesteps", got=spec.canonical, hint="give sigmas"
        )
    return entry


def create(spec: SchedulerSpec, model_config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler of a spec for a model, built as a user does: `Class.from_config(model_config, ...)`.

    A solver made for betas drives a flow-matching model with use_flow_sigmas, prediction_type flow_prediction and the
    model's shift. SamplerError with the reason for a class, setting or option that no table can reproduce.
    """
    entry = entry_for(spec, model_config)
    cls = _load(entry.cls)
    overrides = {**entry.fixed, **_family_overrides(spec, cls, model_config)}
    overrides.update(_option_overrides(spec))
    is_own = spec.name == MODEL
    config = {key: value for key, value in model_config.items() if not (is_own and key == DEFAULTED)}
    try:
        with quiet():
            scheduler = cls.from_config(config, **overrides)
    except Exception as error:  # whatever diffusers objects to is a fact about the request, not a crash
        raise SamplerError(
            f"diffusers refuses to make the scheduler {spec.canonical}", where=entry.cls, got=error
        ) from error
    return scheduler


def _entry(spec: SchedulerSpec, model_config: Mapping[str, Any]) -> Entry:
    """The class to build; for `model` it is the one that the config names, with nothing fixed."""
    if spec.name != MODEL:
        return SCHEDULERS[spec.name]
    cls = model_config.get("_class_name")
    if cls in {entry.cls for entry in SCHEDULERS.values()}:
        return Entry(cls)
    reason = UNSUPPORTED.get(str(cls), "no table is known for this class")
    if cls is None:
        reason = "scheduler_config.json has no _class_name"
    raise SamplerError(
        f"the model's own scheduler cannot be compiled: {reason}",
        where="scheduler/scheduler_config.json",
        expected="one of " + ", ".join(dict.fromkeys(entry.cls for entry in SCHEDULERS.values())),
        got=cls,
        hint="name another scheduler: " + ", ".join(SCHEDULERS),
    )


def _load(name: str) -> Any:
    import diffusers

    try:
        return getattr(diffusers, name)
    except AttributeError:
        raise SamplerError(
            "this version of diffusers has no such scheduler", expected=name, got=f"diffusers {diffusers.__version__}"
        ) from None


def _settings(cls: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls.__init__).parameters


def _family_overrides(spec: SchedulerSpec, cls: Any, model_config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that carry a model's family over to a class made for another."""
    if family_of(model_config) != "flow" or spec.name == MODEL:
        return {}
    shift = model_config.get("shift", model_config.get("flow_shift", 1.0))
    if "flow_shift" not in _settings(cls):
        return {"shift": shift}
    return {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}


def _option_overrides(spec: SchedulerSpec) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for key, value in spec.options:
        if key in FLAGS:
            setting, value = FLAGS[key]
            overrides[setting] = value
        elif key in VALUES:
            overrides[VALUES[key]] = value
    return overrides


def _require_options(spec: SchedulerSpec, cls: str) -> None:
    """SamplerError for an option that the class does not take."""
    for key, _ in spec.options:
        if key not in ACCEPTED[cls]:
            takers = [name for name, entry in SCHEDULERS.items() if key in ACCEPTED[entry.cls]]
            raise SamplerError(
                f"the scheduler {spec.name} has no option {key}",
                where=cls,
                expected=", ".join(ACCEPTED[cls]) or "no option",
                got=spec.canonical,
                hint=f"{key} can be given to {', '.join(takers)}" if key in LISTS else None,
            )
