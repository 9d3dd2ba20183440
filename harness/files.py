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

NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file reached the size limit of this shell (ulimit -f)",
}
DISK_FULL = tuple(NO_ROOM)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


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
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
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


@contextmanager
def tolerate_full_disk(what, fix=None):
    """Turn a full disk inside the block into a warning that says `what` was lost by it.

    With `fix`, the command to run once there is room, it is a `UserError` instead. Other errors pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        reason = NO_ROOM[error.errno]
        if fix:
            raise UserError(f"{reason}: {what}. Make room, then resume with {fix}") from None
        say(f"WARNING: {reason}: {what}", sys.stderr)


def is_lfs_pointer(path):
    """Whether the file at `path` is the note that Git LFS leaves in place of a large file it did not download."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def refuse_lfs_pointer(path):
    """Raise `UserError` if the file at `path` is a Git LFS pointer."""
    if is_lfs_pointer(path):
        raise UserError(f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull` in its repository, "
                        "or download the file")


def sha256(path):
    """Hexadecimal SHA-256 of the file at `path`."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
