"""What torch simulates of quantised layers is what engines compute, for the layers of every family."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toolchain
from tests.families import MAKERS
from toolchain.builder.plan import make_plan
from toolchain.engines.runners import runner_of
from toolchain.models.hub import resolve_model
from toolchain.recipe import Quantize, Recipe, parse_recipe
from toolchain.runtime.engines import BoundEngine, open_engine, open_memory
from toolchain.store.artifacts import Store
from toolchain.tune.candidates import searched, unquantised, with_tables
from toolchain.tune.inputs import calibrated
from toolchain.tune.layers import list_layers
from toolchain.tune.pictures import build_ungated
from toolchain.tune.references import References
from toolchain.tune.simulation import carries, rounded

TEXT = """
buckets = ["1x64x64"]
[sampling]
steps = 2
step_counts = [2]
[check]
prompts = ["a red circle"]
[components.denoiser.quantize]
weights = "int8"
[components.vae_decoder.quantize]
weights = "int8"
scales = "mse"
"""


def outputs(bundle: toolchain.Bundle, name: str, feed: dict[str, Any], output: str) -> np.ndarray:
    runner = runner_of(bundle.backend)
    memory = open_memory(bundle, runner, 1)
    engine = BoundEngine(open_engine(bundle, runner, name, bundle.buckets[0], memory), memory)
    (array,) = memory.read(engine(feed)[output])
    kept = array.copy()
    engine.close()
    memory.close()
    return kept


ROUNDED = """
activations = "int8"
ranges = "percentile=99.9"
smoothing = 0.5
"""
BLOCKS = 'weights = "int4"\nblock_size = 32'
FLOAT8 = 'weights = "float8"\nactivations = "float8"'
CASES = [*((family, "") for family in MAKERS), ("sd", ROUNDED), ("flux", ROUNDED), ("sd3", BLOCKS), ("sd3", FLOAT8)]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_a_simulation_is_what_the_engine_does(
    family: str, options: str, store: Path, tmp_path: Path, family_model: Callable[[str], Path]
) -> None:
    model = family_model(family)
    calibrates = options in (ROUNDED, FLOAT8)
    if options in (BLOCKS, FLOAT8):  # of the denoiser
        text = TEXT.replace('weights = "int8"', options, 1)
        text = text.replace('weights = "int8"', f'weights = "int8"{ROUNDED}') if calibrates else text
    else:
        text = TEXT.replace('weights = "int8"', f'weights = "int8"{options}')
    if calibrates:
        text += '[calibration]\nprompts = ["a red circle", "a blue square"]\n'
    recipe: Recipe = parse_recipe(f'family = "{family}"\n{text}', "tiny", "here")
    source = resolve_model(str(model))
    plain, quantised = (
        build_ungated(make_plan(r, source, Store(store), gate=False), tmp_path / name)
        for name, r in (("plain", unquantised(recipe)), ("int8", recipe))
    )
    plan = make_plan(unquantised(recipe), source, Store(store))
    tables = searched(recipe)
    listing = list_layers(plan, tables, 2, blocks=False)
    assert listing.fixed > 0
    refs = References(plan, recipe.check.prompts, 0, lambda text: None)
    inputs = calibrated(plan, recipe, tables, lambda text: None)
    assert inputs.keys() == (tables.keys() if calibrates else set())
    for name, output in (("denoiser", "next_state"), ("vae_decoder", "image")):
        simulation = refs.simulation(name)
        weights = [weight for unit in listing.units if unit.component == name for weight in unit.weights]
        roundings = inputs[name].roundings(tables[name], simulation._peaks) if calibrates else {}
        assert roundings.keys() == (set(weights) if calibrates else set())
        with rounded(simulation.network, weights, tables[name], "float32", roundings):
            simulated = simulation._call(simulation.feeds[-1])[output]
        given = simulation.feeds[-1].inputs
        engine, exact = outputs(quantised, name, given, output), outputs(plain, name, given, output)
        rounding, wrong = (float(np.square(engine - other).mean()) for other in (exact, simulated))
        assert rounding > 1e-12
        # An activation that lies between two integers may go to another one: the sums before it have another order.
        assert wrong < (0.05 if calibrates else 1e-3) * rounding + 1e-12
        assert 0 < simulation.error(weights[:1], tables[name], "float32", inputs.get(name)) < 1e-2
    refs.close()


def test_blocks_hold_the_same_layers(tiny_model: Path, store: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(f'family = "sd"\n{TEXT}', "tiny", "here")
    plan = make_plan(unquantised(recipe), resolve_model(str(tiny_model)), Store(store))
    build_ungated(plan, tmp_path / "bundle")
    single, blocks = (list_layers(plan, searched(recipe), 3, blocks=blocks) for blocks in (False, True))
    assert len(blocks.units) < len(single.units) / 2
    for count in ("macs", "elements"):
        assert sum(getattr(u, count) for u in single.units) == sum(getattr(u, count) for u in blocks.units)
    assert single.fixed == blocks.fixed
    for listing in (single, blocks):
        names = [(u.component, f"{u.pattern}.") for u in listing.units]
        enclosing = [a for a, b in itertools.permutations(names, 2) if a[0] == b[0] and b[1].startswith(a[1])]
        assert enclosing == []  # excluding one must leave no layer of another
    more = list_layers(plan, searched(recipe), 6, blocks=False)
    by_name = {(u.component, u.pattern): u.macs for u in more.units}
    for unit in single.units:  # three evaluations, and one decoding
        assert by_name[unit.component, unit.pattern] == unit.macs * (2 if unit.component == "denoiser" else 1)


@pytest.mark.parametrize("scheduler", ["euler", "dpm++2m", "unipc"])
def test_errors_are_carried_to_the_end(scheduler: str, tiny_bundle: Path) -> None:
    """With a network that gives the same whatever it is given, to the letter."""
    bundle = toolchain.load(tiny_bundle)
    table = bundle.table(scheduler, 4, (64, 64))
    bundle.close()
    carried = carries(table)
    random = np.random.default_rng(0)
    from toolchain.sampler.table import split

    a, b, _, _ = split(table.rows.astype(np.float64))
    for wrong in range(4):
        states = [np.zeros(a.shape[1]), np.zeros(a.shape[1])]
        error = random.standard_normal(a.shape[1])
        for i in range(table.evaluations):
            output = random.standard_normal()
            states = [a[i] @ state + b[i] * output for state in states]
            if i == wrong:
                states[1] = states[1] + error
        assert (states[1] - states[0])[0] == pytest.approx(carried[wrong] @ error)


def test_weights_are_as_before_afterwards() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ConvTranspose2d(4, 6, 2))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with rounded(network, ["0.weight", "1.weight"], Quantize("int8"), "float16", {}):
        for name in ("0.weight", "1.weight"):
            assert not torch.equal(network.state_dict()[name], before[name])
        columns = network.state_dict()["1.weight"]
        scale = float(np.float16(before["1.weight"][:, 0].abs().max() / 127))
        steps = columns[:, 0] / scale
        assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_tables_are_replaced() -> None:
    recipe = parse_recipe(f'family = "sd"\n{TEXT}', "tiny", "here")
    assert not any(part.quantize for part in unquantised(recipe).components.values())
    changed = with_tables(recipe, {"denoiser": replace(recipe.component("denoiser").quantize, scales="mse")})  # type: ignore[type-var]
    assert changed.component("denoiser").quantize.scales == "mse"  # type: ignore[union-attr]
    assert changed.component("vae_decoder") == recipe.component("vae_decoder")
