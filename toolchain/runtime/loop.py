"""The denoising loop: nothing is left to do between two steps but launch the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence


def denoise(
    launches: tuple[Callable[[], None], Callable[[], None]],
    draws: Sequence[int],
    upload_noise: Callable[[], None],
) -> Iterator[int]:
    """Launches one step per entry of `draws` and yields its index after each.

    The two launches read one state buffer and write the other; the state after step i lies in buffer (i + 1) % 2. The
    step counter, the timesteps and the sampler's coefficients live in the buffers, so that a launch takes no argument.
    Fresh noise is uploaded before a step whose scheduler draws some. To stop early, stop iterating.
    """
    for index, draw in enumerate(draws):
        if draw:
            upload_noise()
        launches[index % 2]()
        yield index
