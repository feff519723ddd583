"""Ranges of activations as a file: safetensors, with what they are of in its metadata.

    COMPONENT/WEIGHT.peaks    float32 [steps, channels]
    COMPONENT/WEIGHT.means    float32 [steps]
    COMPONENT/WEIGHT.counts   int64 [bins]

as in `precision.ranges.Range`. Weights that are multiplied with one activation share its tensors, which have the name
of the first of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.errors import CalibrationError, WeightsError
from toolchain.precision.ranges import BINS, Range, Ranges
from toolchain.weights.mapped import MappedWeights, read_metadata
from toolchain.weights.safetensors import write_safetensors

FORMAT = "1"
FORMAT_KEY = "diffbuild_ranges"
PARTS = {"peaks": "F32", "means": "F32", "counts": "I64"}
AGAIN = "diffbuild calibrate RECIPE --model MODEL --output FILE writes a new one"


@dataclass(frozen=True)
class RangeFile:
    """What such a file holds.

    components  component -> ranges by weight
    about       plain data: how they came to be. `configs` has the digest of every component's config
    """

    path: Path
    components: Mapping[str, Ranges]
    about: Mapping[str, Any]

    def require_model(self, configs: Mapping[str, str]) -> None:
        """CalibrationError unless the file has ranges of these components, with these digests of their configs."""
        missing = sorted(configs.keys() - self.components.keys())
        if missing:
            expected, got = ", ".join(configs), ", ".join(self.components)
            raise CalibrationError(
                "the calibration has no ranges of a component", where=self.path, expected=expected, got=got, hint=AGAIN
            )
        stated = self.about["configs"]
        others = sorted(name for name, digest in configs.items() if stated.get(name) != digest)
        if others:
            raise CalibrationError(
                f"the calibration is of another model: the config of {', '.join(others)} differs",
                where=self.path,
                got=f"ranges of {self.about.get('model', 'a model without a name')}",
                hint=AGAIN,
            )


def write_ranges(path: Path, components: Mapping[str, Ranges], about: Mapping[str, Any]) -> None:
    """Writes `path`. `about` is plain data, with the digests of the components' configs as `configs`. WeightsError."""
    shared: dict[str, list[list[str]]] = {}
    tensors: dict[str, Any] = {}
    for component, ranges in components.items():
        groups: dict[int, list[str]] = {}
        for name, seen in ranges.items():
            groups.setdefault(id(seen), []).append(name)
        shared[component] = [*groups.values()]
        for names in groups.values():
            tensors |= {f"{component}/{names[0]}.{part}": getattr(ranges[names[0]], part) for part in PARTS}
    metadata = {FORMAT_KEY: FORMAT, "activations": json.dumps(shared), "about": json.dumps(about, sort_keys=True)}
    listed = [(name, PARTS[name.rpartition(".")[2]], array.shape) for name, array in tensors.items()]
    write_safetensors(path, listed, lambda name: np.ascontiguousarray(tensors[name]), metadata)


def read_ranges(path: Path) -> RangeFile:
    """CalibrationError for a file that is damaged, or not of this kind, with every tensor that is wrong in it."""
    if not path.is_file():
        raise CalibrationError("there is no such calibration file", where=path, hint=AGAIN)
    try:
        metadata = read_metadata(path)
        mapped = MappedWeights(path)
    except WeightsError as error:
        raise CalibrationError(
            "the calibration cannot be read", where=error.where, expected=error.expected, got=error.what, hint=AGAIN
        ) from error
    got = metadata.get(FORMAT_KEY)
    if got != FORMAT:
        raise CalibrationError(
            "the file is no calibration of this version" if got else "the file is no calibration",
            where=path,
            expected=f"safetensors with {FORMAT_KEY} = {FORMAT} in its metadata",
            got=got,
            hint=AGAIN,
        )
    try:
        shared: dict[str, list[list[str]]] = json.loads(metadata["activations"])
        about: dict[str, Any] = json.loads(metadata["about"])
        groups = [(component, names) for component, lists in shared.items() for names in lists if names[0] and names]
        if not isinstance(about["configs"], dict):
            raise TypeError("configs is no table")
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CalibrationError(
            "the calibration's metadata are damaged", where=path, got=f"{type(error).__name__}: {error}", hint=AGAIN
        ) from error
    if problems := [*_problems(mapped, groups)]:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise CalibrationError("the calibration is damaged:\n    " + "\n    ".join(shown), where=path, hint=AGAIN)
    components: dict[str, dict[str, Range]] = {component: {} for component in shared}
    for component, names in groups:
        seen = Range(*(mapped.array(f"{component}/{names[0]}.{part}") for part in PARTS))
        components[component] |= dict.fromkeys(names, seen)
    return RangeFile(path, components, about)


def _problems(mapped: MappedWeights, groups: Iterable[tuple[str, list[str]]]) -> Iterator[str]:
    """What is wrong with the tensors, each "TENSOR: what"."""
    for component, names in groups:
        tensors = {part: f"{component}/{names[0]}.{part}" for part in PARTS}
        missing = [name for name in tensors.values() if name not in mapped.refs]
        yield from (f"{name}: missing" for name in missing)
        if missing:
            continue
        for part, name in tensors.items():
            ref = mapped.refs[name]
            steps = mapped.refs[tensors["peaks"]].shape[:1]
            right = {"peaks": len(ref.shape) == 2 and 0 not in ref.shape, "means": ref.shape == steps}
            if ref.dtype != PARTS[part] or not right.get(part, ref.shape == (BINS,)):
                yield f"{name}: not of such a shape or type: {ref.dtype} {list(ref.shape)}"
            elif not np.isfinite(array := mapped.array(name)).all():
                yield f"{name}: infinite or NaN"
            elif (array < 0).any():
                yield f"{name}: negative"
            elif part == "counts" and not array.any():
                yield f"{name}: counts nothing"
