"""A diffusers model on disk: its configs and what they say of each component."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from toolchain.errors import ModelError

# The shards' numbers stand before or after the variant, as the writer's version had it.
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.safetensors"
)
# Of transformers, where the text encoder's config inside of a whole CLIPModel's is silent.
CLIP_DEFAULTS = {"hidden_size": 512, "projection_dim": 512}
LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True)
class ModelSource:
    """A diffusers model on disk. `name` is what the user asked for, `revision` the hub commit it came from."""

    path: Path
    name: str
    revision: str | None

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of model_index.json."""
        return self._json(self.path / "model_index.json")

    def config(self, folder: str) -> dict[str, Any]:
        """The config of one component as the libraries read it: of a whole CLIPModel, that of its text encoder."""
        config = self.config_file(folder)
        nested = config.get("text_config") if folder.startswith("text_encoder") else None
        return CLIP_DEFAULTS | nested if isinstance(nested, dict) else config

    def config_file(self, folder: str) -> dict[str, Any]:
        """The whole config file of a component, scheduler, tokenizer or feature extractor. ModelError.

        The scheduler's class is the one in model_index.json, as in diffusers, whatever its own file says.
        """
        names = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
        names["feature"] = "preprocessor_config.json"
        kind = folder.partition("_")[0]  # tokenizer_2 is a tokenizer too
        config = self._json(self.path / folder / names.get(kind, "config.json"))
        return config | {"_class_name": self.class_of(folder)} if folder == "scheduler" else config

    def setting(self, folder: str, key: str) -> Any:
        """One entry of a component's config; ModelError where it is missing."""
        config = self.config(folder)
        if key not in config:
            where = self.path / folder / "config.json"
            raise ModelError("the config lacks a setting", where=where, expected=key, hint="download the folder again")
        return config[key]

    def variant(self, folder: str) -> str | None:
        """The variant of a component's weights, such as "fp16", where there is only that one; else None."""
        names = (path.name for path in (self.path / folder).glob("*.safetensors"))
        variants = {match["variant"] for match in map(WEIGHTS.fullmatch, names) if match}
        return variants.pop() if len(variants) == 1 else None

    def has_weights(self, folder: str) -> bool:
        """Whether a component's folder holds any safetensors file."""
        return any((self.path / folder).glob("*.safetensors"))

    def class_of(self, folder: str) -> str:
        """The class that model_index.json gives a component; ModelError when absent or from a foreign library."""
        entry = self.index.get(folder)
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)):
            raise ModelError(
                f"the model has no {folder}",
                where=self.path / "model_index.json",
                expected=f'"{folder}": ["library", "Class"]',
                got=json.dumps(entry),
            )
        library, name = entry
        if library not in LIBRARIES:
            raise ModelError(
                f"the {folder} needs code from outside diffusers and transformers, which is not run",
                where=self.path / "model_index.json",
                expected=" or ".join(LIBRARIES),
                got=library,
                hint="convert the model to the library's own classes, or drop the component",
            )
        return str(name)

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(
                f"{path.name} is missing from the model",
                where=path,
                hint="a diffusers folder holds model_index.json and one folder per component; download it again",
            ) from None
        except (OSError, ValueError) as error:
            raise ModelError(f"{path.name} cannot be read", where=path, expected="a JSON object", got=error) from error
        if not isinstance(data, dict):
            raise ModelError(f"{path.name} is not a JSON object", where=path, got=type(data).__name__)
        return data
