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
import signal
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


def users_error(error):
    """The `UserError` that `error` is, or means: an `OSError` that names a file or folder. None for any other one."""
    if isinstance(error, OSError) and error.filename is not None:
        return UserError(f"{error.filename}: {error.strerror}: see that it is there, that you may read or write it, "
                         "and that its disk is in order")
    return error if isinstance(error, UserError) else None


# What people write for nanoGPT, transformers and other trainers, and what to write here. A parser gives the hint where
# it has the flag that the hint begins with, if it begins with one.
OTHER_NAMES = {
    "--learning_rate": "--max_lr",
    "--lr": "--max_lr",
    "--decay_lr": "--min_lr (equal to --max_lr for a constant rate)",
    "--batch_size": "--micro_batch_size (rows per forward pass) or --total_batch_size (tokens per step)",
    "--gradient_accumulation_steps": "--total_batch_size (tokens per step, which sets it)",
    "--max_iters": "--max_steps",
    "--lr_decay_iters": "--max_steps",
    "--warmup_iters": "--warmup_steps",
    "--block_size": "--seq_len",
    "--dataset": "--data",
    "--out_dir": "--log_dir",
    "--eval_interval": "--val_every",
    "--eval_iters": "--val_tokens",
    "--wandb_log": "--tracker wandb",
    "--wandb": "--tracker wandb",
    "--start": "--prompt",
    "-m": "--model",
    "--local_rank": "torchrun (which passes no such flag) in place of torch.distributed.launch",
    "*.py": "--preset (this takes no config file of nanoGPT's)",  # config/train_gpt2.py
}


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError`, one line, where argparse would print a page of usage.

    In the name of a flag hyphens and underscores are alike; names that other programs have get a hint.
    """

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._spelled(word) for word in args], namespace)

    def _spelled(self, word):
        """`word` as the parser spells it, where it is one of its flags; any other word is a value and stays."""
        name, *value = word.split("=", 1)
        if "prompt" not in name:  # a shell does it for --out ~/x, but not for --out=~/x
            value = [os.path.expanduser(part) for part in value]
        spelled = re.sub("^--no_", "--no-", "--" + name[2:].replace("-", "_"))
        return "=".join([spelled, *value]) if name.startswith("--") and spelled in self._option_string_actions else word

    hints = {}  # of this command alone, as OTHER_NAMES

    def error(self, message):
        """Raise `UserError`: what argparse complains about, and what to write in its place where that is known."""
        wrong_value = re.match(r"argument (--\w+)\S*: \D+ '(.*?)'", message)
        words = ["=".join(wrong_value.groups())] if wrong_value else message.split()[2:]
        words = [word for word in words if word.startswith("--")] or words[:1]
        hints = {word: hint for word in words if (hint := self._hint(word))}
        text = "; ".join(f"{hint} for {word}" if len(words) > 1 else hint for word, hint in hints.items())
        raise UserError(f"{message}; {f'did you mean {text}? ' if text else ''}see --help")

    def _hint(self, word):
        """What to write in place of a word that argparse does not take, None where nobody knows."""
        flags, (name, _, value) = self._option_string_actions, word.partition("=")
        if isinstance(flags.get(name), argparse.BooleanOptionalAction):
            return name.replace("--", "--no-") if value.lower() in ("false", "no", "off", "0") else name
        takers = [flag for flag in ("--data", "--source", "--model") if flag in flags]
        if word[0] != "-" and takers and os.path.exists(word) and not word.endswith(".py"):
            return f"{takers[0]} {word}"
        if name not in flags:
            word = "*.py" if word.endswith(".py") else name[:2] + name[2:].replace("-", "_")
        hint = (OTHER_NAMES | self.hints).get(word, "--")
        if hint[0] != "-" or hint.split()[0] in flags:
            return hint
        return " or ".join(difflib.get_close_matches(word, flags, n=2)) if name not in flags else None


class OutputClosed(Exception):
    """The reader of a command's output has gone: `... | head`."""


class Console(io.RawIOBase):
    """The raw stream behind stdout or stderr, which a console that is gone cannot make fail: it loses its lines.

    So whatever writes there (print, a progress bar, warnings, logging, Python's own exit) costs no work. With
    `is_product` the output is what the command is for: a closed pipe or terminal raises `OutputClosed`, once, and a
    full disk `UserError`.
    """

    def __init__(self, raw, is_product=False):
        super().__init__()
        self.raw, self.is_product = raw, is_product

    def write(self, data):
        try:
            return self.raw.write(data)
        except OSError as error:
            if error.errno not in CONSOLE_GONE:
                raise
            if self.is_product:
                self.is_product = False  # what is still in buffers is lost quietly
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise UserError(f"the output cannot be written: {error.strerror}") from None
                raise OutputClosed from None
            return len(data)

    def writable(self):
        return True

    def isatty(self):
        return self.raw.isatty()

    def fileno(self):
        return self.raw.fileno()


def guard_consoles(output_is_product=False):
    """Put `Console` behind stdout and stderr, and something that takes what is written where they are closed."""
    with contextlib.suppress(OSError):
        for number in range(3):
            try:
                os.fstat(number)
            except OSError:
                # subtle: else the next file to be opened, a checkpoint say, takes the number, and with it what
                # libraries write to stderr
                os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 (open for the whole process)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):  # not a notebook's or a test's own
            stream.flush()
            raw = getattr(stream.buffer, "raw", stream.buffer)  # python -u has no buffer between
            console = Console(raw, output_is_product and name == "stdout")
            setattr(sys, name, io.TextIOWrapper(
                io.BufferedWriter(console), encoding=stream.encoding,
                line_buffering=stream.line_buffering or stream.write_through,
                errors="backslashreplace"))  # a character that the console cannot show stops nothing


def exit_status(main, *args, output_is_product=False):
    """Run `main(*args)` and return its exit status, which says what was done.

    2 and one line on stderr for what `users_error` knows, 130 for a Ctrl-C. A console that is gone changes nothing,
    unless the output is what the command is for: then it stops quietly with 141, as a shell reports a closed pipe.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see `quiet_imports`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    guard_consoles(output_is_product)
    try:
        try:
            status = main(*args) or 0
        except SystemExit as leaving:
            status = leaving.code
        sys.stdout.flush()
        return status
    except (UserError, OSError) as error:
        if not (line := users_error(error)):
            raise
        say(f"{Path(sys.argv[0]).name}: error: {line}", sys.stderr)
        return 2
    except KeyboardInterrupt:  # where it is not handled there is nothing to save
        say(f"{Path(sys.argv[0]).name}: interrupted", sys.stderr)
        return 130
    except OutputClosed:
        return 141


def quiet_imports():
    """Let a Ctrl-C end the process without a traceback until `exit_status` runs: for imports that take seconds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def say(text, stream=None):
    """Print a line, to stdout by default. A console that is gone loses it; the work continues."""
    try:
        print(text, file=stream or sys.stdout, flush=True)
    except OSError as error:
        if error.errno not in CONSOLE_GONE:
            raise


def count(number, thing):
    """1 rank, 2 ranks."""
    return f"{number:,} {thing}{'s' if number != 1 else ''}"


def duration(seconds):
    """Seconds in words that a person would use, such as 45 s, 1 min 40 s, 3 h 20 min, 2 days 5 h."""
    seconds = round(seconds)
    minutes, hours, days = round(seconds / 60), round(seconds / 3600), seconds // 86400
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    days, hours = divmod(hours, 24)
    return f"{days} day{'s' if days > 1 else ''} {hours} h"


def gigabytes(size):
    """Bytes in words: 1.2 GB, 3.4 MB, 5 kB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.0f} kB"


def say_now(text):
    """Print a line on stderr from a signal handler, which may have interrupted a print; a progress bar makes room."""
    with contextlib.suppress(OSError):
        clear = "\r\x1b[K" if os.isatty(2) else ""
        os.write(2, f"{clear}{text}\n".encode())


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


def check_fields(config):
    """`check_values` of a dataclass's instance."""
    check_values(type(config), vars(config))


def check_values(cls, values):
    """Raise `UserError` for the first of `values` that is no field of the dataclass `cls`, or no value of its field."""
    if unknown := values.keys() - {f.name for f in fields(cls)}:
        raise UserError(f"{min(unknown)} is no field of {cls.__name__}; see --help")
    for f in fields(cls):
        value, kind, choices = values.get(f.name, f.default), value_type(f), choices_of(f)
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
    with contextlib.redirect_stdout(sys.stdout if rank == 0 else io.StringIO()):  # --help
        return vars(add_flags(parser, cls, presets).parse_args(argv))


def parse_args(cls, presets, argv, rank, description):
    """The config of a command line, `cls(**flags)`. Only rank 0 prints."""
    try:
        return cls(**parse_flags(cls, presets, argv, rank, description))
    except UserError:
        if rank == 0:  # every rank would say the same
            raise
        raise SystemExit(2) from None
