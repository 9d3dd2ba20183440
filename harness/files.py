"""Files that appear whole or not at all, full disks, and hashes.

Nothing in here knows about models, tokens or training.
"""

import errno
import hashlib
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from harness.cli import UserError, say

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_file(path, mode="wb", **open_options):
    """Open a temporary file beside `path`; on success sync it and rename it to `path`, on failure remove it.

    A reader sees the old file or the whole new one, never a part, whenever the process or the machine dies.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, **open_options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _umask():
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder):
    """Make a rename in `folder` survive a power cut, where the system can (Windows cannot open folders)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
                raise
        finally:
            os.close(handle)


def sha256(path):
    """Hexadecimal SHA-256 of the file at `path`."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def tolerate_full_disk(what, fix=None):
    """Turn a full disk into a warning that says `what` is lost; into a `UserError` if `fix` says how to resume."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        if fix:
            raise UserError(f"the disk is full: {what}. Make room, then run {fix}") from None
        say(f"WARNING: the disk is full: {what}", sys.stderr)
