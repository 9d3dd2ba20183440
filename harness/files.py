"""Files that appear whole or not at all, locked folders, full disks, JSON, and hashes.

Nothing in here knows about models, tokens or training.
"""

import errno
import hashlib
import json
import os
import sys
import threading
import uuid
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

from harness.cli import UserError, say

NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file reached the size limit of this shell (ulimit -f)",
}
DISK_FULL = tuple(NO_ROOM)
# what a call raises on a file system that does not have it: FUSE, NFS, SMB, object stores
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EBADF)
NO_LOCKS = (*UNSUPPORTED, errno.ENOLCK, errno.EIO)  # NFS without its lock daemon has words of its own
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@contextmanager
def atomic_file(path, mode="wb", **open_options):
    """Open a temporary file beside `path`; on success sync it and rename it to `path`, on failure remove it.

    A reader sees the old file or the whole new one, never a part, whenever the process or the machine dies.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, mode.replace("w", "x"), **open_options) as file:
            yield file
            file.flush()
            sync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def sync(handle):
    """Flush an open file or folder to disk, where its file system can."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _sync_folder(folder):
    """Make a rename in `folder` survive a power cut, where the system can (Windows cannot open folders)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            sync(handle)
        finally:
            os.close(handle)


@contextmanager
def tolerate_full_disk(what, fix=None):
    """Turn a full disk inside the block into a warning that says `what` was lost by it.

    With `fix`, what to run once there is room, it is a `UserError` instead. Other errors pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        reason = NO_ROOM[error.errno]
        if fix:
            raise UserError(f"{reason}: {what}. Make room, then run {fix}") from None
        say(f"WARNING: {reason}: {what}", sys.stderr)


@contextmanager
def folder_lock(folder, flag, wait=False):
    """Make `folder` and keep other processes out of it. Where one is in it, `wait` until it is done or raise.

    A WARNING where the file system has no locks. Raises `UserError`, which names the `flag` that gave the folder, where
    another process has it or it cannot be written.
    """
    from filelock import FileLock, Timeout

    path = Path(folder, ".lock")
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if not wait:
                    raise UserError(f"{flag} {folder} is in use by another run: give another one, or wait for "
                                    f"it{_holder(path)}") from None
                say(f"waiting for another run that is writing to {folder}{_holder(path)}", sys.stderr)
                lock.acquire()
            except (OSError, NotImplementedError) as error:  # the latter is filelock's word for ENOSYS
                if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
                    raise
                say(f"WARNING: the file system of {flag} {folder} has no locks ({error}): nothing keeps a second run "
                    "out of this folder, so start only one", sys.stderr)
                break
            if not path.exists():  # the other process has ended and removed it, as below
                lock.release()
                path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written ({error.strerror}): give another one") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows deletes no open file; there filelock itself does at the release
            path.unlink()  # while it is ours: whoever has opened it meanwhile sees that it is gone
        lock.release()


def _holder(path):
    """Who has a lock, in words, where its file says so: filelock's way where the file system has no locks."""
    with suppress(OSError, ValueError):
        process, host = path.read_text().split()[:2]
        return f". Its lock names process {process} on {host}: if that machine is gone, delete {path}"
    return ""


def is_locked(folder):
    """Whether a process is in `folder` by `folder_lock`; False where that cannot be known."""
    from filelock import FileLock, Timeout

    path = Path(folder, ".lock")
    try:
        if path.exists():
            with FileLock(path, timeout=0):
                pass
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        pass
    return False


def read_json(path):
    """The object in the JSON file at `path` as a dict, None where there is no such file.

    Raises `UserError` where it cannot be read or holds anything else.
    """
    try:
        contents = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): change its permissions, or delete it") from None
    except (ValueError, RecursionError) as error:
        refuse_lfs_pointer(path)
        raise UserError(f"{path} is damaged ({error}): restore it, or make it again") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object): restore it, or make it again")
    return contents


def refuse_lfs_pointer(path):
    """Raise `UserError` if the file at `path` is the note that Git LFS leaves in place of a file not downloaded."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull` in its "
                            "repository, or download the file")


def in_background(function, *args, name=None):
    """Run a function in a thread that does not keep the process from ending; returns a `Future`."""
    future = Future()

    def run():
        try:
            future.set_result(function(*args))
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def identity(path):
    """What stays the same of a file while nobody writes to it or puts another in its place: a tuple of numbers."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def sha256(path):
    """Hexadecimal SHA-256 of the file at `path`."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
