"""What of a table `[components.NAME.quantize]` does not fit together, told while planning."""

from __future__ import annotations

from dataclasses import asdict

from toolchain.precision.ranges import parse_method
from toolchain.recipe import Quantize
from toolchain.store.artifacts import Json

CALIBRATED = ("denoiser", "vae_decoder")
"""The components whose activations a calibration watches: all that a picture's pixels pass through."""
VAE = ("vae_decoder", "vae_encoder")


def quantize_problems(component: str, quantize: Quantize) -> list[str]:
    """Each from the key on, with what is expected."""
    problems = []
    try:
        parse_method(quantize.ranges)
    except ValueError as error:
        problems.append(f"ranges: unknown method ({error}, got {quantize.ranges!r})")
    if quantize.activations == "none":
        unused = (("ranges", quantize.ranges != "max"), ("smoothing", quantize.smoothing > 0))
        expected = 'expected activations = "int8" or "float8" beside it'
        problems += [f"{key}: needs activations ({expected})" for key, set_ in unused if set_]
    elif quantize.weights != quantize.activations:
        got = quantize.weights
        expected = '"none"' if got == "int4" else f'"{got}" or "none"'
        problems.append(f"activations: only beside weights of the same type (expected {expected}, weights are {got})")
    elif component not in CALIBRATED:
        can = " and ".join(CALIBRATED)
        problems.append(f'activations: no ranges are known of {component} (expected "none"; {can} have some)')
    return problems + _of_weights(component, quantize)


def _of_weights(component: str, quantize: Quantize) -> list[str]:
    problems = []
    if quantize.block_size and quantize.weights != "int4":
        problems.append(f"block_size: only int4 has blocks (expected no such key, weights are {quantize.weights})")
    coarse = quantize.weights == "float8" and component in VAE
    if coarse and not quantize.insist:
        problems.append(
            "weights: float8 has three bits of mantissa, too few for what a VAE draws "
            "(expected int8, or insist = true beside it)"
        )
    if quantize.insist and not coarse:
        problems.append("insist: nothing of this table has to be insisted on (expected no such key)")
    return problems


def decisive(table: Quantize | None) -> dict[str, Json] | None:
    """What of a component's table decides its weights and engines, and not its graph."""
    if table is None:
        return None
    values = {key: value for key, value in asdict(table).items() if key not in ("block_size", "insist")}
    return {**values, "exclude": [*sorted(table.exclude)], "block": table.block}
