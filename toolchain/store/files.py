"""Atomic writes: a file or folder is complete under its final name, or it is not there.

The recipe is the same everywhere: a unique temporary name on the same filesystem, fsync of every file and folder, one
rename, fsync of the parent. An `OSError` leaves this module as a `StoreError` with the path and a hint.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from toolchain.errors import StoreError

_LOG = logging.getLogger("toolchain")
_POLL_S = 0.05
_TELL_AFTER_S = 1.0
_BINARY = getattr(os, "O_BINARY", 0)
# What a full or failing disk raises; whoever fills a folder of ours meets these without a file name in the error.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE}

if sys.platform == "win32":
    import msvcrt

    def _try_lock(fd: int) -> bool:
        # Windows locks are mandatory: a byte far behind the content keeps the holder's process id readable.
        os.lseek(fd, 1 << 30, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLK):
                return False
            raise
        return True

    def _unlock(fd: int) -> None:
        os.lseek(fd, 1 << 30, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _try_lock(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)


def _hint(error: OSError, where: Path) -> str | None:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            folder = next((p for p in (where, *where.parents) if p.is_dir()), Path("/"))
            with suppress(OSError):
                free_mb = shutil.disk_usage(folder).free / 1e6
                return f"{free_mb:.1f} MB are free at {folder}; free some space or choose a folder on another disk"
            return "free some space or choose a folder on another disk"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return (
                "this path must be readable and writable for you; check its owner and mount, or choose another folder"
            )
        case errno.ENOTDIR | errno.EEXIST | errno.EISDIR:
            return "a file lies where a folder is needed, or the reverse; move it away or choose another folder"
        case errno.EMFILE | errno.ENFILE:
            return "too many files are open; raise the limit with: ulimit -n 4096"
        case errno.ENOLCK | errno.ENOTSUP | errno.ENOSYS:
            return "this filesystem cannot lock files (a network mount?); choose a folder on a local disk"
        case errno.EIO:
            return "the disk reports an error; look into the system log before trusting it again"
        case errno.EXDEV:
            return "the folder spans two filesystems; a rename cannot cross them, so choose one that does not"
    return None


@contextmanager
def store_errors(what: str, where: Path) -> Iterator[None]:
    """Turns an OSError of the body into a StoreError that names the path and what to do about it."""
    try:
        yield
    except OSError as error:
        path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else where
        raise StoreError(
            f"{what}: {error.strerror or error}",
            where=path,
            got=errno.errorcode.get(error.errno or 0),
            hint=_hint(error, path),
        ) from error


@contextmanager
def fill_errors(what: str, folder: Path) -> Iterator[None]:
    """Around a caller's code that fills `folder`: errors of the disk become a StoreError, others pass unchanged."""
    try:
        yield
    except OSError as error:
        inside = isinstance(error.filename, str) and Path(error.filename).is_relative_to(folder)
        if not inside and error.errno not in _DISK:
            raise
        with store_errors(what, folder):
            raise


def file_digest(path: Path) -> str:
    """The sha256 of a file's content, in hex; read in pieces. StoreError when it cannot be read."""
    with store_errors("cannot read a file", path), open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def temporary_name(prefix: str) -> str:
    """A name that no other process uses, also after a fork: two builders never share a temporary path."""
    return f"{prefix}.{os.getpid()}.{secrets.token_hex(6)}"


def make_folder(path: Path) -> None:
    """Creates `path` and its parents, each made durable; raises OSError, ENOTDIR when a file is in the way."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync of a file or folder; raises OSError."""
    if os.name == "nt" and path.is_dir():
        return  # Windows can neither open nor flush a folder
    fd = os.open(path, (os.O_RDWR if os.name == "nt" else os.O_RDONLY) | _BINARY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """fsync of every file and folder below `folder`, then of itself; raises OSError."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            sync_tree(Path(entry.path))
        else:
            sync(Path(entry.path))
    sync(folder)


def walk_files(folder: Path, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Everything below `folder` that is no folder, as (relative name with slashes, lstat), sorted; raises OSError.

    A symbolic link is yielded as itself, whatever it points to.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from walk_files(Path(entry.path), f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name, os.lstat(entry.path)


def require_own_files(folder: Path) -> None:
    """StoreError for a symbolic link, hard link or special file: what is published must not change from outside.

    (onnx refuses external data behind links for the same reason.)
    """
    for name, status in walk_files(folder):
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise StoreError(
                f"cannot publish {name}",
                where=folder / name,
                expected="a regular file of its own",
                got="a link or a special file",
                hint="copy the file instead of linking to it",
            )


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that must not exist yet, durably; raises OSError and may leave a partial file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces the content of `path` in one step: readers see the old or the new content, nothing between."""
    # Not `.tmp`: a store sweeps leftovers by this ending, and has a folder of that name.
    partial = path.with_name(temporary_name(f".{path.name}") + ".partial")
    with store_errors("cannot write a file", path):
        make_folder(path.parent)
        try:
            write_new(partial, data)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
        sync(path.parent)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder that is gone after the body, unless the body renamed it.

    Made with the usual permissions (tempfile's 0700 would travel into what is published). Locked while the body runs,
    so that `_recover` can tell it from what a killed process left.
    """
    fd = -1
    try:
        with store_errors("cannot create a temporary folder", path):
            make_folder(path.parent)
            os.mkdir(path)
        # Windows cannot open a folder and some network filesystems cannot lock one: then a leftover stays.
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY)
            _try_lock(fd)
        yield path
    finally:
        if os.path.lexists(path):
            shutil.rmtree(path, ignore_errors=True)
        if fd >= 0:
            os.close(fd)


@contextmanager
def locked(path: Path, *, wait: bool, purpose: str) -> Iterator[bool]:
    """Holds the lock file `path`, across processes and threads; yields False when not waiting and another holds it.

    The file stays: deleting a lock file lets a third process lock a new one while the second still waits on the old.
    The kernel releases the lock when its holder dies. `purpose` completes "waiting for process 7: ".
    """
    with store_errors("cannot open a lock file", path):
        make_folder(path.parent)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | _BINARY, 0o666)
    held = False
    try:
        with store_errors("cannot lock", path):
            held = _acquire(fd, wait, purpose)
        yield held
    finally:
        try:
            if held:
                # Explicitly: a process forked meanwhile shares the descriptor and would keep the lock.
                _unlock(fd)
        finally:
            os.close(fd)


def _acquire(fd: int, wait: bool, purpose: str) -> bool:
    tell_at: float | None = time.monotonic() + _TELL_AFTER_S
    while not _try_lock(fd):
        if not wait:
            return False
        if tell_at is not None and time.monotonic() >= tell_at:
            os.lseek(fd, 0, os.SEEK_SET)
            _LOG.warning("waiting for process %s: %s", os.read(fd, 32).decode(errors="replace") or "?", purpose)
            tell_at = None
        time.sleep(_POLL_S)
    # The process id only serves that message: a full disk must not stop the clean-up that would free it.
    with suppress(OSError):
        os.lseek(fd, 0, os.SEEK_SET)
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
    return True


def foreign_files(folder: Path, owns: Callable[[str], bool]) -> list[str]:
    """What lies in `folder`, at any depth, and `owns` does not accept: relative names with slashes. StoreError."""
    with store_errors("cannot read a folder", folder):
        return [name for name, _ in walk_files(folder) if not owns(name)] if folder.is_dir() else []


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def publish_folder(
    target: Path, fill: Callable[[Path], None], *, owns: Callable[[str], bool] = lambda _: False
) -> None:
    """Fills a new folder and puts it at `target` in one step, replacing an earlier one only when all went well.

    `fill` writes into the empty folder it is given. What it raises is raised here, with `target` as it was. An existing
    folder is replaced only when it is empty, or shares a file name with the new one and holds no file of somebody
    else: each must be in the new folder too, or be accepted by `owns`, which gets its relative name with slashes. So a
    wrong path never costs somebody's files. A folder that a crash left aside between the two renames is put back first.
    """
    target = Path(os.path.realpath(target))
    if not target.name or (target.exists() and not target.is_dir()):
        raise StoreError("cannot write a folder there", where=target, expected="a folder or a free name")
    with ExitStack() as stack:
        with _parent_lock(target):
            _recover(target)
            new = target.with_name(temporary_name(f".{target.name}") + ".new")
            stack.enter_context(temporary_folder(new))
        with fill_errors("cannot write a folder", new):
            fill(new)
        with store_errors("cannot write a folder", target):
            require_own_files(new)
            sync_tree(new)
            with _parent_lock(target):
                _require_replaceable(new, target, owns)
                _swap(new, target)


@contextmanager
def _parent_lock(target: Path) -> Iterator[None]:
    """Serializes the renames of publishers that share a parent folder, where the system can lock folders."""
    with store_errors("cannot write a folder", target):
        make_folder(target.parent)
    fd = -1
    try:
        with suppress(OSError):
            fd = os.open(target.parent, os.O_RDONLY)
            while not _try_lock(fd):
                time.sleep(_POLL_S)
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def _siblings(target: Path, ending: str) -> list[Path]:
    """Temporary folders of publications of `target`, oldest first."""
    named = (p for p in target.parent.iterdir() if p.name.startswith(f".{target.name}.") and p.name.endswith(ending))
    return sorted((p for p in named if p.name.count(".") == target.name.count(".") + 4), key=os.path.getmtime)


def _recover(target: Path) -> None:
    """Puts back what a killed publisher moved aside, and removes its temporary folders."""
    with store_errors("cannot write a folder", target):
        aside = _siblings(target, ".old")
        if aside and not os.path.lexists(target):
            os.rename(aside.pop(), target)
        for leftover in [*aside, *_siblings(target, ".new")]:
            with suppress(OSError):
                fd = os.open(leftover, os.O_RDONLY)
                try:
                    if _try_lock(fd):
                        shutil.rmtree(leftover, ignore_errors=True)
                finally:
                    os.close(fd)


def _require_replaceable(new: Path, target: Path, owns: Callable[[str], bool]) -> None:
    """StoreError when putting `new` at `target` would cost files that nobody published there."""
    names = {entry.name for entry in os.scandir(new) if entry.is_file()}
    there = {entry.name for entry in os.scandir(target)} if target.is_dir() else set()
    if there and not there & names:
        raise StoreError(
            "refusing to replace a folder of other files",
            where=target,
            expected=f"one of {', '.join(sorted(names)[:5])} in it",
            got=", ".join(sorted(there)[:5]),
            hint="choose another output folder, or empty this one",
        )
    written = {name for name, _ in walk_files(new)}
    foreign = foreign_files(target, lambda name: name in written or owns(name))
    if foreign:
        raise StoreError(
            "refusing to replace a folder that holds other files",
            where=target,
            expected="only files that an earlier run wrote",
            got=some(foreign),
            hint="move them to another place, or give a new output folder",
        )


def _swap(new: Path, target: Path) -> None:
    """Puts `new` at `target`; on any failure before that, `target` is what it was. Raises OSError."""
    old = target.with_name(temporary_name(f".{target.name}") + ".old")
    try:
        if os.path.lexists(target):
            os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(target):
            os.rename(old, target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
