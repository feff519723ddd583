"""Specs: what they mean, which are refused and how, and the diffusers scheduler that each makes."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import diffusers
import numpy as np
import pytest

from tests.sampler.scheduler_configs import COGVIDEOX, CONTINUOUS, EDM, FLOW, FLOW_SOLVER, SD, SD_V
from toolchain.errors import RequestError, SamplerError
from toolchain.sampler.accepted import ACCEPTED
from toolchain.sampler.layout import DEFAULTED, Layout, family_of, layout_for
from toolchain.sampler.refused import BETA_SCHEDULES, MORE_BETA_SCHEDULES, READERS
from toolchain.sampler.schedulers import (
    FLOW_SIGMAS,
    SCHEDULERS,
    UNSUPPORTED,
    compatible,
    create,
    entry_for,
    parse,
    reference_kwargs,
    step_kwargs,
)
from toolchain.sampler.silence import quiet
from toolchain.sampler.spec import FLAGS, LISTS, OPTIONS, VALUES, SchedulerSpec, with_list
from toolchain.sampler.table import fit


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("euler", "euler"),
        ("model", "model"),
        ("model:spacing=trailing", "model:spacing=trailing"),
        ("ddim:eta=.50", "ddim:eta=0.5"),
        ("ddim:eta=1", "ddim:eta=1.0"),
        ("ddim:eta=-0.0", "ddim:eta=0.0"),
        ("dpm++2m:sde,karras", "dpm++2m:karras,sde"),
        (" dpm++2m : karras , order = 3 ", "dpm++2m:karras,order=3"),
        ("euler:spacing=trailing,rescale-zero-snr", "euler:rescale-zero-snr,spacing=trailing"),
        ("euler: sigmas = 14.60  2.0 0 ", "euler:sigmas=14.6 2 0"),
        ("lcm:timesteps=999 499.0", "lcm:timesteps=999 499"),
    ],
)
def test_specs_have_one_canonical_form(spec: str, canonical: str) -> None:
    parsed = parse(spec)
    assert parsed.canonical == canonical
    assert parse(parsed.canonical) == parsed


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("eular", ["no scheduler is called 'eular'", "did you mean euler?", "dpm++2m", "unipc"]),
        ("EulerDiscreteScheduler", ["did you mean euler?"]),
        ("DPM++ 2M Karras", ["did you mean dpm++2m:karras?"]),
        ("DPMSolverMultistepScheduler", ["did you mean dpm++2m?"]),
        ("", ["no scheduler is called ''"]),
        ("euler:", ["no scheduler option is called ''", "karras"]),
        ("euler:karas", ["no scheduler option is called 'karas'", "did you mean karras?"]),
        ("euler:karras=yes", ["karras takes no value", "karras=yes"]),
        ("euler:karras,karras", ["karras is given twice"]),
        ("euler:karras,beta", ["one schedule", "karras, exponential, beta"]),
        ("unipc:order", ["order has a wrong value", "order=1, 2 or 3"]),
        ("unipc:order=4", ["order has a wrong value", "order=4"]),
        ("unipc:order=2.0", ["order has a wrong value"]),
        ("ddim:eta=much", ["eta has a wrong value", "a number from 0 to 1"]),
        ("ddim:eta=1.5", ["eta has a wrong value"]),
        ("ddim:eta=nan", ["eta has a wrong value"]),
        ("euler:sigmas=", ["sigmas has a wrong value", "a space between them"]),
        ("euler:sigmas=3 two", ["sigmas has a wrong value", "sigmas=3 two"]),
        ("euler:sigmas=3 -1", ["sigmas has a wrong value"]),
        ("euler:sigmas=inf 1", ["sigmas has a wrong value"]),
        ("euler:sigmas=3 0,timesteps=999", ["one schedule", "timesteps, sigmas"]),
        ("ddim:spacing=even", ["spacing has a wrong value", "leading, trailing, linspace"]),
    ],
)
def test_bad_specs_are_refused_with_what_is_right(spec: str, parts: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        parse(spec)
    for part in parts:
        assert part in str(caught.value)


def test_every_name_stands_for_a_class_that_diffusers_has() -> None:
    for entry in SCHEDULERS.values():
        assert hasattr(diffusers, entry.cls)
    assert not {entry.cls for entry in SCHEDULERS.values()} & UNSUPPORTED.keys()


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (SD, "beta"),
        (SD_V, "beta"),
        ({}, "beta"),
        (FLOW, "flow"),
        (FLOW_SOLVER, "flow"),
        (EDM, "edm"),
        (COGVIDEOX, "cogvideox"),
        (CONTINUOUS, "continuous"),
    ],
)
def test_family_of_a_model(config: dict[str, Any], family: str) -> None:
    assert family_of(config) == family
    assert compatible(config)


def test_names_and_options_reach_the_scheduler() -> None:
    scheduler = create(parse("dpm++2m-sde:karras,order=3,spacing=trailing"), SD)
    assert type(scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert scheduler.config.algorithm_type == "sde-dpmsolver++"
    assert scheduler.config.use_karras_sigmas is True
    assert scheduler.config.solver_order == 3
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.config.beta_start == SD["beta_start"]


def test_a_name_means_the_same_whatever_the_model_comes_with() -> None:
    config = {
        **SD,
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
    }
    scheduler = create(parse("dpm++2m"), config)
    assert scheduler.config.algorithm_type == "dpmsolver++"
    assert scheduler.config.solver_order == 2
    assert create(parse("model"), config).config.solver_order == 3


def test_model_is_the_class_of_the_model() -> None:
    assert type(create(parse("model"), SD)).__name__ == "PNDMScheduler"
    assert type(create(parse("model"), FLOW)).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert create(parse("model"), FLOW).config.shift == 3.0


def test_create_leaves_the_model_config_alone() -> None:
    before = dict(SD)
    create(parse("euler:karras"), SD)
    assert before == SD


def test_flow_models_keep_their_shift_in_every_class() -> None:
    solver = create(parse("unipc"), FLOW)
    assert solver.config.use_flow_sigmas is True
    assert solver.config.prediction_type == "flow_prediction"
    assert solver.config.flow_shift == 3.0
    assert create(parse("flow-euler"), FLOW_SOLVER).config.shift == 3.0


def refusal(spec: str, config: dict[str, Any]) -> str:
    with pytest.raises(SamplerError) as caught:
        create(parse(spec), config)
    return str(caught.value)


SILENT = {key: value for key, value in SD.items() if key not in ("clip_sample", "skip_prk_steps")}


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (SD, Layout()),
        (SILENT, Layout(5, clamps=True)),
        (SILENT | {"clip_sample": False}, Layout(5)),
        (SILENT | {"skip_prk_steps": True}, Layout(clamps=True)),
        (SD | {"clip_sample": True}, Layout(clamps=True)),
        (SD | {DEFAULTED: ["clip_sample"]}, Layout(clamps=True)),
        (FLOW, Layout()),
        (EDM, Layout()),
    ],
)
def test_the_step_has_room_for_what_the_config_leaves_open(config: dict[str, Any], layout: Layout) -> None:
    assert layout_for(config) == layout


def test_every_scheduler_fits_the_step_of_its_model() -> None:
    """What `layout_for` says from the config alone holds for every class that can drive the model."""
    from toolchain.sampler.compile import compile_table

    for name in compatible(SILENT):
        table = compile_table(name, 4, SILENT)
        assert fit(table.rows, layout_for(SILENT)).shape == (table.evaluations, 44)
        assert table.layout == layout_for(SD) or name.startswith(("ddim", "ddpm")) or name == "pndm"


@pytest.mark.parametrize(
    ("spec", "config", "parts"),
    [
        ("dpm++2m", {**SD, "thresholding": True}, ["thresholds", '"thresholding": false']),
        ("ddpm", {**SD, "variance_type": "learned_range"}, ["variance", "learned_range"]),
        ("model", {**SD, "_class_name": "DPMSolverSDEScheduler"}, ["Brownian tree", "euler"]),
        ("model", {**SD, "_class_name": "CMStochasticIterativeScheduler"}, ["clamps", "not linear"]),
        ("model", {**SD, "_class_name": "MyScheduler"}, ["no table is known", "MyScheduler", "DDIMScheduler"]),
        ("model", {"clip_sample": False}, ["no _class_name"]),
        ("ddim:karras", SD, ["has no option karras", "rescale-zero-snr, spacing, eta"]),
        ("ddim:timesteps=999 1", SD, ["has no option timesteps", "can be given to ddpm, ddpm-parallel, euler, heun"]),
        ("dpm++2m:sigmas=3 1 0", SD, ["has no option sigmas", "can be given to euler, unipc, flow-euler"]),
        ("flow-euler:timesteps=999 1", FLOW, ["take no timesteps", "give sigmas"]),
        ("euler:eta=0.5", SD, ["has no option eta", "EulerDiscreteScheduler"]),
        ("deis:sde", SD, ["has no option sde"]),
        ("flow-heun:karras", FLOW, ["has no option karras", "no option"]),
        ("flow-euler", SD, ["flow-euler is for flow models", "this model is beta", "euler-a"]),
        ("euler", FLOW, ["euler is for beta models", "this model is flow", "flow-euler"]),
        ("edm-euler", SD, ["edm-euler is for edm models"]),
        ("ipndm", SD, ["ipndm is for continuous models"]),
        ("dpm++2m:karras", FLOW, ["karras sigmas would replace the flow sigmas", "flow-euler:karras"]),
        ("dpm++2m", {**SD, "beta_schedule": "none"}, ["diffusers refuses", "squaredcos_cap_v2"]),
    ],
)
def test_refusals_name_the_reason(spec: str, config: dict[str, Any], parts: list[str]) -> None:
    message = refusal(spec, config)
    for part in parts:
        assert part in message


# algorithm_type is also an argument of solvers that know no SDE form.
SDE_CLASSES = {f"DPMSolver{kind}Scheduler" for kind in ("Multistep", "MultistepInverse", "Singlestep")}
SDE_CLASSES |= {"EDMDPMSolverMultistepScheduler"}


@pytest.mark.parametrize("name", sorted({entry.cls for entry in SCHEDULERS.values()}))
def test_accepted_options_are_those_of_the_class(name: str) -> None:
    cls = getattr(diffusers, name)
    settings = inspect.signature(cls.__init__).parameters
    expected = {key for key, (setting, _) in FLAGS.items() if setting in settings}
    expected |= {key for key, setting in VALUES.items() if setting in settings}
    expected |= {"sde"} if name in SDE_CLASSES else set()
    expected |= {"eta"} if "eta" in inspect.signature(cls.step).parameters else set()
    expected |= {key for key in LISTS if key in inspect.signature(cls.set_timesteps).parameters}
    # use_karras_sigmas and the like are settings; sde is an algorithm, which FLAGS does not tell from a setting.
    expected -= set() if name in SDE_CLASSES else {"sde"}
    assert set(ACCEPTED[name]) == expected
    assert list(ACCEPTED[name]) == [option for option in OPTIONS if option in expected]


@pytest.mark.parametrize("setting", READERS)
def test_the_readers_of_a_setting_are_the_classes_that_have_it(setting: str) -> None:
    classes = {entry.cls: getattr(diffusers, entry.cls) for entry in SCHEDULERS.values()}
    assert {n for n, c in classes.items() if setting in inspect.signature(c.__init__).parameters} == READERS[setting]


@pytest.mark.parametrize("name", sorted({entry.cls for entry in SCHEDULERS.values() if entry.family == "beta"}))
def test_beta_schedules_are_those_of_the_class(name: str) -> None:
    known = set()
    for schedule in (*BETA_SCHEDULES, "sigmoid", "laplace", "none"):
        with contextlib.suppress(NotImplementedError), quiet():
            getattr(diffusers, name).from_config({"beta_schedule": schedule})
            known.add(schedule)
    assert known == {*BETA_SCHEDULES, *MORE_BETA_SCHEDULES.get(name, ())}


def test_plan_knows_which_options_a_scheduler_has() -> None:
    with pytest.raises(SamplerError, match="the scheduler lms has no option order"):
        entry_for(parse("lms:order=3"), SD)


def test_the_classes_with_flow_sigmas_are_those_of_diffusers() -> None:
    """Planning goes by the table, which this holds to the classes."""
    classes = {entry.cls: getattr(diffusers, entry.cls) for entry in SCHEDULERS.values()}
    assert {
        n for n, c in classes.items() if "use_flow_sigmas" in inspect.signature(c.__init__).parameters
    } == FLOW_SIGMAS


@pytest.mark.parametrize("key", ["timesteps", "sigmas"])
def test_a_list_in_python_becomes_an_option(key: str) -> None:
    wanted = f"euler:karras,{key}=999 1.5 0"
    for values in ([999, 1.5, 0], (999.0, 1.5, 0.0), np.array([999, 1.5, 0])):
        assert with_list("euler:karras", key, values) == wanted
    assert with_list("euler", key, [3]) == f"euler:{key}=3"
    for wrong in ("999", 3, ["a"], None):
        with pytest.raises(RequestError, match=f"{key} is not a list of numbers"):
            with_list("euler", key, wrong)  # type: ignore[arg-type]


def test_eta_is_passed_as_a_pipeline_passes_it() -> None:
    assert reference_kwargs(parse("ddim:eta=0.5")) == {"eta": 0.5}
    assert reference_kwargs(SchedulerSpec("tcd")) == {}
    assert step_kwargs(parse("tcd"), create(parse("tcd"), SD)) == {"eta": 0.0}
    assert step_kwargs(parse("euler"), create(parse("euler"), SD)) == {}
