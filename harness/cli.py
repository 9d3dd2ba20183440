"""What every command shares: the user's mistake as one exception, exit statuses, and a dataclass as flags.

Nothing in here knows what the flags mean.
"""

import argparse
import contextlib
import difflib
import errno
import functools
import io
import math
import os
import re
import sys
import types
from dataclasses import field, fields
from pathlib import Path
from typing import get_args

# What writing to a console that is gone raises: a closed pipe, a closed terminal, a full disk under a redirection.
CONSOLE_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF, errno.ESTALE, errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """A mistake that the user can fix, reported in one line: the value, the limit and the fix; exit status 2."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))  # one line, whatever a path or a library's message holds


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError`, one line, where argparse would print a page of usage."""

    hints = {}  # {a flag of another program: the one that does the same here}

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown and unknown[1] in self.hints:
            raise UserError(f"{unknown[1]} is {self.hints[unknown[1]]} here; see --help")
        close = difflib.get_close_matches(unknown[1], self._option_string_actions, n=2) if unknown else []
        raise UserError(f"{message}; " + f"did you mean {' or '.join(close)}? " * bool(close) + "see --help")


def exit_status(main, *args):
    """Run `main(*args)` and return its exit status: 2 and one line on stderr for a `UserError`, 130 for a Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a character that the console cannot show stops nothing
    try:
        return main(*args) or 0
    except UserError as error:
        say(f"{Path(sys.argv[0]).name}: error: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:  # where it is not handled there is nothing to save
        say(f"{Path(sys.argv[0]).name}: interrupted", sys.stderr)
        return 130
    except BrokenPipeError:  # `... | head`: the reader has had enough; 128 + SIGPIPE, as other programs leave
        return 141
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # nobody takes it any more; Python would try again at its exit, and fail with 120
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text, stream=None):
    """Print a line, to stdout by default. A console that is gone loses it; the work continues."""
    try:
        print(text, file=stream or sys.stdout, flush=True)
    except OSError as error:
        if error.errno not in CONSOLE_GONE:
            raise


def flag(default, help, group=None, minimum=None, maximum=None, choices=None, const=None, locked_on_resume=False):
    """A field of a config that is also a flag. `group`: the group of `--help` that it opens; `const`: its value when
    the flag stands alone; `choices`: a tuple, or a function that returns one, for what is defined further down."""
    return field(default=default, metadata={
        "help": help, "group": group, "minimum": minimum, "maximum": maximum, "choices": choices, "const": const,
        "locked_on_resume": locked_on_resume})


locked = functools.partial(flag, locked_on_resume=True)  # makes the model or the order of the data


def choices_of(f):
    """The values that a config field may have, a tuple of strings; None where any value of its type may do."""
    choices = f.metadata["choices"]
    return tuple(choices()) if callable(choices) else choices


def value_type(f):
    """The plain type of a config field: `int` for `int | None`."""
    return next(t for t in get_args(f.type) or (f.type,) if t is not types.NoneType)


def check_fields(cfg):
    """Raise `UserError` for the first value that is of the wrong type or outside its limits."""
    for f in fields(cfg):
        value, kind, choices = getattr(cfg, f.name), value_type(f), choices_of(f)
        minimum, maximum = f.metadata["minimum"], f.metadata["maximum"]
        if value is None and f.default is None:
            continue
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"--{f.name} {value!r}: it must be {kind.__name__}")
        if choices and value not in choices:
            raise UserError(f"--{f.name} {value}: it must be one of {', '.join(choices)}")
        if kind is float and not math.isfinite(value):
            raise UserError(f"--{f.name} {value}: it must be a finite number")
        if kind is int and abs(value) >= 2**63:
            raise UserError(f"--{f.name} {value}: it must fit in 64 bits")
        if minimum is not None and value < minimum:
            raise UserError(f"--{f.name} {value}: it must be at least {minimum}")
        if maximum is not None and value > maximum:
            raise UserError(f"--{f.name} {value}: it must be at most {maximum}")


def check_names(cls, values):
    """Raise `UserError` for the first of the dict's names that is no field of the dataclass `cls`."""
    if unknown := set(values) - {f.name for f in fields(cls)}:
        raise UserError(f"{min(unknown)} is no field of {cls.__name__}; see --help")


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
            choices = choices_of(f)
            metavar = None if choices else {int: "N", float: "X", str: "TEXT"}[kind]
            group.add_argument(f"--{f.name}", type=kind, choices=choices, metavar=metavar, help=text)
    return parser


def parse_flags(cls, presets, argv=None, rank=0, description=None):
    """{field: value} of the flags in `argv` (the command line by default), for the fields of the dataclass `cls`.

    `UserError` for what is no flag or no value. Only rank 0 prints --help.
    """
    parser = Parser(usage="%(prog)s [--flag VALUE ...]", description=description, argument_default=argparse.SUPPRESS,
                    allow_abbrev=False)
    argv = [with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
    with contextlib.redirect_stdout(sys.stdout if rank == 0 else io.StringIO()):  # --help
        return vars(add_flags(parser, cls, presets).parse_args(argv))


def parse_args(cls, presets, argv, rank, description):
    """(config, {field: value} of the flags) of a command line, by `cls.from_preset`. Only rank 0 prints."""
    try:
        overrides = parse_flags(cls, presets, argv, rank, description)
        flags = {name: value for name, value in overrides.items() if name != "preset"}
        return cls.from_preset(overrides.get("preset", "auto"), **flags), overrides
    except UserError:
        if rank == 0:  # every rank would say the same
            raise
        raise SystemExit(2) from None


def with_underscores(word):
    """`word` of a command line; in a flag's name hyphens and underscores are alike (`--no-` keeps its own)."""
    name, *value = word.split("=", 1)
    if name.startswith("--"):
        name = re.sub("^--no_", "--no-", "--" + name[2:].replace("-", "_"))
    return "=".join([name, *value])
