"""What makes the tiny model of each family. Tests that change nothing in it take the fixture `family_model`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.tiny import make_sd
from tests.tiny_flux import make_flux
from tests.tiny_sd3 import make_sd3
from tests.tiny_sdxl import make_sdxl

MAKERS: dict[str, Callable[[Path], Path]] = {"sd": make_sd, "sdxl": make_sdxl, "sd3": make_sd3, "flux": make_flux}
