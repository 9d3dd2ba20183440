"""Files of documents -> batches of texts, in a fixed order: what harness/text.py tokenizes.

A `Source` is a list of files; `read_file` gives the batches of one of them. A run that continues reads the file that it
was in again from its beginning. Heavy packages are imported where they are used, so that a run on shards or on a small
text starts without them (pyarrow 0.2 s, datasets 0.6 s).
"""

import codecs
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import tempfile
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from harness.cli import UserError
from harness.files import refuse_lfs_pointer
from harness.tokenizer import whole_characters

BATCH_BYTES = 2 << 20  # text that one thread tokenizes at a time: large against Python's overhead, small for caches
COUNTS = ("documents", "skipped", "separators")  # what is counted of batches
BEGINNING = {"file": 0, "skip": 0, **dict.fromkeys(COUNTS, 0)}  # a place in a source, see `read_manifest`

# ---------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------

PACKED = (".gz", ".zst")
STREAMS = (".txt", ".jsonl", ".json", ".ndjson")  # they may be packed
TEXT_SUFFIXES = (*(kind + packed for kind in STREAMS for packed in ("", *PACKED)), ".parquet", ".csv", ".tsv", ".arrow")
KINDS = ".txt, .jsonl, .json (also .gz, .zst), .parquet, .csv, .tsv, .arrow"  # the same for people


class SourceFile(NamedTuple):
    name: str
    size: int  # bytes
    where: Path | str  # on this disk, or in the repository
    sha256: str | None = None  # where the repository knows it


@dataclass(frozen=True)
class Source:
    """Files of documents in a fixed order, and how to get hold of one of them."""

    title: str
    revision: str | None  # equal revisions hold equal files
    name: str  # what the shards are called
    files: tuple[SourceFile, ...] = ()
    fetch: Callable[[SourceFile], Path] = lambda file: file.where
    discard: Callable[[Path], None] = lambda path: None  # called when a file has been read
    remote: bool = False
    text_column: str | None = None  # None: the first file that has columns decides
    keep_endoftext: bool = False  # leave "<|endoftext|>" in a .txt as ordinary letters

    @property
    def size(self):
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def is_text(path):
    """Whether the name of a file is of a kind that can be read."""
    return Path(path).name.lower().endswith(TEXT_SUFFIXES)


def local_source(paths, text_column=None, keep_endoftext=False):
    """The documents of files and folders (all their files of a known kind, in the order of their names)."""
    files = []
    for root in map(Path, paths):
        if not os.path.exists(root):  # Path.exists fails on a name that is too long
            raise UserError(f"{root} does not exist: --source takes the name of a data set on the Hugging Face Hub "
                            "(OWNER/NAME or a known short one), or paths of files and folders")
        found = sorted(root.rglob("*")) if root.is_dir() else [root]
        found = [path for path in found if path.is_file() and is_text(path)
                 and not any(part.startswith(".") for part in path.relative_to(root).parts)]
        if not found:
            raise UserError(f"{root} is or holds no file of these kinds: {KINDS}")
        for path in found:
            label = f"{root.name}/{path.relative_to(root).as_posix()}" if root.is_dir() else root.name
            files.append(SourceFile(label, path.stat().st_size, path))
    first = Path(paths[0]).resolve()
    return Source(
        title=", ".join(Path(path).resolve().name for path in paths),
        revision=_fingerprint(files),
        name=shard_stem(first.name if first.is_dir() else first.name.split(".")[0]),
        files=tuple(files),
        text_column=text_column,
        keep_endoftext=keep_endoftext,
    )


def shard_stem(name):
    """What shards of a source called `name` are called: letters, digits, dots and hyphens.

    subtle: "train" and "val" are left out, since these words in the name of a shard say which split it belongs to.
    """
    words = re.split(r"[^0-9A-Za-z.]+", name)
    words = [word for word in words if not {"train", "val"} & set(word.lower().split("."))]
    return "-".join(words).strip("-.") or "text"


def _fingerprint(files):
    """SHA-256 of names, sizes and both ends of files: it finds changed sources without reading terabytes."""
    digest = hashlib.sha256()
    for entry in files:
        try:
            with open(entry.where, "rb") as file:
                digest.update(os.fsencode(f"{entry.name}\n{entry.size}\n") + file.read(1 << 16))
                file.seek(max(0, entry.size - (1 << 16)))
                digest.update(file.read(1 << 16))
        except PermissionError as error:
            raise UserError(f"{entry.where} cannot be read ({error.strerror}): change its permissions") from error
    return digest.hexdigest()


def read_source(source, place=BEGINNING, column=None):
    """The batches of `source` from the beginning of the file at `place` on.

    `column` of the documents: where it is None the first file that has columns decides for all.
    """
    done = sum(file.size for file in source.files[: place["file"]])
    before = place.get("row", 0)  # places of an older version name a row (of a .txt: a byte) to start from
    for index, path in enumerate(fetch_ahead(source.fetch, source.files[place["file"] :]), place["file"]):
        file = source.files[index]
        for batch in read_file(path, column, source.keep_endoftext):
            column = batch.column or column
            if before:
                before -= batch.size if ".txt" in path.name.lower() else len(batch.texts) + batch.skipped
                if before < 0:
                    raise UserError(f"{path} is split into other batches than when its first shards were made: start "
                                    "again in another folder")
                continue
            yield batch._replace(file=index, done=done + batch.read * file.size)
        source.discard(path)
        done += file.size
        before = 0


def fetch_ahead(fetch, files):
    """`fetch(file)` of every file, in order, the next one being fetched while the last one is used."""
    coming = None
    for file in (*files, None):
        path = coming and coming.result()
        coming = file and _in_background(fetch, file)
        if path:
            yield path


def _in_background(function, *args):
    """Run a function in a thread that does not keep the process from ending; returns a `Future`."""
    future = Future()

    def run():
        try:
            future.set_result(function(*args))
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def peeked(iterator, count=1):
    """The first items, in a list, and an iterator of all of them."""
    head = list(itertools.islice(iterator, count))
    return head, itertools.chain(head, iterator)


# ---------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------

SEPARATOR = "<|endoftext|>"
SEPARATORS = re.compile(re.escape(SEPARATOR) + r"(?:\r?\n)?")  # with the end of the line that it stands on
AFTER_SEPARATOR = tuple((SEPARATOR + end).encode() for end in ("", "\r", "\n", "\r\n"))
# An ASCII space before a character that is certainly none. Left out are characters whose UTF-8 begins like that of a
# Unicode space (U+0085, U+00A0, U+1680, U+2000 ..., U+3000), and "<", with which a separator may begin.
LAST_SPACE = re.compile(rb"[ \t\r\n](?=[!-;=-\x7f]|[\xc3-\xe0\xe4-\xf4]|\xe3[\x81-\xbf])")
BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
                    codecs.BOM_UTF16_BE: "UTF-16"}
BETWEEN_ITEMS = re.compile(r"[\s,]*")
JSON_TYPES = {list: "an array", dict: "an object", bool: "true or false", int: "a number", float: "a number"}


class Batch(NamedTuple):
    """Neighbouring documents of one file."""

    texts: Any  # Arrow string array or list of str, none of them empty
    skipped: int  # rows without text between this batch's first row and the next batch's
    size: int  # bytes of text; of a .txt: of the file
    read: float  # share of the file that has been read when this batch has
    column: str | None = None  # the text column
    leads: bool = True  # False where the first text continues the last one of the batch before
    separators: int = 0  # <|endoftext|> at which this batch was split
    file: int = 0  # number of the file in its source
    done: float = 0.0  # bytes of the source read up to the end of this batch

    @property
    def documents(self):
        """How many documents begin in it."""
        return len(self.texts) - (not self.leads)


def read_file(path, column=None, keep_endoftext=False):
    """Batches of the file at `path`. The split into batches depends on the file alone.

    `column` names the column of the documents (None: found by itself). Raises `UserError` with file and row where the
    file is damaged or holds something else than text.
    """
    kind = path.suffix.lower()
    if kind in PACKED:
        kind = Path(path.stem).suffix.lower()
    refuse_lfs_pointer(path)
    try:
        if kind == ".txt":
            yield from _read_txt(path, keep_endoftext)
        elif kind == ".parquet":
            yield from _read_parquet(path, column)
        elif kind in STREAMS:
            yield from _read_json(path, column)
        else:
            yield from _read_table(path, kind, column)
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} is damaged or cannot be read ({error}): fetch it again or leave it out") from error


@contextmanager
def _opened(path):
    """(unpacked stream, file on disk) of a file that may be packed; how far the second is shows how much is read."""
    with open(path, "rb") as raw:
        if path.suffix.lower() == ".gz":
            with gzip.open(raw) as stream:
                yield stream, raw
        elif path.suffix.lower() == ".zst":
            import pyarrow as pa  # Python has no zstd of its own before 3.14

            with pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd") as stream:
                yield io.BufferedReader(stream, BATCH_BYTES), raw
        else:
            yield raw, raw


def _read_txt(path, keep_endoftext):
    """A text file is one document, or several with <|endoftext|> between them. Long ones come in pieces.

    A piece ends where GPT-2's pre-tokenizer cuts anyway, and neither right before nor right after a separator: so it
    starts a document only at byte 0.
    """
    disk_size = max(1, path.stat().st_size)
    with _opened(path) as (file, raw):
        at, length, data = 0, BATCH_BYTES, b""
        while True:
            data += file.read(max(0, length - len(data)))
            piece = data[:length]
            cut = len(piece) if len(data) < length else _safe_cut(piece)
            if not cut and len(data) < length:
                return
            if not cut:  # a long stretch without white space
                length *= 2
                continue
            text = _decoded(path, at, piece[:cut])
            texts = [text] if keep_endoftext else SEPARATORS.split(text)
            separators = len(texts) - 1
            between = texts[1:-1]  # the first and the last are no documents where the file begins or ends there
            yield Batch([text for text in texts if text], between.count(""), cut, raw.tell() / disk_size,
                        leads=at == 0, separators=separators)
            at, length, data = at + cut, BATCH_BYTES, data[cut:]


def _safe_cut(data):
    """The last place in UTF-8 `data` where it can be cut without another token coming out; 0 where there is none.

    GPT-2's pattern, `\\s+(?!\\S)|\\s+` after the words, always parts a run of white space before its last character,
    which goes to the next word or stands alone. So the tokens of the two parts are those of the whole.
    """
    begin = len(data)
    while begin > 0:
        end = min(len(data), begin + 3)  # the pattern looks at most two bytes ahead
        begin = max(0, begin - 4096)
        for match in reversed(list(LAST_SPACE.finditer(data, begin, end))):
            if match.start() and not data.endswith(AFTER_SEPARATOR, 0, match.start()):
                return match.start()
    return 0


def _decoded(path, at, data):
    """The text of UTF-8 bytes from byte `at` of a file on. Raises `UserError` where they are something else."""
    if at == 0:
        _refuse_other_encodings(path, data)
        data = data.removeprefix(codecs.BOM_UTF8)  # the byte order mark is no text
    if (nul := data.find(b"\0")) >= 0:
        raise UserError(f"{path} holds a NUL (byte {at + nul:,}): take it out, for example with `tr -d '\\000'`, or, "
                        "if the file is UTF-16, convert it with `iconv -f UTF-16LE -t UTF-8`")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {at + error.start:,} is 0x{data[error.start]:02x}): "
                        "convert it, for example with `iconv -f latin1 -t utf-8`") from error


def _refuse_other_encodings(path, head):
    """Raise `UserError` where a file begins with the byte order mark of UTF-16 or UTF-32."""
    for mark, name in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            raise UserError(f"{path} is {name}, not UTF-8: convert it with `iconv -f {name} -t UTF-8`")


def _read_parquet(path, wanted):
    """pyarrow reads parquet itself here, and not inside `datasets`.

    `datasets` reads parquet with pyarrow.dataset, whose threads outlive it: a process that has used it may abort
    (exit status 134) or hang when it ends (github.com/apache/arrow/issues/45214), and it takes 1.5 times the CPU.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        with pa.OSFile(os.fsencode(path)) as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            column = _text_column(path, {field.name: _is_string(field.type) for field in schema}, wanted)
            if not _is_string(schema.field(column).type):
                raise UserError(f"{path}: column `{column}` holds {schema.field(column).type}, not strings: choose "
                                "another one with `fineweb.py --text_column`, or leave the file out")
            number = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)].index(column)
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            rows = max(1, file.metadata.num_rows)
            size = sum(group.column(number).total_uncompressed_size for group in groups)
            batch_rows = max(1, BATCH_BYTES * rows // max(1, size))
            row = 0
            for index in range(len(groups)):
                for table in file.iter_batches(batch_rows, [index], [column], use_threads=False):
                    texts = table.column(0).cast(pa.large_string())
                    texts.validate(full=True)  # Arrow reads invalid UTF-8 without an error
                    lengths = pc.binary_length(texts)
                    size = pc.sum(lengths).as_py() or 0
                    texts = texts.filter(lengths.cast(pa.bool_()))  # comparing with a number would import pandas
                    row += len(table)
                    yield Batch(texts, len(table) - len(texts), size, row / rows, column)
    except pa.ArrowException as error:
        raise UserError(f"{path} is damaged or no parquet file ({error}): fetch it again or leave it out") from error


def _is_string(kind):
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _text_column(path, columns, wanted):
    """The column of the documents among `columns` ({name: whether it holds strings}): the one that is wanted, else
    `text`, else the only one that holds strings."""
    if wanted is None and "text" in columns:
        wanted = "text"
    strings = [name for name, is_string in columns.items() if is_string]
    if wanted is None and len(strings) == 1:
        wanted = strings[0]
    if wanted not in columns:
        raise UserError(f"{path} has no column `{wanted or 'text'}`, but {', '.join(columns)}: name the one that holds "
                        "the documents with `fineweb.py --text_column`")
    return wanted


def _read_json(path, wanted):
    """Objects with a text column, or strings, one a line or in one array.

    `datasets` reads JSON too, but cannot name a broken line, refuses half a surrogate pair, and turns rows of mixed
    types into strings by rules that change with its version.
    """
    size = max(1, path.stat().st_size)
    with _opened(path) as (file, raw):
        head = file.peek(4096)
        _refuse_other_encodings(path, head)
        if head.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
        is_array = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
        rows = _array_items(path, file) if is_array else _json_lines(path, file)
        first, rows = peeked(rows, 100)
        objects = [row for _, row in first if isinstance(row, dict)]
        columns = {}
        for key, value in (item for row in objects for item in row.items()):
            columns[key] = columns.get(key, False) or isinstance(value, str)
        column = _text_column(path, columns, wanted) if objects else wanted

        for batch in grouped(_text_of(where, row, column) for where, row in rows):
            yield batch._replace(read=raw.tell() / size, column=column)


def _json_lines(path, file):
    """(where it is, value) of every line; None for an empty line."""
    for number, line in enumerate(file, 1):
        try:
            yield f"{path}, line {number}", None if line.isspace() else json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            raise UserError(f"{path}, line {number}: {error}: every line must be one JSON object, or the file one "
                            "array") from error


def _array_items(path, file):
    """(where it is, value) of every item of a file that is one JSON array, piece by piece."""
    decode, unpacked = json.JSONDecoder().raw_decode, io.TextIOWrapper(file, encoding="utf-8", newline="")
    text = unpacked.read(BATCH_BYTES)
    at, number = text.index("[") + 1, 0
    while True:
        at = BETWEEN_ITEMS.match(text, at).end()
        if text.startswith("]", at):
            break
        where = f"{path}, item {number + 1} of its array"
        try:
            item, end = decode(text, at)
        except (ValueError, RecursionError) as error:
            more = unpacked.read(max(BATCH_BYTES, len(text) - at))  # a cut item looks like a broken one until the end
            if not more:
                raise UserError(f"{where}: {error}") from error
            text, at = text[at:] + more, 0
            continue
        yield where, item
        number, at = number + 1, end
    if (text[at + 1 :] + unpacked.read(BATCH_BYTES)).strip():
        raise UserError(f"{path} continues after the end of its array: give one array of objects, or one object a line")
    unpacked.detach()  # otherwise it would close the file


def _text_of(where, row, column):
    """The text of a row of JSON, None where it has none. Raises `UserError` for anything that is no text."""
    if row is None or isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise UserError(f"{where} is {JSON_TYPES[type(row)]}: give objects with a text column, or strings")
    text = row.get(column)
    if text is None or isinstance(text, str):
        return text
    raise UserError(f"{where}: `{column}` holds {JSON_TYPES[type(text)]}, not a string: turn it into text, or choose "
                    "another column with `fineweb.py --text_column`")


def _read_table(path, kind, wanted):
    """CSV, TSV and Arrow files, as `datasets` reads them."""
    import pyarrow as pa
    from datasets import load_dataset, logging

    logging.set_verbosity(logging.CRITICAL)  # its exceptions say the same
    is_csv = kind != ".arrow"
    options = {"sep": "\t" if kind == ".tsv" else ",", "keep_default_na": False} if is_csv else {}

    def tables(**more):
        data = load_dataset("csv" if is_csv else "arrow", data_files=glob.escape(os.path.abspath(path)),
                            split="train", streaming=True, cache_dir=locks, **options, **more)
        return data.with_format("arrow").iter(batch_size=1000)

    def texts():
        for table in tables(**reading):
            yield from table.column(column).to_pylist()

    with tempfile.TemporaryDirectory() as locks:  # otherwise a lock file stays in the user's cache for every file
        try:
            schema = next(iter(tables(**({"nrows": 1000} if is_csv else {})))).schema
            column = _text_column(path, {field.name: _is_string(field.type) for field in schema}, wanted)
            reading = {"usecols": [column], "converters": {column: str}} if is_csv else {}  # "1984" is a text too
            if not is_csv and not _is_string(schema.field(column).type):
                raise UserError(f"{path}: column `{column}` holds {schema.field(column).type}, not strings: choose "
                                "another one with `fineweb.py --text_column`, or leave the file out")
            size, seen = max(1, path.stat().st_size), 0
            for batch in grouped(texts()):
                seen += batch.size
                yield batch._replace(read=min(1.0, seen / size), column=column)  # `datasets` does not say how far it is
        except (pa.ArrowException, ValueError, StopIteration) as error:
            raise UserError(f"{path} cannot be read as {kind} ({error or 'it is empty'}): repair it or leave it "
                            "out") from error


def grouped(texts):
    """Batches of some 2 MB from an iterable of texts."""
    batch, size, skipped = [], 0, 0
    for text in texts:
        if text:
            batch.append(whole_characters(text))
            size += len(batch[-1].encode())
        else:
            skipped += 1
        if size >= BATCH_BYTES:
            yield Batch(batch, skipped, size, 0.0)
            batch, size, skipped = [], 0, 0
    if batch or skipped:
        yield Batch(batch, skipped, size, 1.0)
