"""Settings that no family covers, whatever component has them: code of a model's own, and quantised weights."""

from __future__ import annotations

from typing import Any

from toolchain.errors import ModelError
from toolchain.models.source import ModelSource
from toolchain.weights.mapped import NOT_QUANTIZED

BUILT_IN_ATTENTION = ("eager", "sdpa")


def refuse_quantized(source: ModelSource, folder: str) -> None:
    """ModelError for a component whose config says how its weights were quantised."""
    quantized = source.config_file(folder).get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method", quantized) if isinstance(quantized, dict) else quantized
        raise ModelError(
            f"the {folder} is quantised, which is not supported",
            where=source.path / folder / "config.json",
            expected="no quantization_config",
            got=f"quant_method = {method!r}",
            hint=NOT_QUANTIZED,
        )


def refuse_code(source: ModelSource, folder: str) -> None:
    """Settings, at any depth, that make transformers or diffusers fetch code from the hub and run it. ModelError."""

    def visit(value: Any, path: str) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            name = f"{path}.{key}" if path else str(key)
            is_map, is_attention = key == "auto_map", "attn_implementation" in str(key)
            if (is_map and inner is not None) or (is_attention and _names_code(inner)):
                raise ModelError(
                    f"the {folder}'s config asks for code of its own, which is not run",
                    where=source.path / folder / "config.json",
                    got=f"{name} = {inner!r}",
                    hint="remove the setting from the config",
                )
            visit(inner, name)

    visit(source.config_file(folder), "")


def _names_code(attention: Any) -> bool:
    """Older releases of transformers wrote true or false under a name like these; one name per part is a table."""
    if isinstance(attention, dict):
        return any(map(_names_code, attention.values()))
    return not isinstance(attention, bool) and attention not in (None, *BUILT_IN_ATTENTION)
