"""`diffbuild inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain import api
from toolchain.cli import progress
from toolchain.cli.console import answer, bundle_argument, examples, json_option, verbosity
from toolchain.cli.text import checker_lines, gate_lines, megabytes, memory_lines, quantized_lines, ranges_lines
from toolchain.terminal import table

if TYPE_CHECKING:
    from toolchain.bundle.bundle import Bundle
    from toolchain.bundle.forecast import Forecast
    from toolchain.bundle.inspection import Inspection


@click.command(epilog=examples("diffbuild inspect bundle --verify", "diffbuild inspect bundle --json"))
@bundle_argument
@click.option("--verify", is_flag=True, help="Compare every file with its sha256.")
@json_option
@verbosity
def inspect(bundle: Path, verify: bool, as_json: bool) -> None:
    """Show what a bundle holds, and whether it can run here."""
    with progress.working("comparing digests") if verify else nullcontext():
        inspection = api.inspect_bundle(bundle, verify=verify)
    answer(as_json, lambda: bundle_json(inspection), lambda: bundle_lines(inspection))


def bundle_json(inspection: Inspection) -> dict[str, Any]:
    """The document of `inspect`."""
    bundle = inspection.bundle
    return {
        "bundle": str(bundle.path),
        "family": bundle.family,
        "model": bundle.model,
        "recipe": bundle.recipe.to_json(),
        "backend": bundle.backend,
        "device": bundle.device,
        "runs_here": inspection.refused is None,
        "refused": inspection.refused,
        "buckets": [str(bucket) for bucket in bundle.buckets],
        "components": {c: {"bytes": _component_bytes(bundle, c)} for c in bundle.engines},
        "prompts": _prompts(bundle),
        "engines": inspection.engines,
        "quantized": inspection.quantized,
        "gate": bundle.gate,
        "memory": inspection.memory.to_json(),
        "samplers": list(bundle.samplers),
        "tools": bundle.tools,
        "bytes": sum(entry.size for entry in bundle.files.values()),
        "files": {name: {"sha256": f.sha256, "bytes": f.size} for name, f in bundle.files.items()},
        "verified": inspection.verified,
    }


def bundle_lines(inspection: Inspection) -> Iterator[str]:
    """What `inspect` prints."""
    from toolchain.sampler.table import describe_tables  # numpy comes with it, which --help need not wait for

    bundle, refused = inspection.bundle, inspection.refused
    model = bundle.model
    at = f" at {model['revision']}" if model.get("revision") else ""
    sampling = bundle.recipe.sampling
    rows = [
        ["bundle", str(bundle.path)],
        ["model", f"{model.get('name')}{at} ({model.get('pipeline')}, family {bundle.family})"],
        ["recipe", bundle.recipe.name],
        ["defaults", f"{sampling.scheduler}, {sampling.steps} steps, guidance {bundle.default_guidance:g}"],
        ["device", f"{bundle.backend}: " + ", ".join(f"{k} {v}" for k, v in bundle.device.items())],
        ["runs here", "yes" if refused is None else f"no: {refused}"],
        ["buckets", ", ".join(map(str, bundle.buckets)) + " (batch x height x width)"],
        ["prompts", ", ".join(f"{name} {tokens} tokens" for name, tokens in _prompts(bundle).items())],
        ["samplers", ", ".join(describe_tables(bundle.samplers)) + " (scheduler/steps)"],
        *(text.split(": ", 1) for text in checker_lines(model.get("safety_checker"))),
        *(text.split(": ", 1) for text in ranges_lines(model.get("ranges"))),
        ["built with", ", ".join(f"{name} {version}" for name, version in bundle.tools.items())],
        *(_component_row(bundle, component) for component in bundle.engines),
    ]
    total = megabytes(sum(entry.size for entry in bundle.files.values()))
    checked = "every sha256 matches" if inspection.verified else "sha256 not compared (--verify does)"
    yield from table([*rows, ["files", f"{len(bundle.files)}, {total}; {checked}"]], indent="")
    yield from quantized_lines(inspection.quantized)
    yield from gate_lines(bundle.gate)
    yield from forecast_lines(inspection.memory)
    yield from engine_lines(inspection)


def _component_row(bundle: Bundle, component: str) -> list[str]:
    sizes = ", ".join(f"{part} {megabytes(size)}" for part, size in _component_bytes(bundle, component).items())
    return [component, f"{bundle.recipe.component(component).dtype}, {sizes}"]


def _prompts(bundle: Bundle) -> dict[str, int]:
    """How many tokens each text encoder takes, by its name."""
    specs = {name: bundle.engine(name, bundle.buckets[0]).spec for name in bundle.tokenizers}
    return {name: spec.input("ids").shape[1] for name, spec in specs.items()}


def _component_bytes(bundle: Bundle, component: str) -> dict[str, int]:
    """Bytes of a component: by role for the weight files that buckets share, by bucket or "profiles" for engines."""
    sizes: dict[str, int] = {}
    for entry in bundle.engines[component].values():
        sizes |= {role: bundle.files[name].size for role, name in entry.weights.items()}
        engine = Path(entry.folder).name
        sizes[engine] = sum(f.size for name, f in bundle.files.items() if name.startswith(f"{entry.folder}/"))
    return sizes


def forecast_lines(memory: Forecast) -> Iterator[str]:
    """What the process, or the GPU, will hold, and a table of the engines."""
    if memory.total is None:
        yield f"memory forecast: none, as nothing is recorded for {', '.join(memory.unknown)}"
    elif memory.on_gpu:
        yield (
            f"memory forecast: {megabytes(memory.total)} of the GPU; the engines take turns with their activations, "
            "and buckets of one engine share its weights"
        )
    else:
        rest = f"{megabytes(memory.runtime)} of it for tokenizers and libraries"
        yield f"memory forecast: {megabytes(memory.total)} once every bucket has drawn, {rest}"
    yield from memory_lines(memory.engines)


def engine_lines(inspection: Inspection) -> Iterator[str]:
    """A table of layers by kind and type, of fused attentions, and of activations; nothing where none is known."""
    bundle, engines = inspection.bundle, inspection.engines
    if not engines:
        return
    targets = bundle.recipe.to_json()[bundle.backend].get("targets")
    compiled = "" if targets is None else f", for compute capability {', '.join(targets) or '8.0 and newer'}"
    yield f"layers, by kind and by the smallest type that they touch{compiled}:"
    rows = []
    for name, facts in engines.items():
        kinds = facts["layers"]["kinds"]
        fused = f"{facts['layers']['fused_attention']} fused"
        rows.append([name, megabytes(facts["activation_bytes"]), fused, "; ".join(map(_kind, kinds.items()))])
    yield from table(rows, head=["", "activations", "attention", "layers"])


def _kind(entry: tuple[str, Mapping[str, int]]) -> str:
    kind, counts = entry
    return f"{kind} " + ", ".join(f"{count} {dtype}" for dtype, count in counts.items())
