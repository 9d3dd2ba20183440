"""What every file here shares: the user's mistake as one exception, its one-line exit, and files that appear whole.

Nothing in here knows about models, tokens or training.
"""

import argparse
import difflib
import errno
import hashlib
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """A mistake the user can mend, told in one line: the value, the limit and the mend. Commands exit 2 on it."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))  # one line, whatever a path or a library's message holds


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are a `UserError`, one line, without the page of usage before it."""

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        close = difflib.get_close_matches(unknown[1], self._option_string_actions, n=2) if unknown else []
        raise UserError(f"{message}; " + f"did you mean {' or '.join(close)}? " * bool(close) + "see --help")


def exit_status(main, *args):
    """Run `main(*args)` and return its exit status: 2 and one line on stderr for a `UserError`, 130 for a Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # letters that the console lacks are no reason to stop
    try:
        return main(*args) or 0
    except UserError as error:
        say(f"{Path(sys.argv[0]).name}: error: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:  # where it is not handled there is nothing to save
        say(f"{Path(sys.argv[0]).name}: interrupted", sys.stderr)
        return 130
    except BrokenPipeError:  # `... | head`: the reader has had enough, which is no fault
        return 0
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # nobody takes it any more; Python would try again at its exit, and fail with 120
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text, stream=None):
    """Print a line, to stdout unless told. A console that is gone or goes to a full disk loses it; work goes on."""
    try:
        print(text, file=stream or sys.stdout, flush=True)
    except OSError as error:
        if error.errno not in (*DISK_FULL, errno.EPIPE):
            raise


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
