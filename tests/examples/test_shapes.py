"""The synthetic scenes and the scorer that judges the bundled model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "shapes"
sys.path.insert(0, str(FOLDER))

import evaluate  # noqa: E402
import scenes  # noqa: E402


def test_the_scorer_reads_ground_truth_drawings() -> None:
    held_out = evaluate.held_out_scenes()
    assert len(held_out) == len({s.caption for s in held_out}) == 200
    assert evaluate.validate_scorer(held_out)["everything"] >= 0.99


def test_training_and_held_out_scenes_do_not_meet() -> None:
    train, held_out = scenes.all_scenes()
    assert not {s.caption for s in train} & {s.caption for s in held_out}
    pairs = {frozenset(s.things) for s in held_out if len(s.things) == 2}
    assert not pairs & {frozenset(s.things) for s in train}


def drawn() -> tuple[scenes.Scene, np.ndarray]:
    things = (scenes.Thing("circle", "red"), scenes.Thing("square", "blue"))
    scene = scenes.Scene(things, "left of", "white")
    return scene, scenes.draw(scene, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda p: p[:, ::-1], {"place"}),
        (lambda p: p[..., ::-1], {"place"}),
        (lambda p: np.full_like(p, 250), {"colours", "shapes", "place"}),
        (lambda p: np.where((p > 240).all(-1, keepdims=True), np.uint8(150), p), {"background"}),
    ],
)
def test_a_wrong_picture_is_found_wrong(change: object, wrong: set[str]) -> None:
    scene, pixels = drawn()
    score = scenes.score(scene, np.ascontiguousarray(change(pixels)))  # type: ignore[operator]
    facts = ("background", "colours", "shapes", "place")
    assert {f for f in facts if not getattr(score, f)} == wrong
    assert not score.everything


def test_drawing_is_a_function_of_the_seed() -> None:
    scene, pixels = drawn()
    assert np.array_equal(pixels, scenes.draw(scene, np.random.default_rng(0)))
    assert not np.array_equal(pixels, scenes.draw(scene, np.random.default_rng(1)))
