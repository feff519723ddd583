"""The process of TensorRT's builder: how it is started, watched and cancelled, and how its failure is explained.

The builder runs in a process of its own because it can take its process with it (a crash in a kernel compiler, the
kernel's OOM killer), because several builders in one process crash (KataGo pull request 1225), and because the GPU
memory that it touched comes back only with the process.

The child writes one JSON document per line on stdout: {"phase", "share"}, {"warning"}, and at its end {"done"} or
{"error"}. TensorRT's log goes to stderr, which is kept to explain a failure.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from toolchain.engines.tensorrt import build_plan
from toolchain.engines.tensorrt.library import OUT_OF_MEMORY
from toolchain.errors import EngineError

log = logging.getLogger("toolchain")

Progress = Callable[[str, float | None], None]
"""Called with the name of a phase and the share of it that is done, 0 to 1, or None where it is unknown."""

MODULE = build_plan.__name__
GRACE_S = 10.0
"""From a cancellation to the kill: TensorRT asks its monitor now and then, sometimes not for minutes."""
LOG_LINES = 12
LOG_BYTES = 1 << 20

LESS_MEMORY = (
    "give the builder less to try: lower tensorrt.builder_optimization_level (now {builder_optimization_level}) or set "
    "tensorrt.workspace_mb (now {workspace_mb}; 0 is all of the GPU's memory), and end what else uses the GPU"
)
OTHER_KERNELS = (
    "set tensorrt.builder_optimization_level to another value (now {builder_optimization_level}), or use another "
    "version of TensorRT"
)
OTHER_VERSION = "use another version of TensorRT for RTX"
MORE_MEMORY = (
    "free host memory or give the machine or container more: the builder needs two to three times the component's "
    "weights"
)
CRASHED = "build again: a crash may depend on timing. If it crashes again, "
DRIVER = "install a newer NVIDIA driver; nvidia-smi shows the newest CUDA version that the present one can run"
CUDA_ERRORS = {
    "2": ("out of GPU memory", LESS_MEMORY),
    "35": ("the NVIDIA driver is too old for this TensorRT's CUDA", DRIVER),
    "100": ("there is no CUDA device", "diffbuild doctor"),
    "222": ("the NVIDIA driver is too old for this TensorRT's CUDA", DRIVER),
    "803": ("the NVIDIA driver and its libraries are of two versions", "restart the machine after the driver's update"),
}
"""By the number in TensorRT's "CUDA initialization failure with error: N"."""
CUDA_FAILURE = re.compile(r"CUDA initialization failure with error:? (\d+)")
HOST_MEMORY = re.compile(r"std::bad_alloc|MemoryError|out of host memory")
NO_KERNEL = re.compile(r"could not find any implementation for node (\{.+?\}|[^\s,)]+?)\.?(?:[\s,)]|$)", re.I | re.M)


def run_builder(job: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Runs toolchain.engines.tensorrt.build_plan on `job` and returns its report.

    Raises EngineError however the child fails; no process stays behind. KeyboardInterrupt, or what `progress` raises,
    cancels it.
    """
    kills_before = _oom_kills()
    with tempfile.TemporaryDirectory(prefix="diffbuild-") as folder, tempfile.TemporaryFile() as stderr:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps({**job, "parent": os.getpid()}))
        with _start(path, stderr) as child:
            try:
                ending = _listen(child, progress)
                child.wait()
            except BaseException:
                _stop(child)
                raise
        if child.returncode == 0 and "done" in ending:
            return dict(ending["done"])
        output = _tail(stderr)
    raise _explained(job, ending.get("error"), child.returncode, output, _oom_kills() - kills_before)


def _start(job: Path, stderr: IO[bytes]) -> subprocess.Popen[str]:
    # The child finds the modules that this process finds, and none besides.
    search = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", MODULE, str(job)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, "PYTHONPATH": search, "PYTHONUNBUFFERED": "1"},
        text=True,
        # A terminal's Ctrl-C reaches this process alone, which passes it on and waits.
        start_new_session=True,
    )


def _listen(child: subprocess.Popen[str], progress: Progress) -> dict[str, Any]:
    """Passes progress and warnings on while the child works. Returns its last message, empty when there was none."""
    ending: dict[str, Any] = {}
    assert child.stdout is not None
    for line in child.stdout:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a child that is killed may leave half a line
        if "phase" in event:
            progress(event["phase"], event["share"])
        elif "warning" in event:
            log.warning("%s", event["warning"])
        else:
            ending = event
    return ending


def _stop(child: subprocess.Popen[str]) -> None:
    """Asks the child to cancel, and kills its process group when it does not. A second Ctrl-C kills at once."""
    try:
        child.send_signal(signal.SIGINT)
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        log.warning("the builder does not stop; it is killed")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _tail(stderr: IO[bytes]) -> str:
    stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - LOG_BYTES))
    return stderr.read().decode(errors="replace")


def _oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since it started; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    except (OSError, StopIteration, ValueError):
        return 0


def _explained(
    job: Mapping[str, Any], error: Mapping[str, Any] | None, code: int, output: str, oom_kills: int
) -> EngineError:
    """The error of a builder that failed: what it reported, or else what its exit status and its output show."""
    if error is None:
        what, cause, hint = _ending(job, code, oom_kills, output)
    else:
        what, cause, hint = error["what"], error.get("got"), error.get("hint")
    if hint is None:
        known, hint = _named_cause(job, f"{cause}\n{output}")
        cause = cause or known
    # A full disk, say: what the builder did right is no news then.
    has_hint = error is not None and error.get("hint") is not None
    lines = [] if has_hint else [line for line in output.splitlines() if line.strip()][-LOG_LINES:]
    got = "\n    ".join([cause or "TensorRT does not say why", *lines])
    where, expected = ((error or {}).get(name) for name in ("where", "expected"))
    return EngineError(what, where=where or job["graph"], expected=expected, got=got, hint=hint)


def _ending(job: Mapping[str, Any], code: int, oom_kills: int, output: str) -> tuple[str, str | None, str | None]:
    """What an exit status means: what happened, why, and what to do."""
    if code >= 0:
        return f"TensorRT's builder ended with exit code {code}", None, None
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    if name == "SIGKILL" and oom_kills > 0:
        return "TensorRT's builder was killed", "the kernel ran out of host memory (its OOM killer)", MORE_MEMORY
    if name in ("SIGKILL", "SIGTERM"):
        hint = "where nobody killed it, the system did: dmesg tells of the OOM killer, a batch system of its limits"
        return "TensorRT's builder was killed", name, hint
    if HOST_MEMORY.search(output):
        return "TensorRT's builder crashed", f"out of host memory ({name})", MORE_MEMORY
    others = OTHER_KERNELS.format_map(job["options"]) if _searches(job) else OTHER_VERSION
    return "TensorRT's builder crashed", name, CRASHED + others


def _named_cause(job: Mapping[str, Any], output: str) -> tuple[str | None, str | None]:
    """A failure that TensorRT names in its log, and what helps."""
    if HOST_MEMORY.search(output):
        return "out of host memory", MORE_MEMORY
    if not _searches(job):
        return None, None
    if failure := CUDA_FAILURE.search(output):
        cause, hint = CUDA_ERRORS.get(failure[1], (f"CUDA does not start (error {failure[1]})", "diffbuild doctor"))
        return cause, hint.format_map(job["options"])
    kernel = NO_KERNEL.search(output)
    # Of tactics that do not fit, and are left out, it warns.
    grave = "\n".join(line for line in output.splitlines() if not line.startswith(("[W]", "[I]")))
    if OUT_OF_MEMORY.search(grave):
        # TensorRT goes on without the tactics that do not fit, and names a node only when none is left for it.
        cause = "out of GPU memory" + (f" at node {kernel[1]}" if kernel else "")
        return cause, LESS_MEMORY.format_map(job["options"])
    if kernel:
        return f"TensorRT has no kernel for node {kernel[1]}", OTHER_KERNELS.format_map(job["options"])
    return None, None


def _searches(job: Mapping[str, Any]) -> bool:
    """Whether the builder tries kernels on a GPU, and has options for how."""
    return "builder_optimization_level" in job["options"]
