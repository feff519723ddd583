"""diffusers without its log lines and warnings."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_QUIET = threading.RLock()
"""Log level and warning filters are the process's: two threads at once would leave each other's behind."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silences diffusers' log lines and deprecation warnings, which address authors of pipelines."""
    from diffusers.utils import logging

    with _QUIET:
        level = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.set_verbosity(level)
