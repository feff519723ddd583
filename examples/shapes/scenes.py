"""Synthetic scenes: captions, drawings and the scorer that reads a drawing back.

A scene is one shape in the middle, or two shapes with a spatial relation, on a plain background. Drawing is a pure
function of a scene and a random generator, so the training set is a pure function of its seed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

SIZE = 64
SHAPES = ("circle", "square", "triangle", "ring", "cross")
COLOURS = {
    "red": (215, 40, 40),
    "orange": (245, 150, 40),
    "yellow": (250, 230, 60),
    "green": (40, 165, 70),
    "blue": (40, 90, 220),
    "purple": (140, 60, 185),
}
BACKGROUNDS = {"white": (250, 250, 250), "gray": (150, 150, 150), "black": (10, 10, 10)}
RELATIONS = ("left of", "right of", "above", "below")
PALETTE = {**COLOURS, **BACKGROUNDS}

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str

    def __str__(self) -> str:
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; `relation` tells where the first lies, seen from the second."""

    things: tuple[Thing, ...]
    relation: str
    background: str

    @property
    def caption(self) -> str:
        return f" {self.relation} ".join(map(str, self.things)) + f" on a {self.background} background"


def all_scenes() -> tuple[list[Scene], list[Scene]]:
    """Every scene, as (training, held out).

    One in twenty pairs of different things is held out in both orders, with all its relations and backgrounds, and one
    in twenty single things on its background. What is held out depends on nothing but this file.
    """
    rng = np.random.default_rng(20)
    things = [Thing(shape, colour) for shape in SHAPES for colour in COLOURS]
    train: list[Scene] = []
    held_out: list[Scene] = []
    for thing, background in itertools.product(things, BACKGROUNDS):
        (held_out if rng.random() < 0.05 else train).append(Scene((thing,), "", background))
    for first, second in itertools.combinations(things, 2):
        target = held_out if rng.random() < 0.05 else train
        for pair, relation, background in itertools.product(((first, second), (second, first)), RELATIONS, BACKGROUNDS):
            target.append(Scene(pair, relation, background))
    return train, held_out


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    if shape == "square":
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r), (x - r, y + r)]
    arm = 0.38 * r
    quarter = [(-arm, -r), (arm, -r), (arm, -arm), (r, -arm), (r, arm), (arm, arm)]
    return [(x + dx, y + dy) for dx, dy in quarter + [(-dx, -dy) for dx, dy in quarter]]


def _paint(canvas: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, r: float, background: str) -> None:
    colour = COLOURS[thing.colour]
    if thing.shape in ("circle", "ring"):
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        if thing.shape == "ring":
            hole = 0.52 * r
            canvas.ellipse((x - hole, y - hole, x + hole, y + hole), fill=BACKGROUNDS[background])
    else:
        canvas.polygon(_outline(thing.shape, x, y, r), fill=colour)


def _places(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre and radius in pixels of every thing."""
    if len(scene.things) == 1:
        return [(*(SIZE / 2 + rng.uniform(-4, 4, 2)), rng.uniform(13, 18))]
    first_is_low = scene.relation in ("left of", "above")
    along = [SIZE * 0.27, SIZE * 0.73] if first_is_low else [SIZE * 0.73, SIZE * 0.27]
    places = []
    for position in along:
        a, b = position + rng.uniform(-2, 2), SIZE / 2 + rng.uniform(-5, 5)
        x, y = (a, b) if scene.relation in ("left of", "right of") else (b, a)
        places.append((x, y, rng.uniform(9.5, 12.5)))
    return places


def draw(scene: Scene, rng: np.random.Generator) -> Pixels:
    """The scene as [64, 64, 3] uint8, drawn at four times the size and averaged down."""
    image = Image.new("RGB", (4 * SIZE, 4 * SIZE), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(image)
    for thing, (x, y, r) in zip(scene.things, _places(scene, rng), strict=True):
        _paint(canvas, thing, 4 * x, 4 * y, 4 * r, scene.background)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


@dataclass(frozen=True)
class Score:
    """What of a caption was found in a picture."""

    background: bool
    colours: bool
    shapes: bool
    place: bool

    @property
    def everything(self) -> bool:
        return self.background and self.colours and self.shapes and self.place


def _template(shape: str, size: int) -> NDArray[np.bool_]:
    image = Image.new("L", (8 * size, 8 * size), 0)
    canvas = ImageDraw.Draw(image)
    half = 4 * size
    if shape in ("circle", "ring"):
        canvas.ellipse((0, 0, 2 * half - 1, 2 * half - 1), fill=255)
        if shape == "ring":
            canvas.ellipse((0.48 * half, 0.48 * half, 1.52 * half, 1.52 * half), fill=0)
    else:
        canvas.polygon(_outline(shape, half, half, half), fill=255)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX)) > 127


_TEMPLATES = {shape: _template(shape, 24) for shape in SHAPES}


def _read_thing(pixels: Pixels, mask: NDArray[np.bool_], box: tuple[slice, ...]) -> tuple[Thing, tuple[float, float]]:
    names = list(COLOURS)
    inner = ndimage.binary_erosion(mask)
    colour = np.median(pixels[inner if inner.any() else mask].astype(float), axis=0)
    distance = [float(np.abs(colour - COLOURS[name]).sum()) for name in names]
    cut = Image.fromarray((mask[box] * 255).astype(np.uint8)).resize((24, 24), Image.Resampling.BILINEAR)
    found = np.asarray(cut) > 127
    overlap = {shape: (found & t).sum() / (found | t).sum() for shape, t in _TEMPLATES.items()}
    rows, columns = np.nonzero(mask)
    shape = max(overlap, key=lambda name: overlap[name])
    return Thing(shape, names[int(np.argmin(distance))]), (float(columns.mean()), float(rows.mean()))


def read(pixels: Pixels) -> tuple[list[tuple[Thing, tuple[float, float]]], str]:
    """The things in a picture, each with its centre (x, y) in pixels, and the name of the nearest background."""
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    ground = np.median(border.astype(float), axis=0)
    name = min(BACKGROUNDS, key=lambda key: float(np.abs(ground - BACKGROUNDS[key]).sum()))
    foreground = np.abs(pixels.astype(float) - ground).max(axis=2) > 55
    labels, _ = ndimage.label(foreground)
    found = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels == index
        if mask.sum() > 0.01 * SIZE * SIZE:
            found.append(_read_thing(pixels, mask, box))
    return found, name


def score(scene: Scene, pixels: Pixels) -> Score:
    """Compares a [64, 64, 3] uint8 picture with what its caption asks for."""
    found, background = read(pixels)
    wanted = sorted((t.colour, t.shape) for t in scene.things)
    got = sorted((t.colour, t.shape) for t, _ in found)
    place = len(found) == len(scene.things)
    if place and scene.relation:
        axis = 0 if scene.relation in ("left of", "right of") else 1
        ordered = sorted(found, key=lambda item: item[1][axis])
        if scene.relation in ("right of", "below"):
            ordered.reverse()
        place = [t for t, _ in ordered] == list(scene.things)
    return Score(
        background == scene.background,
        sorted(c for c, _ in wanted) == sorted(c for c, _ in got),
        sorted(s for _, s in wanted) == sorted(s for _, s in got),
        place,
    )
