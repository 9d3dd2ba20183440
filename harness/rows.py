"""The rows of a run's log, declared once: what each kind shows in log.txt and on the console, and when it belongs.

metrics.jsonl is the record, one JSON object a row with any kind and any key; log.txt is its projection. Reading,
resuming and drawing go by this file. To log something new, write a row of a new kind (`log.write(step, "val2",
loss=...)`); for a line in log.txt and on the console add the kind to `ROWS`.
"""

import heapq
import json
import math
import re
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from harness.cli import UserError
from harness.files import atomic_file

MAX_STEP = 10**12  # a larger number is no step
UNTRACKED = {"seconds", "data_seconds", "mfu", "memory_allocated_gb", "memory_reserved_gb"}  # in the record alone
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no such numbers: strings stand for them


@dataclass(frozen=True)
class Row:
    """How one kind of row is shown. `text` and `console` are format strings over the row's values.

    `per`: a row at step s is of the "update" s -> s + 1, or of the "model" after s updates. A resume at step k keeps
    rows of updates before k, and of models up to k. `tracker`: {name at the tracker: key of the row}; None: all numbers
    but `UNTRACKED`, as KIND/KEY.
    """

    per: str = "model"
    text: str | None = None
    console: str | None = None
    tracker: dict | None = field(default_factory=dict)


ROWS = {  # in the order in which a run writes them at one step
    "start": Row(),
    "compile": Row(),
    "val": Row("model", "{loss:.4f}", "validation loss: {loss:.4f}",
               {"val/loss": "loss", "val/bits_per_byte": "bits_per_byte"}),
    "hella": Row("model", "{acc_norm:.4f}", "hellaswag accuracy: {acc_norm:.4f} ({seconds:.1f}s)",
                 {"val/hellaswag": "acc_norm"}),
    "sample": Row(),
    "checkpoint": Row(),
    "export": Row(),
    "config": Row("update"),  # what a resume changed in the config: {field: [before, after]}
    "train": Row("update", "{loss:.6f}", "loss: {loss:.6f} | lr {lr:.4e} | norm: {grad_norm:.4f} | dt: {ms:.2f}ms | "
                                         "tok/sec: {tokens_per_sec:.0f}", tracker=None),
    "spike": Row("update"),
    "diverged": Row("update"),
}
OTHER_ROW = Row(tracker=None)


def row_of(kind):
    """How rows of `kind` are shown; a kind that `ROWS` does not have stands in the record only, per model."""
    return ROWS.get(kind, OTHER_ROW)


def shown_key(kind):
    """The key whose value log.txt shows: `loss` of a val row; None for a kind that it does not show."""
    text = row_of(kind).text
    return text and text[1:].partition("}")[0].partition(":")[0]


def log_line(row):
    """The line of log.txt for a row (a dict), None where its kind has none."""
    text = row_of(row["kind"]).text
    return None if text is None else f"{row['step']} {row['kind']} {text.format(**row)}"


def console_line(row):
    """What the console says of a row, None where it says nothing; `ms` are its seconds in milliseconds."""
    console = row_of(row["kind"]).console
    if console is None:
        return None
    return f"step {row['step']:5d} | {console.format(**row, ms=1000 * row.get('seconds', 0))}"


def tracked(row):
    """{name: number} of a row for the tracker, see `Row`."""
    names = row_of(row["kind"]).tracker
    if names is None:
        names = {f"{row['kind']}/{key}": key for key, value in row.items()
                 if isinstance(value, float) and key not in UNTRACKED}
    return {name: row[key] for name, key in names.items() if key in row}


def to_json(row):
    """A row as one line of metrics.jsonl. Numbers that are not finite become strings, tensors and arrays lists."""
    return json.dumps(_plain(row))


def _plain(value):
    if hasattr(value, "tolist"):  # a tensor or an array, of any number of dimensions
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def from_json(line):
    """The row in a line of metrics.jsonl, None where it is none. Strings that stand for numbers become numbers."""
    with suppress(ValueError, RecursionError):
        row = json.loads(line)
        has_place = isinstance(row, dict) and type(row.get("step")) is int and isinstance(row.get("kind"), str)
        if has_place and 0 <= row["step"] < MAX_STEP:
            for key, value in row.items():
                if type(value) in (str, list) and key != "texts":
                    row[key] = _number(value)
            return row
    return None


def _number(value):
    """`value` with the strings that stand for numbers as numbers, also in lists."""
    if isinstance(value, list):
        return [_number(inner) for inner in value]
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value


def read_rows(log_dir, strict=False):
    """All rows of a run, a list of dicts with `step`, `kind` and their values, in the order in which it wrote them.

    A row that only log.txt has (an old log, a deleted record, a disk that was full) is there too, with the digits that
    log.txt shows. `log_dir` may be a log.txt; a file of another name is read by itself. A last line without its newline
    is torn and left out. So is what is no row; with `strict` it is a `UserError`.
    """
    return [row for row, _, _ in _read(log_dir, strict)]


def trim_rows(log_dir, step):
    """Trim both logs to the rows that a checkpoint after `step` updates knows of; returns them as `read_rows` does.

    Lines stay as they are. A row of the record whose line log.txt does not have, since the run was killed between the
    two, gets it now.
    """
    kept = [(row, recorded, shown) for row, recorded, shown in _read(log_dir)
            if row["step"] < step + (row_of(row["kind"]).per == "model")]
    lines = {"metrics.jsonl": [recorded for _, recorded, _ in kept],
             "log.txt": [shown or log_line(row) for row, _, shown in kept]}
    for name, texts in lines.items():  # the record first, as always
        with atomic_file(Path(log_dir, name), "w", encoding="utf-8", newline="\n") as file:
            file.writelines(text + "\n" for text in texts if text is not None)
    return [row for row, _, _ in kept]


def _read(log_dir, strict=False):
    """[(row, its line in metrics.jsonl, its line in log.txt)], None where a file does not have it."""
    path = Path(log_dir)
    text_file = path if path.is_file() else path / "log.txt"
    shown = defaultdict(deque)
    for row, line in _rows_in(text_file, from_log_line, "STEP KIND NUMBER", strict):
        shown[row["step"], row["kind"]].append((row, None, line))
    recorded = ()
    if text_file.name == "log.txt":
        recorded = _rows_in(text_file.with_name("metrics.jsonl"), from_json, '{"step": N, "kind": ..., ...}', strict)
    record = []
    for row, line in recorded:
        in_text = shown[row["step"], row["kind"]]
        text_row, _, text_line = in_text.popleft() if in_text else ({}, None, None)
        key = shown_key(row["kind"])
        if key and not isinstance(row.get(key), int | float):  # versions before this file wrote null for nan
            row[key] = text_row.get(key, math.nan)
        record.append((row, line, text_line))
    only_shown = [entry for entries in shown.values() for entry in entries]
    if not only_shown:
        return record
    return list(heapq.merge(record, only_shown, key=lambda entry: _place(entry[0])))


def _place(row):
    """Where a row stands in a log; two kinds of one step in the order of `ROWS`."""
    kinds = list(ROWS)
    kind = kinds.index(row["kind"]) if row["kind"] in kinds else len(kinds)
    return row["step"], row_of(row["kind"]).per == "update", kind


def _rows_in(path, parse, form, strict):
    """(row, line) for each whole line of the file at `path`; none where there is no such file."""
    text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    for number, line in enumerate(text.split("\n")[:-1], 1):
        row = parse(line)
        if row is not None:
            yield row, line
        elif strict and line.strip():
            raise bad_line(path, number, line, form)


def bad_line(path, number, line, form):
    """The `UserError` for a line of a text file that is not of the form that it should have."""
    return UserError(f"{path}, line {number}: {line[:60]!r} is not of the form `{form}`: is this the right file?")


def from_log_line(line):
    """The row in a line of log.txt, None where it is none."""
    match = re.fullmatch(r"(\d{1,12}) (\S+) (-?\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|-?inf)\r?", line)
    if match is None:
        return None
    return {"step": int(match[1]), "kind": match[2], shown_key(match[2]) or "value": float(match[3])}
