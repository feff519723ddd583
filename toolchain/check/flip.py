"""FLIP: how different two pictures look when one flips to the other in the same place, by NVIDIA's flip-evaluator.

It comes with the extra `metrics`, as it has no wheels for some machines; without it pictures have no FLIP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

INSTALL = "pip install 'diffbuild[metrics]'"


def mean_flip(reference: NDArray[np.uint8], compiled: NDArray[np.uint8]) -> float | None:
    """The mean FLIP error of two pictures [H, W, 3] in 8-bit sRGB: 0 where they are equal, 1 at most.

    At FLIP's own 67 pixels per degree, a screen at arm's length. None where flip-evaluator is not installed.
    """
    try:
        import flip_evaluator
    except ImportError:
        return None
    import numpy as np

    pair = (np.ascontiguousarray(pixels, np.float32) / 255 for pixels in (reference, compiled))
    _, mean, _ = flip_evaluator.evaluate(*pair, "LDR", applyMagma=False)
    return float(mean)
