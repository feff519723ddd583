"""A plan -> a bundle: the artifacts of a build put together in one folder that can be moved."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from toolchain.builder.gate import Gate, pass_gate, rejected, result_of
from toolchain.builder.plan import Plan, execute
from toolchain.builder.stages.sampler import TABLES
from toolchain.builder.steps import CALIBRATION, EXPORT_TOOLS, Step, StepId, tool_versions
from toolchain.bundle.bundle import (
    ANY,
    MANIFEST,
    PROFILES,
    SIGNATURE,
    Bundle,
    EngineEntry,
    FileEntry,
    encode,
    read_bundle,
)
from toolchain.bundle.provenance import note_built
from toolchain.errors import BundleError, GateError, StoreError, UsageError
from toolchain.models import safety
from toolchain.signature import GraphSpec
from toolchain.store.artifacts import Artifact, Store, publish_folder
from toolchain.store.files import foreign_files, some

FOLDERS = ("engines/", "samplers/", "tokenizers/")
_LOG = logging.getLogger("toolchain")
FICLONE = 0x40049409  # ioctl of Linux: both files share their blocks until one is written


def assemble(
    plan: Plan,
    output: Path,
    gate: Gate,
    progress: Callable[[Step, str], None] = lambda step, what: None,
    within: Callable[[Step, str, float | None], None] = lambda step, phase, share: None,
) -> Bundle:
    """Builds what the store does not hold yet and writes the bundle, replacing an older one only when all went well.

    A bundle that was put together from the same artifacts, all still in the store, is left as it is, with its
    signature; a new bundle has none. A bundle of a quantised recipe has passed `gate` before it is at `output`, or lies
    at `rejected(output)`. Raises the errors of every stage, and GateError.
    """
    refs = [f"{step.stage}/{step.key}" for step in plan.steps]
    existing = _existing(output) if plan.misses == 0 else None
    if existing is not None and _same(existing, plan) and _complete(existing, plan.store):
        plan.store.register_bundle(output, refs)
        note_built(existing)
        for step in plan.steps:
            progress(step, "hit")
        return existing
    if plan.gate is not None:
        check_output(rejected(output))
    built = execute(plan, progress, within)
    signed = (output / SIGNATURE).exists()
    _LOG.debug("writing %s", output)

    def fill(folder: Path) -> None:
        _fill(plan, built, folder, output, gate, progress, within)

    publish_folder(output, fill, owns=_owns(output))
    plan.store.register_bundle(output, refs)
    if signed:
        _LOG.warning("%s is a new bundle, and no longer signed: diffbuild sign %s --key private.pem", output, output)
    bundle = read_bundle(output)
    note_built(bundle)
    return bundle


def _fill(
    plan: Plan,
    built: dict[StepId, Artifact],
    folder: Path,
    output: Path,
    gate: Gate,
    progress: Callable[[Step, str], None],
    within: Callable[[Step, str, float | None], None],
) -> None:
    """Writes the bundle for `output` into `folder`; where it fails the gate, moves it to where rejected ones lie."""
    writer = _Writer(plan, built, copy_file)
    bundle = writer.fill(folder)
    step = plan.gate
    if step is None:
        return
    progress(step, "start")
    try:
        artifact, checked = pass_gate(plan, bundle, output, gate, partial(within, step))
    except GateError as error:
        _set_aside(plan, replace(bundle, gate=error.gate), rejected(output))
        raise
    seal(replace(bundle, gate=result_of(artifact), artifacts={**bundle.artifacts, step.name: step.key}))
    progress(step, "built" if checked else "hit")


def _set_aside(plan: Plan, bundle: Bundle, target: Path) -> None:
    """Moves a bundle that failed the gate out of its temporary folder."""
    seal(bundle)

    def move(folder: Path) -> None:
        for entry in bundle.path.iterdir():
            entry.rename(folder / entry.name)

    publish_folder(target, move, owns=_owns(target))
    plan.store.register_bundle(target, [f"{s.stage}/{s.key}" for s in plan.steps if s.stage != "gate"])
    note_built(read_bundle(target))


def check_output(output: Path) -> None:
    """Raises UsageError for a folder that cannot be written, or has other files in it, before hours of work."""
    parent = next(p for p in [output, *output.absolute().parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        got = "no write permission" if parent.is_dir() else "a file"
        hint = "give a path in a folder that you may write to"
        raise UsageError("the output cannot be written", where=parent, expected="a writable folder", got=got, hint=hint)
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).exists():
        raise UsageError(
            "the output folder holds other files, not a bundle", where=output, hint="give a new or an empty folder"
        )
    if foreign := foreign_files(output, _owns(output)):
        raise UsageError(
            "the output folder holds other files beside the bundle",
            where=output,
            expected="only the files of the bundle, which is replaced as a whole",
            got=some(foreign),
            hint="move them elsewhere, or give a new output folder",
        )


def _owns(output: Path) -> Callable[[str], bool]:
    """Tells the files of the bundle at `output` from those that somebody else put into its folder.

    The manifest is read with the first question: what is there when the folder is replaced counts.
    """

    @cache
    def listed() -> frozenset[str] | None:
        try:
            return frozenset(json.loads((output / MANIFEST).read_text(encoding="utf-8"))["files"].keys())
        except FileNotFoundError:
            return frozenset()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None  # damaged: go by the folders that every bundle has

    def owns(name: str) -> bool:
        names = listed()
        return name in (MANIFEST, SIGNATURE) or (name.startswith(FOLDERS) if names is None else name in names)

    return owns


def _same(bundle: Bundle, plan: Plan) -> bool:
    """Whether the manifest is the one that this plan would write now, with the digests that the store knows.

    Versions of what built it may differ: what they decide is in the keys.
    """
    artifacts = {step.id: plan.store.lookup(step.stage, step.key) for step in plan.steps}
    built = {step: artifact for step, artifact in artifacts.items() if artifact is not None}
    if len(built) < len(artifacts):
        return False
    wanted = _Writer(plan, built, lambda source, target: None).bundle(bundle.path)
    first, second = (json.dumps(b.to_json(), sort_keys=True) for b in (bundle, replace(wanted, tools=bundle.tools)))
    return first == second


def _existing(output: Path) -> Bundle | None:
    try:
        return read_bundle(output)
    except BundleError:
        return None  # nothing there, or damaged: it is written anew


def _complete(bundle: Bundle, store: Store) -> bool:
    """Whether every file has its content. The store remembers digests, so that asking again costs next to nothing."""

    def whole(name: str, entry: FileEntry) -> bool:
        path = bundle.path / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.size:
            return False
        return store.digest_of(path) == entry.sha256

    return all(whole(name, entry) for name, entry in bundle.files.items())


class _Writer:
    """Puts a bundle together; `copy` is given a file of the store and its place in the bundle."""

    def __init__(self, plan: Plan, built: dict[StepId, Artifact], copy: Callable[[Path, Path], None]) -> None:
        self.plan, self.built, self._copy_file = plan, built, copy
        self.files: dict[str, FileEntry] = {}

    def fill(self, folder: Path) -> Bundle:
        """Writes the bundle into `folder`, and verifies it. Raises StoreError for a damaged artifact."""
        bundle = self.bundle(folder)
        seal(bundle)
        try:
            bundle.verify()  # the store checks sizes on lookup, and digests only when it is asked to
        except BundleError as error:
            raise StoreError(
                "an artifact in the store is damaged",
                where=self.plan.store.root,
                got=f"{error.what}: {error.where}",
                hint=f"diffbuild cache verify --quarantine --store {self.plan.store.root}, then build again",
            ) from error
        return bundle

    def bundle(self, folder: Path) -> Bundle:
        """Copies every file to its place below `folder`, and says what the manifest must."""
        plan = self.plan
        recipe = plan.recipe
        components = plan.family.parts(recipe)
        engines = {c.name: self._engines(folder, c.name) for c in components}
        samplers: dict[str, str] = {}
        for step in plan.steps:
            if step.stage == "sampler" and step.id.label != CALIBRATION:
                artifact, target = self.built[step.id], sampler_file(str(step.inputs["scheduler"]))
                self._copy(artifact, TABLES, folder, target)
                samplers |= dict.fromkeys(_tables(artifact), target)
        tokenizers = {c.name: f"tokenizers/{c.tokenizer}" for c in components if c.tokenizer}
        for target in tokenizers.values():
            tokenizer = self.built[StepId("tokenizer", Path(target).name)]
            self._copy_all(tokenizer, folder, target)
        checkpoint = {c.name: plan.step(StepId("weights", c.name)).inputs["checkpoint"] for c in components}
        settings = plan.family.settings(plan.source)
        if recipe.safety.checker:
            settings = replace(settings, safety=safety.extracted(plan.source))
        return Bundle(
            path=folder,
            model={"name": plan.source.name, "revision": plan.source.revision, "checkpoint": checkpoint}
            | {"pipeline": plan.source.index["_class_name"], "safety_checker": safety.state(plan.source, recipe)}
            | ({"ranges": dict(plan.ranges)} if plan.ranges else {}),
            family=plan.family.name,
            settings=settings,
            recipe=recipe,
            backend=plan.backend.name,
            device=plan.backend.device(),
            engines=engines,
            samplers=samplers,
            tokenizers=tokenizers,
            files=self.files,
            artifacts={step.name: step.key for step in plan.steps if step.stage != "graph" and step.id in self.built},
            tools={"diffbuild": version("diffbuild")} | {k: str(v) for k, v in tool_versions(EXPORT_TOOLS).items()},
            gate=self._gate(),
        )

    def _gate(self) -> dict[str, Any] | None:
        """What the gate said; None before it was asked, and where it has no say."""
        if self.plan.ungated is not None:
            return {"state": "not checked", "reason": self.plan.ungated}
        artifact = self.plan.gate and self.built.get(self.plan.gate.id)
        return result_of(artifact) if artifact else None

    def _engines(self, folder: Path, component: str) -> dict[str, EngineEntry]:
        plan = self.plan
        owner = plan.family.component(component)
        weights: dict[str, str] = {}
        roles: tuple[Literal["weights", "packed"], ...] = ("weights", "packed")
        for role in roles if plan.backend.reads_weights(plan.options) else ():
            artifact = self.built.get(StepId(role, component))
            if artifact is not None:
                (name,) = artifact.files
                weights[role] = f"engines/{component}/{name}"
                self._copy(artifact, name, folder, weights[role])
        entries = {}
        for bucket in plan.recipe.buckets if owner.per_bucket else [ANY]:
            engine = StepId("engine", component, str(bucket))
            if engine not in self.built:
                engine = StepId("engine", component, PROFILES)
            target = f"engines/{component}/{engine.label}"
            self._copy_all(self.built[engine], folder, target)
            signature = plan.step(StepId("graph", component, str(bucket))).inputs["signature"]
            assert isinstance(signature, dict)
            entries[str(bucket)] = EngineEntry(target, weights, GraphSpec.from_json(signature))
        return entries

    def _copy_all(self, artifact: Artifact, folder: Path, target: str) -> None:
        """Once: several buckets may have one engine."""
        for name in artifact.files:
            if f"{target}/{name}" not in self.files:
                self._copy(artifact, name, folder, f"{target}/{name}")

    def _copy(self, artifact: Artifact, name: str, folder: Path, target: str) -> None:
        record = artifact.files[name]
        self._copy_file(artifact.file(name), folder / target)
        self.files[target] = FileEntry(record.sha256, record.size)


def seal(bundle: Bundle) -> None:
    """Writes the manifest into the bundle's folder."""
    (bundle.path / MANIFEST).write_bytes(encode(bundle.to_json()))


def sampler_file(spec: str) -> str:
    """Where the tables of a scheduler lie: dpm++2m-sde and dpm++2m:sde are two."""
    plain = re.sub(r"[^a-z0-9+.-]+", "-", spec)[:40]
    return f"samplers/{plain if plain == spec else f'{plain}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}'}.json"


def _tables(artifact: Artifact) -> list[str]:
    """The names of what an artifact of stage sampler holds. StoreError for a damaged one."""
    try:
        return list(json.loads(artifact.file(TABLES).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(
            "an artifact in the store is damaged", where=artifact.file(TABLES), got=error, hint="diffbuild cache verify"
        ) from error


def copy_file(source: Path, target: Path) -> None:
    """A copy, in a new folder where need be, that shares its blocks with the source where the filesystem can; never a
    hard link, so that changing a bundle cannot change the store."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as write:
        if sys.platform == "linux":
            import fcntl

            try:
                fcntl.ioctl(write.fileno(), FICLONE, read.fileno())
                return
            except OSError:
                pass  # another filesystem, or one that cannot: copy
        shutil.copyfileobj(read, write, 16 << 20)
