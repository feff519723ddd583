"""What of a table `[components.NAME.quantize]` does not fit together, told while planning."""

from __future__ import annotations

from toolchain.precision.ranges import parse_method
from toolchain.recipe import Quantize

CALIBRATED = ("denoiser", "vae_decoder")
"""The components whose activations a calibration watches: all that a picture's pixels pass through."""


def quantize_problems(component: str, quantize: Quantize) -> list[str]:
    """Each from the key on, with what is expected."""
    problems = []
    try:
        parse_method(quantize.ranges)
    except ValueError as error:
        problems.append(f"ranges: unknown method ({error}, got {quantize.ranges!r})")
    if quantize.activations == "none":
        unused = (("ranges", quantize.ranges != "max"), ("smoothing", quantize.smoothing > 0))
        problems += [
            f'{key}: needs activations (expected activations = "int8" beside it)' for key, set_ in unused if set_
        ]
    elif component not in CALIBRATED:
        can = " and ".join(CALIBRATED)
        problems.append(f'activations: no ranges are known of {component} (expected "none"; {can} have some)')
    return problems
