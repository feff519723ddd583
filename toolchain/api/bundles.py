"""Commands about a bundle: to draw with it, and to judge, measure, look into and sign it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolchain.bench.results import BenchReport
    from toolchain.bundle.bundle import Bundle
    from toolchain.bundle.inspection import Inspection
    from toolchain.bundle.signing import Signature, Verdict
    from toolchain.check.report import CheckReport
    from toolchain.runtime.pictures import SavedPictures
    from toolchain.runtime.progress import Callback
    from toolchain.trace.timeline import Trace


def generate(
    bundle: str | Path,
    prompts: Sequence[str],
    output: str | Path | None = None,
    *,
    verify: bool = True,
    trust: str | Path | None = None,
    progress: Callback | None = None,
    **options: Any,
) -> SavedPictures:
    """Draws a picture for each prompt and writes it as PNG, with its settings as text.

    output   several pictures become NAME-1.png and so on; None: diffbuild-SEED.png in the working directory
    verify   compare every file of the bundle with its sha256 first
    trust    a public key that must have signed the bundle; $DIFFBUILD_TRUST where it is not given
    options  of a call of `toolchain.Pipeline`; None leaves the choice to the bundle

    To draw more than once, open the bundle with `toolchain.load`. Raises UsageError for the output, BundleError and
    RequestError.
    """
    from toolchain.runtime.pictures import SavedPictures, check_picture_output, draw, save
    from toolchain.runtime.pipeline import load

    target = None if output is None else Path(output)
    check_picture_output(target)
    started = time.perf_counter()
    with closing(load(bundle, verify=verify, trust=trust, warm_up=False, open_buckets=1)) as pipe:
        load_ms = (time.perf_counter() - started) * 1e3
        result, settings = draw(pipe, prompts, options, progress)
    return SavedPictures(save(result, settings, target), result.timings, load_ms)


def check_bundle(
    bundle: str | Path,
    model: str | Path,
    *,
    revision: str | None = None,
    config: str | Path | None = None,
    store: str | Path | None = None,
    report: str | Path | None = None,
    html: str | Path | None = None,
    clip: str | Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> CheckReport:
    """Compares a bundle with the model that it was built from: see `toolchain.check`. A failed gate is a result.

    report, html  files to write the report to as well, as JSON and as a page
    clip          a folder with a CLIP model of transformers, to score the pictures with

    Raises UsageError for outputs that cannot be written, BundleError, ModelError and EngineError.
    """
    from toolchain.builder.open_model import open_model
    from toolchain.bundle.bundle import read_bundle
    from toolchain.bundle.signing import require_trusted
    from toolchain.check.compare import compare
    from toolchain.check.page import save_page
    from toolchain.store.outputs import check_outputs

    check_outputs(report, html)
    opened = read_bundle(bundle)
    require_trusted(opened)
    source = open_model(model, revision, config=config, store=store, safety=opened.recipe.safety.checker)
    compared = compare(opened, source, clip=None if clip is None else Path(clip), progress=progress)
    if report is not None:
        compared.save(Path(report))
    if html is not None:
        save_page(Path(html), compared, opened)
    return compared


def bench_bundle(
    bundle: str | Path,
    *,
    html: str | Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> BenchReport:
    """Measures where the time of a picture goes.

    html     a file to write the report to as well, as a page
    options  of `toolchain.bench.run.measure`

    Raises UsageError, BundleError, ModelError, and DiffbuildError for a contender that fails.
    """
    from toolchain.bench.page import page
    from toolchain.bench.run import measure
    from toolchain.store.files import write_atomic
    from toolchain.store.outputs import check_output

    check_output(html)
    measured = measure(Path(bundle), progress, **options)
    if html is not None:
        write_atomic(Path(html), page(measured).encode())
    return measured


def trace_bundle(
    bundle: str | Path, output: str | Path, *, prompt: str | None = None, operators: bool = False, **options: Any
) -> Trace:
    """Records one generation on a timeline and writes it as Chrome's trace events.

    prompt     None: the recipe's first
    operators  profile the operators inside each engine as well; on the CPU alone
    options    as in `generate`

    Raises UsageError, BundleError and RequestError.
    """
    from toolchain.bundle.signing import open_bundle
    from toolchain.store.outputs import check_output
    from toolchain.trace.record import trace

    check_output(output)
    opened = open_bundle(Path(bundle))
    chosen = {key: value for key, value in options.items() if value is not None}
    recorded = trace(opened, {"prompt": prompt or opened.recipe.check.prompts[0], **chosen}, operators=operators)
    recorded.save(Path(output))
    return recorded


def inspect_bundle(bundle: str | Path, *, verify: bool = False) -> Inspection:
    """What a bundle holds, and whether it can run here; `verify` compares every file with its sha256.

    Raises BundleError for what is no bundle or, with `verify`, for a damaged one.
    """
    from toolchain.bundle.bundle import read_bundle
    from toolchain.bundle.inspection import Inspection
    from toolchain.engines.runners import runner_of

    opened = read_bundle(bundle)
    if verify:
        opened.verify()
    backend = runner_of(opened.backend)
    refused = backend.available() or backend.refuse(opened.device, opened.recipe.options(opened.backend))
    if refused and (command := backend.install(opened.device)):
        refused += f"; {command}"
    return Inspection(opened, refused, verify)


def backend_refusal(bundle: Bundle) -> str | None:
    """Why the backend of a bundle cannot run on this machine; None where it can."""
    from toolchain.engines.runners import runner_of

    return runner_of(bundle.backend).available()


def sign_bundle(bundle: str | Path, key: str | Path) -> Signature:
    """See `toolchain.bundle.signing.sign_bundle`."""
    from toolchain.bundle import signing

    return signing.sign_bundle(bundle, key)


def verify_bundle(bundle: str | Path, key: str | Path | None = None) -> Verdict:
    """See `toolchain.bundle.signing.verify_bundle`."""
    from toolchain.bundle import signing

    return signing.verify_bundle(bundle, key)
