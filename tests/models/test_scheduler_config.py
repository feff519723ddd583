"""The scheduler of a model is the one that the diffusers pipeline holds once it is loaded."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest

from tests.sampler.scheduler_configs import FLOW, SD
from toolchain.models.hub import resolve_model
from toolchain.models.sd_components import scheduler_config
from toolchain.sampler.schedulers import create, parse
from toolchain.sampler.silence import quiet

SILENT = {key: value for key, value in SD.items() if key not in ("clip_sample", "steps_offset", "_class_name")}
LOADED: list[tuple[str, str, dict[str, Any]]] = [
    ("StableDiffusionPipeline", "PNDMScheduler", SD),
    ("StableDiffusionPipeline", "EulerDiscreteScheduler", SD),
    ("StableDiffusionPipeline", "DDIMScheduler", SILENT),
    ("StableDiffusionPipeline", "PNDMScheduler", SILENT),
    ("StableDiffusionPipeline", "DDIMScheduler", SILENT | {"clip_sample": True, "steps_offset": 0}),
    ("StableDiffusionPipeline", "EulerDiscreteScheduler", SILENT | {"clip_sample": True, "steps_offset": 3}),
    ("StableDiffusionXLPipeline", "DDPMScheduler", SD | {"clip_sample": True, "steps_offset": 0}),
    ("StableDiffusionXLPipeline", "EulerDiscreteScheduler", SILENT),
    ("StableDiffusion3Pipeline", "FlowMatchHeunDiscreteScheduler", FLOW),
    ("FluxPipeline", "FlowMatchEulerDiscreteScheduler", FLOW | {"_class_name": "DPMSolverMultistepScheduler"}),
]


def loaded(folder: Path, pipeline: str) -> Any:
    """The scheduler of the real pipeline, which needs no network for it."""
    cls = getattr(diffusers, pipeline)
    parts = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "scheduler")]
    kwargs = {name: None for name in parts if not name.startswith(("requires", "force", "add_"))}
    with quiet():
        return cls.from_pretrained(folder, **kwargs).scheduler


def settings_of(scheduler: Any) -> dict[str, Any]:
    return {key: scheduler.config[key] for key in inspect.signature(type(scheduler)).parameters}


@pytest.mark.parametrize(("pipeline", "cls", "config"), LOADED)
def test_class_and_settings_are_those_of_the_loaded_pipeline(
    tmp_path: Path, pipeline: str, cls: str, config: dict[str, Any]
) -> None:
    """And of a scheduler that a user puts in its place, made from its config."""
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    index = {"_class_name": pipeline, "_diffusers_version": "0.42.0", "scheduler": ["diffusers", cls]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    source = resolve_model(str(tmp_path))
    ours = scheduler_config(source) if pipeline == "StableDiffusionPipeline" else source.config("scheduler")
    theirs = loaded(tmp_path, pipeline)
    assert type(create(parse("model"), ours)) is type(theirs) is getattr(diffusers, cls)
    assert settings_of(create(parse("model"), ours)) == settings_of(theirs)
    for name in ("flow-euler", "flow-heun") if "Flow" in cls else ("ddim", "ddpm", "euler", "heun", "pndm"):
        other = create(parse(name), ours)
        assert settings_of(other) == settings_of(type(other).from_config(theirs.config)), name
