"""What every command shares: the user's mistake as one exception, exit statuses, and a dataclass as flags.

Nothing in here knows what the flags mean.
"""

import argparse
import difflib
import errno
import os
import re
import sys
import types
from dataclasses import field, fields
from pathlib import Path
from typing import get_args

# A console that is gone, or one that goes to a full disk.
CONSOLE_LOST = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        if error.errno not in CONSOLE_LOST:
            raise


def flag(default, help, group=None, least=None, most=None, choices=None, fixed=False, const=None):
    """A knob: its default and help, the group in `--help` that it opens, its limits, whether a resume may change it."""
    limits = {"least": least, "most": most, "choices": choices}
    return field(default=default, metadata={"help": help, "group": group, "fixed": fixed, "const": const, **limits})


def value_type(f):
    """The plain type of a config field: `int` for `int | None`."""
    return next(t for t in get_args(f.type) or (f.type,) if t is not types.NoneType)


def check_fields(cfg):
    """Raise `UserError` for the first value that is of the wrong type or outside its limits."""
    for f in fields(cfg):
        value, kind, limit = getattr(cfg, f.name), value_type(f), f.metadata
        if value is None and f.default is None:
            continue
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"--{f.name} {value!r}: it must be {kind.__name__}")
        if limit["choices"] and value not in limit["choices"]:
            raise UserError(f"--{f.name} {value}: it must be one of {', '.join(limit['choices'])}")
        for bound, wrong, words in (("least", lambda v, b: not v >= b, "at least"),  # `not >=` catches nan too
                                    ("most", lambda v, b: not v <= b, "at most")):
            if limit[bound] is not None and wrong(value, limit[bound]):
                raise UserError(f"--{f.name} {value}: it must be {words} {limit[bound]}")


def add_flags(parser, cls, presets):
    """Give an argparse parser a flag for every field of the dataclass `cls`; `presets`: {name: {field: value}}."""
    group = parser
    for f in fields(cls):
        meta, kind = f.metadata, value_type(f)
        group = parser.add_argument_group(meta["group"]) if meta["group"] else group
        defaults = [] if f.default is None else [str(f.default)]
        defaults += [f"{name} {values[f.name]}".strip() for name, values in presets.items() if f.name in values]
        text = (meta["help"] + f" [{'; '.join(defaults)}]" * bool(defaults)).replace("%", "%%")
        if kind is bool:
            group.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=text)
        elif meta["const"]:
            group.add_argument(f"--{f.name}", nargs="?", const=meta["const"], metavar="auto|FILE|DIR", help=text)
        else:
            metavar = None if meta["choices"] else {int: "N", float: "X", str: "TEXT"}[kind]
            group.add_argument(f"--{f.name}", type=kind, choices=meta["choices"], metavar=metavar, help=text)
    return parser


def with_underscores(word):
    """`word` of a command line; in a flag's name hyphens and underscores are alike (`--no-` keeps its own)."""
    name, *value = word.split("=", 1)
    if name.startswith("--"):
        name = re.sub("^--no_", "--no-", "--" + name[2:].replace("-", "_"))
    return "=".join([name, *value])
