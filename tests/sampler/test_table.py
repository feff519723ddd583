"""The table itself: JSON there and back, damaged input, the update, and what it imports."""

from __future__ import annotations

import base64
import copy
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from toolchain.errors import BundleError, RequestError
from toolchain.sampler.layout import LAYOUTS, MAX_STATES, PLAIN, ROW, Layout
from toolchain.sampler.table import (
    LONGEST,
    SamplerTable,
    describe_tables,
    fit,
    spans,
    split,
    split_clamp,
    step_reference,
    table_name,
)


def make_table(evaluations: int = 3, layout: Layout = PLAIN) -> SamplerTable:
    random = np.random.default_rng(0)
    return SamplerTable(
        name="ddim:eta=0.5",
        steps=evaluations,
        timesteps=np.linspace(999, 0.1, evaluations, dtype=np.float32),
        rows=random.standard_normal((evaluations, layout.width)).astype(np.float32),
        init_noise_sigma=14.614646911621094,
        noise_draws=(1,) * (evaluations - 1) + (0,),
        start=2,
        noising=(0.1, 0.9),
    )


def test_row_has_room_for_four_states() -> None:
    assert ROW == 25
    assert MAX_STATES == 4
    assert list(LAYOUTS) == [25, 32, 36, 44]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=str)
def test_json_round_trip_is_exact(layout: Layout) -> None:
    table = make_table(layout=layout)
    read = SamplerTable.from_json(json.loads(json.dumps(table.to_json())))
    assert read.to_json() == table.to_json()
    for array in ("timesteps", "rows"):
        assert getattr(read, array).dtype == np.float32
        assert getattr(read, array).tobytes() == getattr(table, array).tobytes()
    assert read.init_noise_sigma == table.init_noise_sigma
    assert read.noise_draws == table.noise_draws
    assert read.noising == table.noising


def test_json_round_trip_of_the_extremes_of_float32() -> None:
    table = make_table(1)
    limits = np.finfo(np.float32)
    table.rows[0, :5] = np.array([limits.max, limits.min, limits.tiny, limits.smallest_subnormal, -0.0])
    read = SamplerTable.from_json(json.loads(json.dumps(table.to_json())))
    assert read.rows.tobytes() == table.rows.tobytes()


def test_only_columns_that_hold_something_are_written() -> None:
    table = make_table(50)
    table.rows[:, [*range(1, 16), *range(17, 24)]] = 0
    assert table.to_json()["columns"] == [0, 16, 24]
    assert len(json.dumps(table.to_json())) < 50 * 4 * 4 * 4 / 3 + 300


def test_a_table_without_noising() -> None:
    data = make_table().to_json() | {"noising": None}
    assert SamplerTable.from_json(data).noising is None


DAMAGE: list[tuple[str, Any, str]] = [
    ("format", 1, "format"),
    ("name", "", "name"),
    ("name", 3, "name"),
    ("steps", 0, "steps"),
    ("steps", 3.0, "steps"),
    ("steps", True, "steps"),
    ("start", -1, "start"),
    ("init_noise_sigma", "1", "init_noise_sigma"),
    ("init_noise_sigma", float("nan"), "init_noise_sigma"),
    ("init_noise_sigma", 10**400, "init_noise_sigma"),
    ("noising", [1.0], "noising"),
    ("noising", [1.0, float("inf")], "noising"),
    ("noise_draws", "012", "noise_draws"),
    ("noise_draws", "01", "numbers"),
    ("noise_draws", [0, 1, 1], "noise_draws"),
    ("noise_draws", "", "noise_draws"),
    ("noise_draws", "0" * (LONGEST + 1), "noise_draws"),
    ("width", 26, "width"),
    ("width", True, "width"),
    ("width", [25], "width"),
    ("columns", [0, 0], "columns"),
    ("columns", [1, 0], "columns"),
    ("columns", [25], "columns"),
    ("columns", [-1], "columns"),
    ("columns", [0.0], "columns"),
    ("columns", [0], "numbers"),
    ("numbers", "AAAA", "numbers"),
    ("numbers", "not base64", "numbers"),
    ("numbers", base64.b64encode(np.full((3, 26), np.nan, "<f4").tobytes()).decode(), "numbers"),
    ("numbers", None, "numbers"),
]


@pytest.mark.parametrize(("field", "value", "named"), DAMAGE, ids=[f"{d[0]}-{i}" for i, d in enumerate(DAMAGE)])
def test_damaged_json_is_refused_by_field(field: str, value: Any, named: str) -> None:
    data = make_table().to_json() | {field: value}
    with pytest.raises(BundleError, match=f"wrong {named}"):
        SamplerTable.from_json(data)


@pytest.mark.parametrize("field", sorted(make_table().to_json()))
def test_a_missing_field_is_refused(field: str) -> None:
    data = make_table().to_json()
    del data[field]
    with pytest.raises(BundleError, match="format" if field == "format" else "fields"):
        SamplerTable.from_json(data)


def test_unknown_fields_and_other_values_are_refused() -> None:
    with pytest.raises(BundleError, match="fields"):
        SamplerTable.from_json(make_table().to_json() | {"more": 1})
    not_an_object: Any = [1, 2]
    with pytest.raises(BundleError, match="format"):
        SamplerTable.from_json(not_an_object)


def test_from_json_leaves_its_input_alone() -> None:
    data = make_table().to_json()
    before = copy.deepcopy(data)
    table = SamplerTable.from_json(data)
    table.rows[:] = 0
    assert data == before


def test_step_reference_is_the_update_written_out() -> None:
    random = np.random.default_rng(1)
    row = random.standard_normal(ROW).astype(np.float32)
    state = random.standard_normal((MAX_STATES, 2, 4, 3, 5)).astype(np.float32)
    output, noise = random.standard_normal((2, 2, 4, 3, 5)).astype(np.float32)
    following = step_reference(row, state, output, noise)
    assert following.shape == state.shape
    assert following.dtype == np.float32
    for i in range(MAX_STATES):
        wanted = sum(row[4 * i + j] * state[j] for j in range(MAX_STATES)) + row[16 + i] * output + row[20 + i] * noise
        np.testing.assert_allclose(following[i], wanted, rtol=1e-5, atol=1e-5)


def test_step_reference_clamps_the_estimate() -> None:
    row = np.zeros(Layout(5, clamps=True).width, np.float32)
    clamp = split_clamp(row[None])
    assert clamp is not None
    clamp[0][:], clamp[1][:], clamp[2][:], clamp[3][0, 1] = 2, -1, 1.5, 10
    state = np.zeros((5, 1, 1, 1, 4), np.float32)
    state[0] = [0, 1, 0.5, -3]
    output = np.array([0.5, 0, 1, 1], np.float32).reshape(1, 1, 1, 4)
    following = step_reference(row, state, output, np.zeros_like(output))
    assert following[1].ravel().tolist() == [-5, 15, 0, -15]
    assert not following[[0, 2, 3, 4]].any()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=str)
def test_rows_fit_a_layout_with_more_room(layout: Layout) -> None:
    """The same update, in more states than are used."""
    random = np.random.default_rng(2)
    rows = make_table(layout=layout).rows
    for wider in LAYOUTS.values():
        if wider.states < layout.states or wider.clamps < layout.clamps:
            with pytest.raises(RequestError, match="has no room"):
                fit(rows, wider)
            continue
        state = np.zeros((wider.states, 1, 4, 2, 2), np.float32)
        state[: layout.states] = random.standard_normal(state[: layout.states].shape)
        output, noise = random.standard_normal((2, 1, 4, 2, 2)).astype(np.float32)
        wanted = step_reference(rows[1], state[: layout.states], output, noise)
        found = step_reference(fit(rows, wider)[1], state, output, noise)
        np.testing.assert_allclose(found[: layout.states], wanted, rtol=1e-6, atol=1e-6)
        assert not found[layout.states :].any()


def test_split_gives_views() -> None:
    rows = np.zeros((2, ROW), np.float32)
    a, b, c, scale = split(rows)
    a[1, 2, 3], b[1, 0], c[1, 3], scale[1] = 1, 2, 3, 4
    assert {int(i): int(rows[1, i]) for i in np.flatnonzero(rows[1])} == {11: 1, 16: 2, 23: 3, 24: 4}
    assert split(rows[1])[0].shape == (4, 4)


def test_states_counts_what_carries_anything() -> None:
    table = make_table()
    assert table.states == MAX_STATES
    table.rows[:] = 0
    assert table.states == 1
    split(table.rows)[1][0, 2] = 1
    assert table.states == 3


def test_tables_are_told_by_ranges() -> None:
    names = [table_name("euler", steps) for steps in (1, 2, 3, 20, 5)]
    names += [table_name("flow-euler", 4, tokens=64), table_name("flow-euler", 5, tokens=64)]
    names += [table_name("euler", 8, skip=3), table_name("euler", 9, skip=4)]
    wanted = ["euler/1-3,5,20", "flow-euler/4-5/64-tokens", "euler/8-9/image to image"]
    assert describe_tables(names) == wanted
    assert spans([]) == ""


def test_evaluations_and_stochastic() -> None:
    assert make_table().evaluations == 3
    assert make_table().stochastic
    assert not make_table(1).stochastic


@pytest.mark.parametrize("module", ["table", "schedulers"])
def test_importing_it_imports_nothing_heavy(module: str) -> None:
    heavy = {"torch", "diffusers", "transformers", "scipy", "onnx", "onnxruntime"}
    code = f"import sys, toolchain.sampler.{module}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
