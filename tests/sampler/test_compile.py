"""Tables against the schedulers that they come from: all of them, few and many steps, options, starts, damage."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from tests.sampler.scheduler_configs import COGVIDEOX, CONTINUOUS, EDM, FAMILIES, FLOW, FLOW_SOLVER, SD, SD_V
from toolchain.errors import RequestError, SamplerError
from toolchain.sampler import compile as compiler
from toolchain.sampler.compile import compile_table, prepare
from toolchain.sampler.layout import MAX_STATES, ROW, Layout
from toolchain.sampler.schedulers import SCHEDULERS, compatible, create, parse
from toolchain.sampler.silence import quiet
from toolchain.sampler.table import LONGEST, SamplerTable, split_clamp, step_reference
from toolchain.sampler.trajectory import Schedule
from toolchain.sampler.verify import table_errors, verify_table

STATES = {
    "heun": 2,
    "dpm2": 2,
    "dpm2-a": 2,
    "dpm++2m": 2,
    "dpm++2m-sde": 2,
    "dpm++2m-inverse": 2,
    "dpm++2s": 2,
    "deis": 2,
    "flow-heun": 2,
    "edm-dpm++2m": 2,
    "unipc": 3,
    "sa-solver": 3,
    "lms": 4,
    "pndm": 4,
    "ipndm": 4,
}
# Twice the evaluations of a step, less the last; PNDM repeats one timestep.
EVALUATIONS = {name: lambda n: 2 * n - 1 for name in ("heun", "dpm2", "dpm2-a", "flow-heun")} | {
    "pndm": lambda n: n + (n > 1)
}


@pytest.mark.parametrize("steps", [1, 2, 8, 30])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_at_few_and_many_steps(name: str, steps: int) -> None:
    config = FAMILIES[SCHEDULERS[name].family]
    table = compile_table(name, steps, config)  # verifies
    assert table.name == name
    assert table.steps == steps
    assert table.evaluations == EVALUATIONS.get(name, lambda n: n)(steps) == len(table.noise_draws)
    assert table.rows.shape == (table.evaluations, ROW)
    assert table.rows.dtype == table.timesteps.dtype == np.float32
    assert table.states <= MAX_STATES
    if steps >= 8:
        assert table.states == STATES.get(name, 1)


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if SCHEDULERS[n].family == "beta"])
def test_v_prediction(name: str) -> None:
    compile_table(name, 6, SD_V)


@pytest.mark.parametrize("config", [FLOW, FLOW_SOLVER], ids=["flow-match", "solver"])
def test_every_scheduler_of_flow_models(config: dict[str, Any]) -> None:
    names = compatible(config)
    assert {"flow-euler", "dpm++2m", "unipc", "deis"} <= set(names)
    for name in names:
        assert compile_table(name, 6, config).evaluations >= 6


@pytest.mark.parametrize(
    ("spec", "states"),
    [
        ("ddim:eta=0.5", 1),
        ("ddim:eta=1,spacing=trailing", 1),
        ("tcd:eta=0.3", 1),
        ("dpm++2m:karras,sde", 2),
        ("dpm++2m:order=1", 1),
        ("dpm++2m:order=3", 3),
        ("dpm++2m:order=3,sde,exponential", 3),
        ("dpm++2m:spacing=leading", 2),
        ("dpm++2s:order=3,sde", 3),
        ("dpm++2s:beta", 2),
        ("unipc:order=1", 2),
        ("unipc:order=3,karras", 4),
        ("deis:order=3", 3),
        ("euler:karras", 1),
        ("euler:beta", 1),
        ("euler-a:spacing=trailing", 1),
        ("heun:exponential", 2),
        ("dpm2:karras", 2),
        ("lms:karras", 4),
        ("pndm:spacing=trailing", 4),
        ("lcm:spacing=trailing", 1),
    ],
)
def test_options(spec: str, states: int) -> None:
    table = compile_table(spec, 8, SD)
    assert table.name == parse(spec).canonical
    assert table.states == states


@pytest.mark.parametrize("name", ["euler", "euler-a", "dpm++2m", "unipc", "ddim"])
def test_zero_terminal_snr(name: str) -> None:
    spec = f"{name}:rescale-zero-snr,spacing=trailing"
    errors = table_errors(compile_table(spec, 8, SD_V), lambda: prepare(parse(spec), 8, SD_V))
    assert errors.exact <= 1e-6


def test_zero_terminal_snr_of_an_epsilon_model_is_refused() -> None:
    with pytest.raises(SamplerError, match="divides by zero"):
        compile_table("ddim:rescale-zero-snr,spacing=trailing", 8, SD)


@pytest.mark.parametrize(
    ("spec", "config", "steps"),
    [
        ("ddpm:timesteps=900 500 1", SD, 3),
        ("euler:timesteps=999 850.5 24", SD, 3),
        ("euler:sigmas=14.615 3.861 0.152 0", SD, 3),
        ("heun:timesteps=999 500 24", SD, 5),
        ("dpm++2m:sde,timesteps=999 850 736 24", SD, 4),
        ("dpm++2s:timesteps=999 850 736 24", SD, 4),
        ("lcm:timesteps=999 499", SD, 2),
        ("tcd:timesteps=999 499", SD, 2),
        ("flow-euler:sigmas=1 0.7 0.3", FLOW, 3),
        ("flow-lcm:sigmas=1 0.7 0.3", FLOW, 3),
        ("unipc:sigmas=1 0.7 0.3", FLOW, 3),
    ],
)
def test_every_scheduler_that_takes_a_list(spec: str, config: dict[str, Any], steps: int) -> None:
    """Verified against the scheduler that was given the list; its steps are what pipelines count."""
    for linear_sigmas in (False, config is FLOW and spec.startswith("flow-")):
        table = compile_table(spec, 20, config, linear_sigmas=linear_sigmas)
        assert table.name == spec
        assert table.steps == table.evaluations == steps
    scheduler = create(parse(spec), config)
    with quiet():
        scheduler.set_timesteps(**parse(spec).lists)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())


def test_a_list_that_the_pipeline_of_flux_leaves_out() -> None:
    """It sets sigmas to None for a scheduler with use_flow_sigmas, and draws with a number of steps instead."""
    with pytest.raises(RequestError, match="FLUX's pipeline leaves a list of sigmas out for unipc"):
        compile_table("unipc:sigmas=1 0.7 0.3", 20, FLOW, linear_sigmas=True)


def test_a_list_that_diffusers_refuses() -> None:
    with pytest.raises(SamplerError, match="must be in descending order"):
        compile_table("ddpm:timesteps=1 500", 20, SD)
    with pytest.raises(RequestError, match="at least one step"):
        compile_table("euler:sigmas=3", 20, SD)


@pytest.mark.parametrize(
    ("spec", "draws"),
    [
        ("ddim", (0, 0, 0, 0)),
        ("ddim:eta=0.5", (1, 1, 1, 1)),
        ("tcd", (0, 0, 0, 0)),
        ("tcd:eta=0.3", (1, 1, 1, 0)),
        ("lcm", (1, 1, 1, 0)),
        ("euler", (0, 0, 0, 0)),
        ("euler-a", (1, 1, 1, 1)),
        ("dpm++2m", (0, 0, 0, 0)),
        ("dpm++2m-sde", (1, 1, 1, 1)),
        ("dpm2-a", (0, 1, 0, 1, 0, 1, 0)),
    ],
)
def test_draws_are_those_of_the_scheduler_even_with_zero_coefficients(spec: str, draws: tuple[int, ...]) -> None:
    table = compile_table(spec, 4, SD)
    assert table.noise_draws == draws
    assert table.stochastic == any(draws)


def test_the_random_stream_is_diffusers_own() -> None:
    """With a real generator and nothing replaced: the loop of a pipeline beside the loop of the runtime."""

    def model(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.tanh(sample * 0.2 + timestep.float() / 1000)

    shape = (2, 4, 4, 4)
    table = compile_table("dpm++2m-sde:karras", 7, SD)
    with quiet():
        scheduler = create(parse("dpm++2m-sde:karras"), SD)
        scheduler.set_timesteps(7)
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(sample, t), t)
        sample = scheduler.step(output, t, sample, generator=generator, return_dict=False)[0]

    generator = torch.Generator().manual_seed(3)
    state = np.zeros((MAX_STATES, *shape), np.float32)
    state[0] = torch.randn(shape, generator=generator).numpy() * table.init_noise_sigma
    for row, timestep, draw in zip(table.rows, torch.from_numpy(table.timesteps), table.noise_draws, strict=True):
        noise = torch.randn(shape, generator=generator).numpy() if draw else np.zeros(shape, np.float32)
        output = model(torch.from_numpy(row[-1] * state[0]), timestep)
        state = step_reference(row, state, output.numpy(), noise)
    np.testing.assert_allclose(state[0], sample.numpy(), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "config", "skip"),
    [
        ("euler", SD, 5),
        ("euler-a", SD, 7),
        ("dpm++2m", SD, 5),
        ("dpm++2m:karras", SD, 7),
        ("unipc", SD, 3),
        ("ddim", SD, 4),
        ("pndm", SD, 3),
        ("lcm", SD, 2),
        ("heun", SD, 3),
        ("flow-euler", FLOW, 3),
        ("flow-heun", FLOW, 2),
    ],
)
def test_a_start_in_the_middle(name: str, config: dict[str, Any], skip: int) -> None:
    table = compile_table(name, 8, config, skip=skip)
    start = skip * (2 if "heun" in name else 1)
    whole = compile_table(name, 8, config)
    np.testing.assert_array_equal(table.timesteps, whole.timesteps[start:])
    assert table.start == start
    assert table.noising is not None
    signal, noise = table.noising
    assert 0 < signal <= 1
    assert 0 < noise < 14


def test_noising_is_what_the_scheduler_does_to_latents() -> None:
    latents, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for name in ("ddim", "euler", "dpm++2m", "unipc"):
        table = compile_table(name, 8, SD, skip=3)
        schedule = prepare(parse(name), 8, SD, skip=3)
        wanted = schedule.scheduler.add_noise(latents, noise, schedule.timesteps[:1])
        assert table.noising is not None
        torch.testing.assert_close(table.noising[0] * latents + table.noising[1] * noise, wanted)
    assert compile_table("ddim-inverse", 4, SD).noising is None


def test_initial_scale() -> None:
    assert compile_table("euler", 8, SD).init_noise_sigma == pytest.approx(14.6146, rel=1e-4)
    assert compile_table("ddim", 8, SD).init_noise_sigma == 1.0
    assert compile_table("flow-euler", 8, FLOW).init_noise_sigma == 1.0


def test_input_scale_is_that_of_scale_model_input() -> None:
    schedule = prepare(parse("euler"), 5, SD)
    sigmas = schedule.scheduler.sigmas[:5]
    np.testing.assert_allclose(compile_table("euler", 5, SD).rows[:, -1], (sigmas**2 + 1) ** -0.5, rtol=1e-6)


def test_dynamic_shifting_by_tokens_and_linear_sigmas() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = {**FLOW, "use_dynamic_shifting": True}
    for tokens, linear in ((256, False), (4096, False), (1024, True)):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        own: dict[str, Any] = {"sigmas": np.linspace(1.0, 0.2, 5)} if linear else {"num_inference_steps": 5}
        scheduler.set_timesteps(mu=calculate_shift(tokens), **own)
        table = compile_table("flow-euler", 5, config, tokens=tokens, linear_sigmas=linear)
        np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
    few, many = (compile_table("flow-euler", 5, config, tokens=n) for n in (256, 4096))
    assert not np.array_equal(few.timesteps, many.timesteps)


def test_a_long_schedule() -> None:
    assert compile_table("euler-a", 300, SD).states == 1


@pytest.mark.parametrize(
    ("spec", "steps", "skip", "error", "message"),
    [
        ("euler", 0, 0, RequestError, "at least one step"),
        ("euler", -1, 0, RequestError, "at least one step"),
        ("heun", LONGEST // 2 + 1, 0, RequestError, "at most 4096 evaluations"),
        ("euler", 8, 8, RequestError, "0 to 7"),
        ("euler", 8, -1, RequestError, "0 to 7"),
        ("heun", 8, 8, RequestError, "0 to 7"),
        ("eular", 8, 0, RequestError, "did you mean euler"),
        ("ddim", 1001, 0, SamplerError, "cannot be larger than"),
        ("lcm", 51, 0, SamplerError, "smaller than `num_inference_steps`: 51"),
    ],
)
def test_wrong_requests(spec: str, steps: int, skip: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compile_table(spec, steps, SD, skip=skip)


@pytest.mark.parametrize("limit", [1.0, 0.7])
@pytest.mark.parametrize(("config", "steps"), [(SD, 1), (SD, 9), (SD_V, 9)], ids=["one step", "epsilon", "v"])
@pytest.mark.parametrize("spec", ["ddim:eta=0.5", "ddim-inverse", "ddpm", "heun", "lcm"])
def test_schedulers_that_clamp(spec: str, config: dict[str, Any], steps: int, limit: float) -> None:
    table = compile_table(spec, steps, config | {"clip_sample": True, "clip_sample_range": limit})  # verifies
    assert table.layout == Layout(clamps=True)
    clamp = split_clamp(table.rows)
    assert clamp is not None
    assert (clamp[2] == np.float32(limit)).all()
    assert not compile_table(spec, steps, config).layout.clamps


@pytest.mark.parametrize(("spec", "config"), [("model", COGVIDEOX), ("tcd", SD)])
def test_classes_that_have_the_setting_and_do_not_read_it(spec: str, config: dict[str, Any]) -> None:
    """As of diffusers 0.42."""
    assert compile_table(spec, 5, config | {"clip_sample": True}).layout == Layout()


@pytest.mark.parametrize("steps", [4, 5, 30])
def test_runge_kutta_steps_of_pndm_take_a_fifth_state(steps: int) -> None:
    table = compile_table("pndm", steps, SD | {"skip_prk_steps": False})
    assert table.layout.states == (5 if steps > 4 else 4)
    assert table.evaluations == steps + 9


def test_too_few_steps_for_runge_kutta() -> None:
    with pytest.raises(SamplerError, match=r'4 steps or more\n.*got: 3\n.*"skip_prk_steps": true'):
        compile_table("pndm", 3, SD | {"skip_prk_steps": False})


def test_two_clamps_and_uneven_limits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clipping(Toy):
        config: ClassVar[dict[str, Any]] = {"clip_sample": True}

    for rule, message in (
        (lambda e, x: x.clamp(-1, 1) + e.clamp(-1, 1), "clamps twice"),
        (lambda e, x: (x + e).clamp(-1, 2), "uneven limits"),
    ):
        monkeypatch.setattr(compiler, "create", lambda spec, config, rule=rule: Clipping(rule))
        with pytest.raises(SamplerError, match=message):
            compile_table("euler", 4, SD)


def test_a_longer_schedule_than_the_graph_has_rows() -> None:
    assert compile_table("euler", 1100, SD).evaluations == 1100


def test_a_prediction_type_that_diffusers_does_not_know() -> None:
    with pytest.raises(SamplerError, match="prediction_type given as nothing"):
        compile_table("euler", 4, {**SD, "prediction_type": "nothing"})


@cache
def small(spec: str) -> SamplerTable:
    return compile_table(spec, 4, SD)


def damaged(table: SamplerTable, **changes: Any) -> SamplerTable:
    fields = {name: getattr(table, name) for name in table.__dataclass_fields__}
    return SamplerTable(**fields | changes)


@pytest.mark.parametrize("spec", ["ddim:eta=0.5", "euler-a", "heun", "dpm++2m", "unipc"])
def test_any_wrong_coefficient_fails_the_verification(spec: str) -> None:
    """Of more than a thousandth; the smallest states of LMS and PNDM matter less to a picture than the tolerance."""
    table = small(spec)
    verify_table(table, lambda: prepare(parse(spec), 4, SD))
    for i, j in np.argwhere(np.abs(table.rows) > 1e-3):
        rows = table.rows.copy()
        rows[i, j] *= 1.05
        with pytest.raises(SamplerError, match="not a linear state machine"):
            verify_table(damaged(table, rows=rows), lambda: prepare(parse(spec), 4, SD))


def test_a_wrong_timestep_fails_the_verification() -> None:
    table = small("euler")
    for i in range(table.evaluations):
        timesteps = table.timesteps.copy()
        timesteps[i] += 1
        with pytest.raises(SamplerError, match="not a linear state machine"):
            verify_table(damaged(table, timesteps=timesteps), lambda: prepare(parse("euler"), 4, SD))


def test_wrong_draws_and_nan_fail_the_verification() -> None:
    table = small("euler-a")
    with pytest.raises(SamplerError, match="draws other noises"):
        verify_table(damaged(table, noise_draws=(1, 1, 1, 0)), lambda: prepare(parse("euler-a"), 4, SD))
    rows = np.full_like(table.rows, np.nan)
    with pytest.raises(SamplerError, match="not a linear state machine"):
        verify_table(damaged(table, rows=rows), lambda: prepare(parse("euler-a"), 4, SD))


class Toy:
    """A scheduler of one rule, in the shape of diffusers' own."""

    order = 1
    init_noise_sigma = 1.0
    config: ClassVar[dict[str, Any]] = {}

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        self.timesteps = torch.arange(4, 0, -1)

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.timesteps = torch.arange(num_inference_steps, 0, -1)

    def step(self, output: torch.Tensor, t: torch.Tensor, sample: torch.Tensor, return_dict: bool) -> tuple[Any]:
        return (self.rule(output, sample),)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda e, x: x + 0.1 * e + 0.1, "not a linear state machine"),
        (lambda e, x: (x + 0.1 * e).clamp(-1, 1), "not a linear state machine"),
        (lambda e, x: x * 0.9 + 0.1 * e**2, "not a linear state machine"),
        (lambda e, x: x + torch.randn(x.shape) + torch.randn(x.shape), "more than one noise"),
        (lambda e, x: x + torch.rand_like(x), "draws random numbers with rand_like"),
        (lambda e, x: x + torch.empty_like(x).normal_(), "draws random numbers with normal_"),
        (lambda e, x: x / 0, "divides by zero"),
        (lambda e, x: x.no_such_method(), "diffusers refuses Toy"),
    ],
)
def test_what_is_not_linear_is_refused(monkeypatch: pytest.MonkeyPatch, rule: Any, message: str) -> None:
    monkeypatch.setattr(compiler, "create", lambda spec, config: Toy(rule))
    with pytest.raises(SamplerError, match=message):
        compile_table("euler", 4, SD)


def test_float32_inside_a_scheduler_does_not_blur_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trace stays float64, though many schedulers cast what they are given."""
    for name in ("euler", "dpm++2m-sde", "flow-euler", "edm-euler", "flow-lcm"):
        config = FAMILIES[SCHEDULERS[name].family]
        seen: list[torch.dtype] = []
        step = Schedule.step

        def spy(self: Schedule, *args: Any, step: Any = step, seen: list[torch.dtype] = seen) -> torch.Tensor:
            following: torch.Tensor = step(self, *args)
            seen.append(following.dtype)
            return following

        monkeypatch.setattr(Schedule, "step", spy)
        compiler._trace(prepare(parse(name), 4, config))
        monkeypatch.undo()
        assert set(seen) == {torch.float64}


def test_the_patched_random_numbers_are_gone_afterwards() -> None:
    compile_table("euler-a", 2, SD)
    assert torch.randn(2, 3).shape == (2, 3)
    assert torch.zeros(1, 5, 1, 1, dtype=torch.float64).float().dtype == torch.float32


@pytest.mark.parametrize("config", [SD, SD_V, FLOW, EDM, COGVIDEOX, CONTINUOUS], ids=lambda c: c["_class_name"])
def test_the_model_s_own_scheduler(config: dict[str, Any]) -> None:
    table = compile_table("model", 5, config)
    assert table.name == "model"
    assert SamplerTable.from_json(table.to_json()).to_json() == table.to_json()
