"""What the commands print: one JSON document, or text for people. Imports nothing heavy."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.errors import DiffbuildError
from toolchain.store.plain_json import encode
from toolchain.terminal import lines, table

if TYPE_CHECKING:
    from toolchain.builder.plan import Plan
    from toolchain.builder.steps import Step
    from toolchain.bundle.bundle import Bundle
    from toolchain.bundle.forecast import EngineMemory, Forecast
    from toolchain.bundle.signing import Signature, Verdict
    from toolchain.cli.progress import Finished
    from toolchain.runtime.result import Timings
    from toolchain.store.artifacts import Artifact, GcReport, Store

SCHEMA = 1
"""Of every JSON document. Raised when a field goes or changes its meaning, not when one is added."""
RENAMED = "recipe.name"
"""What a step says has changed where it was compared with a recipe of another name."""
MADE_OF = ("graph", "weights", "packed")
"""Inputs of a step that are keys of other steps: what changed in those is told there."""


def document(data: Mapping[str, Any]) -> None:
    """Prints the one JSON document of a command."""
    own = {key: value for key, value in data.items() if key != "schema"}
    click.echo(encode({"schema": SCHEMA, **own}))


def failure(error: DiffbuildError, as_json: bool) -> None:
    """An error on stderr, and as a document on stdout where a program reads it."""
    lines(f"error: {error}".splitlines(), err=True)
    if as_json:
        document({"error": _parts(error)})


def _parts(error: DiffbuildError) -> dict[str, str | None]:
    parts = {name: getattr(error, name) for name in ("what", "where", "expected", "got", "hint")}
    return {k: v if v is None else str(v) for k, v in parts.items()}


def megabytes(size: int) -> str:
    """A size in bytes as people write it: decimal units, one digit behind the point."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= one:
            return f"{size / one:.1f} {unit}"
    return f"{size} B"


# --- plan and build ---------------------------------------------------------------------------------------------------


CHECKER_STATES = {
    "compiled": "safety checker: compiled; pictures that it flags are black",
    "left out": "safety checker: the model comes with one or requires one, and it is left out; "
    "[safety] checker = true in the recipe compiles it",
}
"""By what `models.safety.state` says; nothing of models that have none."""


def plan_json(plan: Plan) -> dict[str, Any]:
    from toolchain.builder.forecast import planned

    steps = [{"stage": s.stage, "subject": s.subject, "key": s.key, "hit": s.hit} for s in plan.steps]
    for entry, step in zip(steps, plan.steps, strict=True):
        entry["changed"] = list(step.changed)
        if plan.refused and "device" in step.inputs:
            entry["key"] = None  # it is tied to a device, and which is not known here
    source = {"name": plan.source.name, "path": str(plan.source.path), "revision": plan.source.revision}
    totals = {"hits": len(plan.steps) - plan.misses, "misses": plan.misses}
    memory = [engine.to_json() for engine in planned(plan)]
    where: dict[str, Any] = {"recipe": plan.recipe.name, "model": source, "store": str(plan.store.root)}
    where["safety_checker"] = plan.safety_checker
    where |= {"backend": plan.backend.name, "device": plan.device, "refused": plan.refused and _parts(plan.refused)}
    return {**where, "steps": steps, "memory": memory, **totals}


def plan_lines(plan: Plan) -> Iterator[str]:
    from toolchain.builder.forecast import planned

    revision = f" at {plan.source.revision}" if plan.source.revision else ""
    yield f"recipe {plan.recipe.name}, model {plan.source.name}{revision}, store {plan.store.root}"
    if plan.refused:
        yield f"engines by {plan.backend.name} cannot be built here: {plan.refused}"
    if plan.device:
        yield f"engines by {plan.backend.name} for {device_line(plan.device)}"
    if plan.safety_checker:
        yield CHECKER_STATES[plan.safety_checker]
    renamed = next((c for step in plan.steps for c in step.changed if c.startswith(RENAMED)), None)
    if renamed:
        yield f"compared with a recipe of another name, as this one was never built: {renamed.partition(': ')[2]}"
    rows = []
    for step in plan.steps:
        first, *others = [""] if step.hit else _reasons(step, plan)
        rows.append(["hit" if step.hit else "miss", str(step.id), first])
        rows += [["", "", other] for other in others]
    yield from table(rows)
    yield f"{len(plan.steps)} steps: {len(plan.steps) - plan.misses} hits, {plan.misses} misses"
    known = planned(plan)
    if known:
        yield "memory, of what is built or at least exported:"
    yield from memory_lines(known)


def device_line(device: Mapping[str, Any]) -> str:
    """What engines are tied to, in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in device.items())


def _reasons(step: Step, plan: Plan) -> list[str]:
    """Why a step is a miss. A changed key says to people only that it is made from something new; digests are cut."""
    if plan.refused and "device" in step.inputs:
        return ["cannot be built here"]
    fields = [change.partition(": ") for change in step.changed if not change.startswith(RENAMED)]
    own = [
        f"{field}: " + re.sub(r"[0-9a-f]{13,}", lambda m: m[0][:12], v)
        for field, _, v in fields
        if field not in MADE_OF
    ]
    made_of = ", ".join(field for field, _, _ in fields if field in MADE_OF)
    return own + ([f"made from new {made_of}"] if made_of else []) or ["not built yet"]


def build_json(bundle: Bundle, finished: Sequence[Finished], seconds: float) -> dict[str, Any]:
    steps = [
        {"stage": f.step.stage, "subject": f.step.subject, "key": f.step.key, "result": f.what, "seconds": f.seconds}
        for f in finished
    ]
    built = sum(f.what == "built" for f in finished)
    totals = {"hits": len(steps) - built, "built": built, "seconds": seconds}
    size = sum(entry.size for entry in bundle.files.values())
    told = {"buckets": _buckets(bundle), "safety_checker": bundle.model.get("safety_checker")}
    return {"bundle": str(bundle.path), "bytes": size, **told, "steps": steps, **totals}


def build_lines(bundle: Bundle, finished: Sequence[Finished], seconds: float) -> Iterator[str]:
    from toolchain.engines.registry import backend_of  # numpy comes with it, which --help need not wait for

    built = sum(f.what == "built" for f in finished)
    size = megabytes(sum(entry.size for entry in bundle.files.values()))
    yield f"{bundle.path}: {size}, {len(finished)} steps: {built} built, {len(finished) - built} hits, {seconds:.1f} s"
    yield from _checker(bundle)
    elsewhere = backend_of(bundle.backend).available()
    if elsewhere is None:
        yield f'next: diffbuild generate {bundle.path} "a prompt" --seed 0'
    else:
        yield f"it does not run here: {elsewhere}"
        yield f"next: diffbuild inspect {bundle.path}, which says where it does"


# --- bundles ----------------------------------------------------------------------------------------------------------


def _buckets(bundle: Bundle) -> list[str]:
    return [str(bucket) for bucket in bundle.buckets]


def _prompts(bundle: Bundle) -> dict[str, int]:
    """How many tokens each text encoder takes, by its name."""
    specs = {name: bundle.engine(name, bundle.buckets[0]).spec for name in bundle.tokenizers}
    return {name: spec.input("ids").shape[1] for name, spec in specs.items()}


def _checker(bundle: Bundle) -> list[str]:
    """What became of the model's safety checker, as a line; older bundles do not know."""
    state = bundle.model.get("safety_checker")
    return [CHECKER_STATES[state]] if state in CHECKER_STATES else []


def _component_bytes(bundle: Bundle, component: str) -> dict[str, int]:
    """Bytes of a component: by role for the weight files that buckets share, by bucket or "profiles" for engines."""
    sizes: dict[str, int] = {}
    for entry in bundle.engines[component].values():
        sizes |= {role: bundle.files[name].size for role, name in entry.weights.items()}
        engine = Path(entry.folder).name
        sizes[engine] = sum(f.size for name, f in bundle.files.items() if name.startswith(f"{entry.folder}/"))
    return sizes


def memory_lines(engines: Sequence[EngineMemory]) -> Iterator[str]:
    """A table of what each engine takes."""
    if not engines:
        return
    head = ["", "weights", "session", "buffers", "activations", "arena", "together"]
    rows = []
    for e in engines:
        told = "unknown" if e.activations is None else megabytes(e.activations)
        sizes = [megabytes(size) for size in (e.weights, e.session, e.buffers)]
        rows.append([e.name + ("" if e.built else ", exported"), *sizes, told, megabytes(e.arena), megabytes(e.total)])
    yield from table(rows, head=head)


def forecast_lines(found: Forecast) -> Iterator[str]:
    if found.total is None:
        yield f"memory forecast: none, as too little is written down of {', '.join(found.unknown)}"
    elif found.on_gpu:
        yield (
            f"memory forecast: {megabytes(found.total)} of the GPU; the engines take turns with their activations, and "
            "buckets of one engine share its weights"
        )
    else:
        rest = f"{megabytes(found.runtime)} of it for tokenizers and libraries"
        yield f"memory forecast: {megabytes(found.total)} once every bucket has drawn, {rest}"
    yield from memory_lines(found.engines)


def bundle_json(bundle: Bundle, refused: str | None, verified: bool) -> dict[str, Any]:
    from toolchain.bundle.forecast import forecast
    from toolchain.cli.inspection import engine_facts

    listed = {
        "bundle": str(bundle.path),
        "family": bundle.family,
        "model": bundle.model,
        "recipe": bundle.recipe.to_json(),
        "backend": bundle.backend,
        "device": bundle.device,
        "runs_here": refused is None,
        "refused": refused,
        "buckets": _buckets(bundle),
        "components": {c: {"bytes": _component_bytes(bundle, c)} for c in bundle.engines},
        "prompts": _prompts(bundle),
        "engines": engine_facts(bundle),
        "memory": forecast(bundle).to_json(),
        "samplers": list(bundle.samplers),
        "tools": bundle.tools,
        "bytes": sum(entry.size for entry in bundle.files.values()),
        "files": {name: {"sha256": f.sha256, "bytes": f.size} for name, f in bundle.files.items()},
    }
    return {**listed, "verified": verified}


def bundle_lines(bundle: Bundle, refused: str | None, verified: bool) -> Iterator[str]:
    from toolchain.bundle.forecast import forecast
    from toolchain.cli.inspection import engine_lines
    from toolchain.sampler.table import describe_tables

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
        ["buckets", ", ".join(_buckets(bundle)) + " (batch x height x width)"],
        ["prompts", ", ".join(f"{name} {tokens} tokens" for name, tokens in _prompts(bundle).items())],
        ["samplers", ", ".join(describe_tables(bundle.samplers)) + " (scheduler/steps)"],
        *(text.split(": ", 1) for text in _checker(bundle)),
        ["built with", ", ".join(f"{name} {version}" for name, version in bundle.tools.items())],
    ]
    for component in bundle.engines:
        dtype = bundle.recipe.component(component).dtype
        sizes = _component_bytes(bundle, component)
        rows.append([component, f"{dtype}, " + ", ".join(f"{what} {megabytes(n)}" for what, n in sizes.items())])
    total = megabytes(sum(entry.size for entry in bundle.files.values()))
    checked = "every sha256 is right" if verified else "sha256 not compared (--verify does)"
    yield from table([*rows, ["files", f"{len(bundle.files)}, {total}; {checked}"]], indent="")
    yield from forecast_lines(forecast(bundle))
    yield from engine_lines(bundle)


def sign_json(bundle: Path, signature: Signature) -> dict[str, Any]:
    return {"bundle": str(bundle), "key": signature.key}


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "bundle": str(verdict.bundle),
        "files": verdict.files,
        "signed_by": None if verdict.signature is None else verdict.signature.key,
        "compared_with": verdict.compared,
        "problems": [_parts(problem) for problem in verdict.problems],
    }


def verdict_lines(verdict: Verdict) -> Iterator[str]:
    yield from (str(problem) for problem in verdict.problems)
    if verdict.problems:
        return
    yield f"{verdict.bundle}: all {verdict.files} files are as they were built"
    if verdict.signature is None:
        yield "unsigned: nothing tells who built it (diffbuild sign does)"
    elif verdict.compared is None:
        yield f"says to be signed by the key {verdict.signature.key}, which was not compared (--key does)"
    else:
        yield f"signed by the key {verdict.compared}"


def generate_lines(images: Sequence[Mapping[str, Any]], timings: Timings, load_ms: float) -> Iterator[str]:
    for image in images:
        yield f"{image['path']}  seed {image['seed']}"
    steps = len(timings.steps_ms)
    each = f" ({timings.denoise_ms / steps:.1f} ms each)" if steps else ""
    yield (
        f"loaded in {load_ms / 1e3:.2f} s, generated in {timings.total_ms / 1e3:.2f} s: "
        + (f"compiling the sampler table {timings.table_ms:.0f} ms, " if timings.table_ms else "")
        + f"text {timings.text_ms:.0f} ms, "
        f"{steps} steps {timings.denoise_ms:.0f} ms{each}, decoding {timings.decode_ms:.0f} ms"
    )


# --- the store --------------------------------------------------------------------------------------------------------


def _size(artifact: Artifact) -> int:
    return sum(record.size for record in artifact.files.values())


def cache_json(store: Path, artifacts: Sequence[Artifact]) -> dict[str, Any]:
    entries = [{"stage": a.stage, "subject": a.subject, "key": a.key, "bytes": _size(a)} for a in artifacts]
    return {"store": str(store), "artifacts": entries, "bytes": sum(_size(a) for a in artifacts)}


def cache_lines(store: Path, artifacts: Sequence[Artifact]) -> Iterator[str]:
    if not artifacts:
        yield f"{store}: no artifacts" + ("" if store.is_dir() else "; there is no such folder")
        return
    now = time.time()
    rows = []
    for artifact in artifacts:
        used = _age(now - (artifact.path / "manifest.json").stat().st_mtime)
        rows.append([artifact.stage, artifact.subject, megabytes(_size(artifact)), used, artifact.key[:12]])
    yield from table(rows, head=["stage", "subject", "size", "used", "key"], indent="")
    yield f"{store}: {len(artifacts)} artifacts, {megabytes(sum(_size(a) for a in artifacts))}"


def _age(seconds: float) -> str:
    for unit, one in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= one:
            return f"{seconds / one:.0f} {unit} ago"
    return "just now"


def damage(store: Store, quarantine: bool) -> list[dict[str, Any]]:
    """What `Store.verify` finds; with `quarantine` the damaged artifacts are moved aside, each once."""
    moved: dict[Path, str | None] = {}
    found = []
    for place, problem in store.verify():
        path = place if isinstance(place, Path) else place.path
        if path not in moved:
            moved[path] = str(store.quarantine(path.parent.name, path.name)) if quarantine else None
        found.append({"path": str(path), "problem": problem, "moved_to": moved[path]})
    return found


def damage_lines(store: Path, problems: Sequence[Mapping[str, Any]], count: int) -> Iterator[str]:
    if not problems:
        yield f"{store}: all {count} artifacts are whole"
        return
    for problem in problems:
        moved = f"; moved to {problem['moved_to']}" if problem["moved_to"] else ""
        yield f"damaged: {problem['path']}: {problem['problem']}{moved}"
    if not all(problem["moved_to"] for problem in problems):
        yield "to have them made anew: diffbuild cache verify --quarantine, then build again"


def gc_json(store: Path, report: GcReport, dry_run: bool) -> dict[str, Any]:
    return {
        "store": str(store),
        "dry_run": dry_run,
        "removed": dict(report.removed),
        "kept": dict(report.kept),
        "leftovers": dict(report.leftovers),
        "dropped_bundles": list(report.dropped_bundles),
        "bytes_freed": report.bytes_freed,
    }


def gc_lines(store: Path, report: GcReport, dry_run: bool) -> Iterator[str]:
    verb = "would remove" if dry_run else "removed"
    for name, size in [*report.removed.items(), *report.leftovers.items()]:
        yield f"{verb} {name}, {megabytes(size)}"
    for bundle in report.dropped_bundles:
        yield f"{'would forget' if dry_run else 'forgot'} the bundle {bundle}, which is gone"
    in_use = sum(reason.startswith("part of ") for reason in report.kept.values())
    yield (
        f"{store}: {verb} {len(report.removed)} artifacts and {len(report.leftovers)} leftovers, "
        f"{megabytes(report.bytes_freed)}; kept {in_use} that bundles need and {len(report.kept) - in_use} used lately"
    )
