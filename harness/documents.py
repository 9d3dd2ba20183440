"""Files of documents -> batches of texts, in a fixed order: what harness/text.py tokenizes.

A `Source` is a list of files; `read_file` gives the batches of one of them. A run that continues reads the file that it
was in again from its beginning. Heavy packages are imported where they are used, so that a run on shards or on a small
text starts without them (pyarrow 0.2 s, datasets 0.6 s).
"""

import codecs
import csv
import functools
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from harness.cli import UserError, count, gigabytes
from harness.files import identity, in_background, refuse_lfs_pointer, sha256
from harness.folders import find_texts, text_kind
from harness.tokenizer import whole_characters

BATCH_BYTES = 2 << 20  # text that one thread tokenizes at a time: large against Python's overhead, small for caches
COUNTS = ("documents", "skipped", "separators", "literal")  # what is counted of batches
PAIR = ("prompt", "completion")  # columns that together make a document, on whose completion alone a loss is taken
PAIRS = ", ".join(PAIR)  # the "column" of such documents
CHATS = ("holds chats (`messages`), and pairs are read: make a row of each answer, with what was said before it as "
         "`prompt` and the answer as `completion`, both strings; of one question and answer each: jq -c '{prompt: "
         ".messages[-2].content, completion: .messages[-1].content}' chats.jsonl > pairs.jsonl")
BEGINNING = {"file": 0, "skip": 0, **dict.fromkeys(COUNTS, 0)}  # a place in a source, see `read_manifest`

# --- sources ---


class SourceFile(NamedTuple):
    name: str
    size: int  # bytes
    where: Path | str  # on this disk, or in the repository
    sha256: str | None = None  # where it is known
    stamp: tuple = ()  # what `identity` said of a local file when it was found


@dataclass(frozen=True)
class Source:
    """Files of documents in a fixed order, and how to get hold of one of them."""

    title: str
    revision: str | None  # equal revisions hold equal files; None: their SHA-256 decide
    name: str  # what the shards are called
    files: tuple[SourceFile, ...] = ()
    fetch: Callable[[SourceFile], Path] = lambda file: file.where
    discard: Callable[[Path], None] = lambda path: None  # called when a file has been read
    remote: bool = False
    notes: tuple[str, ...] = ()  # what the user should know of the choice of files
    text_column: str | None = None  # None: the first file that has columns decides
    keep_endoftext: bool = False  # leave "<|endoftext|>" in a .txt as ordinary letters

    @property
    def size(self):
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def in_words(self, column=None):
        """Which files it has, in which `column`, and what else the user should know."""
        kinds = Counter(text_kind(file.name) for file in self.files)
        which = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
        column = f" (column `{column}`)" if column not in (None, "text") else ""
        files = f"{self.title}{column}: {count(len(self.files), 'file')} ({which}), {gigabytes(self.size)}"
        return "; ".join([files, *self.notes])


def local_source(paths, text_column=None, keep_endoftext=False, split=None, leave_out=()):
    """The documents of files and folders, in the order of their names; `split`, `leave_out`: see `find_texts`."""
    files, notes, given = [], [], {}
    for root in map(Path, paths):
        if not os.path.exists(root):  # Path.exists fails on a name that is too long
            raise UserError(f"{root} does not exist: --source takes the name of a data set on the Hugging Face Hub "
                            "(OWNER/NAME or a known short one), or paths of files and folders")
        texts, more = find_texts(root, split, leave_out)
        notes += more
        for path in texts:
            if given.setdefault(os.path.realpath(path), root) is not root:
                raise UserError(f"{path} is given twice: its documents would be there twice, and in both splits")
            label = f"{root.name}/{path.relative_to(root).as_posix()}" if root.is_dir() else root.name
            files.append(SourceFile(label, path.stat().st_size, path, stamp=identity(path)))
    if text_column and all(".txt" in text_kind(file.where.name) for file in files):
        raise UserError(f"--text_column {text_column}: {files[0].where} is plain text and has no columns: leave it out")
    title, first = ", ".join(Path(path).resolve().name for path in paths), Path(paths[0]).resolve()
    name = shard_stem(first.name if first.is_dir() else first.name.split(".")[0])
    return Source(title, None, name, tuple(files), notes=tuple(notes), text_column=text_column,
                  keep_endoftext=keep_endoftext)


def shard_stem(name):
    """What shards of a source called `name` are called: letters, digits, dots and hyphens.

    subtle: "train" and "val" are left out, since these words in the name of a shard say which split it belongs to.
    """
    words = re.split(r"[^0-9A-Za-z.]+", name)
    words = [word for word in words if not {"train", "val"} & set(word.lower().split("."))]
    return "-".join(words).strip("-.") or "text"


@functools.cache
def sha256_of(file):
    """The SHA-256 of a local `SourceFile`; `read_source` checks that what it read is what was hashed."""
    try:
        return sha256(file.where)
    except OSError as error:
        raise UserError(f"{file.where} cannot be read ({error.strerror}): change its permissions, or leave it "
                        "out") from error


def read_source(source, place=BEGINNING, column=None):
    """The batches of `source` from the beginning of the file at `place` on.

    `column` of the documents: where it is None the first file that has columns decides for all.
    """
    def fetch(file):
        path = source.fetch(file)
        return path, file._replace(sha256=None if source.revision else sha256_of(file))

    done = sum(file.size for file in source.files[: place["file"]])
    before = place.get("row", 0)  # places of an older version name a row (of a .txt: a byte) to start from
    for index, (path, file) in enumerate(fetch_ahead(fetch, source.files[place["file"] :]), place["file"]):
        # the empty batch at the end names files without text
        for batch in itertools.chain(read_file(path, column, source.keep_endoftext), [Batch([], 0, 0, 1.0)]):
            column = batch.column or column
            if before:
                is_txt = ".txt" in path.name.lower()
                rows = batch.size if is_txt else len(batch.texts) + batch.skipped
                if rows <= before:
                    before -= rows
                    continue
                if is_txt or batch.skipped:
                    raise UserError(f"{path} is split into other batches than when its first shards were made: start "
                                    "again in another folder")
                batch, before = batch._replace(texts=batch.texts[before:]), 0
            yield batch._replace(file=index, done=done + batch.read * file.size, origin=file)
        if file.stamp and identity(path) != file.stamp:
            raise UserError(f"{path} changed while it was read: run the same command again")
        source.discard(path)
        done += file.size
        before = 0


def fetch_ahead(fetch, files):
    """`fetch(file)` of every file, in order, the next one being fetched while the last one is used."""
    coming = None
    for file in (*files, None):
        path = coming and coming.result()
        coming = file and in_background(fetch, file)
        if path:
            yield path


def peeked(iterator, count=1):
    """The first items, in a list, and an iterator of all of them."""
    head = list(itertools.islice(iterator, count))
    return head, itertools.chain(head, iterator)


# --- reading ---

SEPARATOR = "<|endoftext|>"
SEPARATORS = re.compile(re.escape(SEPARATOR) + r"(?:\r?\n)?")  # with the end of the line that it stands on
AFTER_SEPARATOR = tuple((SEPARATOR + end).encode() for end in ("", "\r", "\n", "\r\n"))
# Before an ASCII space that a character follows which is certainly none. Left out are characters whose UTF-8 begins
# like that of a Unicode space (U+0085, U+00A0, U+1680, U+2000 ..., U+3000), and "<", with which a separator may begin.
BEFORE_SPACE = re.compile(rb"(?=[ \t\r\n](?:[!-;=-\x7f]|[\xc3-\xe0\xe4-\xf4]|\xe3[\x81-\xbf]))")
# Chinese and Japanese have no spaces: between a full stop or comma and an ideograph (U+5000 to U+8FFF, all letters)
AFTER_STOP = re.compile(rb"(?:\xe3\x80[\x81\x82]|\xef\xbc[\x81\x8c\x9f])(?=[\xe5-\xe8])")
CONVERT = ("convert it, for example with `iconv -f latin1 -t utf-8`, or -f UTF-16; if it has NULs in it, take them out "
           "with `tr -d '\\000'`")
JSON = json.JSONDecoder(parse_int=float)  # int() refuses numbers of more than 4,300 digits
QUOTED = re.compile(r'"(?:[^"]|"")*"')


class Batch(NamedTuple):
    """Neighbouring documents of one file."""

    texts: Any  # Arrow string array or list of str, none of them empty; of pairs prompt and completion in turn
    skipped: int  # rows without text between this batch's first row and the next batch's
    size: int  # bytes of text; of a .txt: of the file
    read: float  # share of the file that has been read when this batch has
    column: str | None = None  # the text column
    leads: bool = True  # False where the first text continues the last one of the batch before
    separators: int = 0  # <|endoftext|> at which this batch was split
    literal: int = 0  # texts with "<|endoftext|>" in them, which in a row of a table is no end of a document
    file: int = 0  # number of the file in its source
    origin: SourceFile = SourceFile("the source", 0, "")  # that file, with its SHA-256 where there is no revision
    done: float = 0.0  # bytes of the source read up to the end of this batch

    @property
    def pairs(self):
        """Whether its texts are prompts, which may be empty, and completions in turn."""
        return self.column == PAIRS

    @property
    def documents(self):
        """How many documents begin in it."""
        return len(self.texts) // (2 if self.pairs else 1) - (not self.leads)


def read_file(path, column=None, keep_endoftext=False):
    """Batches of the file at `path`. The split into batches depends on the file alone.

    `column` names the column of the documents (None: found by itself). Raises `UserError` with file and row where the
    file is damaged or holds something else than text.
    """
    kind = text_kind(path)
    refuse_lfs_pointer(path)
    try:
        if kind.startswith(".txt"):
            yield from _read_txt(path, keep_endoftext)
        elif kind in (".parquet", ".arrow"):
            yield from _read_arrow(path, column)
        elif kind in (".csv", ".tsv"):
            yield from _read_table(path, "," if kind == ".csv" else "\t", column)
        else:
            yield from _read_json(path, column)
    except OSError as error:
        if "too much memory" in str(error):  # zstd's word for a window beyond 128 MB
            raise UserError(f"{path} was packed with --long: unpack it with `zstd -d --long=31`") from error
        raise UserError(f"{path} is damaged or cannot be read ({error}): fetch it again or leave it out") from error


@contextmanager
def _opened(path):
    """(unpacked stream, file on disk) of a file that may be packed; how far the second is shows how much is read."""
    packing = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    with open(path, "rb") as raw:
        if packing is None:
            yield raw, raw
        else:
            import pyarrow as pa

            with pa.CompressedInputStream(pa.PythonFile(raw, "r"), packing) as stream:
                yield io.BufferedReader(stream, BATCH_BYTES), raw


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
    which goes to the next word or stands alone, and letters from anything else. So the tokens of the two parts are
    those of the whole.
    """
    for pattern in (BEFORE_SPACE, AFTER_STOP):
        begin = len(data)
        while begin > 0:
            end = min(len(data), begin + 3)  # the patterns look at most three bytes ahead
            begin = max(0, begin - 4096)
            for match in reversed(list(pattern.finditer(data, begin, end))):
                if match.end() and not data.endswith(AFTER_SEPARATOR, 0, match.end()):
                    return match.end()
    return 0


def _decoded(path, at, data):
    """The text of UTF-8 bytes from byte `at` of a file on. Raises `UserError` where they are something else."""
    if at == 0:
        data = data.removeprefix(codecs.BOM_UTF8)  # the byte order mark is no text
    wrong, text = data.find(b"\0"), ""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        wrong = error.start
    if wrong >= 0:
        raise UserError(f"{path} is not UTF-8 text (byte {at + wrong:,} is 0x{data[wrong]:02x}): {CONVERT}")
    return text


def _read_arrow(path, wanted):
    """Parquet, and Arrow's own files such as `datasets` saves them: a stream, or the form for random access.

    pyarrow reads them here, and not inside `datasets`, whose threads outlive it: a process that has used it may abort
    (exit status 134) or hang when it ends (github.com/apache/arrow/issues/45214), and it takes 1.5 times the CPU.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    disk_size, row = max(1, path.stat().st_size), 0
    try:
        with pa.OSFile(os.fsencode(path)) as raw:
            if path.suffix.lower() == ".parquet":
                file = pq.ParquetFile(raw, page_checksum_verification=True)
                column, rows = _arrow_column(path, file.schema_arrow, wanted), max(1, file.metadata.num_rows)
                # subtle: a text that is repeated a thousand times is stored once, so a few rows are decoded at a time
                tables = file.iter_batches(16, columns=_names(column), use_threads=False)
            else:
                try:
                    tables = pa.ipc.open_stream(raw)
                    schema = tables.schema
                except pa.ArrowInvalid:
                    raw.seek(0)
                    file = pa.ipc.open_file(raw)
                    schema, tables = file.schema, map(file.get_batch, range(file.num_record_batches))
                column, rows = _arrow_column(path, schema, wanted), None
                tables = (table.slice(at, 16) for table in tables for at in range(0, len(table), 16))
            part, decoded = [], 0
            for table in itertools.chain(tables, [None]):
                if table is not None:
                    part.append([table.column(name).cast(pa.large_string()) for name in _names(column)])
                    decoded += sum(texts.nbytes for texts in part[-1])
                if part and (table is None or decoded >= BATCH_BYTES):
                    columns, part, decoded = [pa.concat_arrays(texts) for texts in zip(*part)], [], 0
                    for texts in columns:
                        texts.validate(full=True)  # Arrow reads invalid UTF-8 without an error
                    length = len(columns[-1])
                    has_text = pc.binary_length(columns[-1]).cast(pa.bool_())  # a comparison would import pandas
                    columns = [texts.filter(has_text).fill_null("") for texts in columns]
                    count = len(columns[-1])
                    texts = columns[0]
                    if column == PAIRS:
                        texts = pa.concat_arrays(columns).take([i for n in range(count) for i in (n, count + n)])
                    row += length
                    read = row / rows if rows else min(1.0, raw.tell() / disk_size)
                    literal = pc.sum(pc.match_substring(texts, SEPARATOR)).as_py() or 0
                    size = pc.sum(pc.binary_length(texts)).as_py() or 0
                    yield Batch(texts, length - count, size, read, column, literal=literal)
    except pa.ArrowException as error:
        raise UserError(f"{path} is damaged or no {path.suffix} file ({error}): fetch it again or leave it "
                        "out") from error


def _arrow_column(path, schema, wanted):
    """The name of the text column of an Arrow schema. Raises `UserError` where it holds no strings."""
    import pyarrow.types as types

    def is_string(kind):
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)

    column = _text_column(path, [(field.name, is_string(field.type)) for field in schema], wanted)
    for name in _names(column):
        kind = schema.field(name).type
        if not (is_string(kind) or types.is_null(kind)):  # null: a file whose texts are all missing
            raise UserError(f"{path}: column `{name}` holds {kind}, not strings: choose another one with "
                            "--text_column, or leave the file out")
    return column


def _names(column):
    """The columns of a table that make up `column`: itself, or the two of pairs."""
    return list(PAIR) if column == PAIRS else [column]


def _text_column(path, columns, wanted):
    """The column of the documents among `columns` [(name, whether it holds strings)]: the one that is wanted, else
    `PAIRS` if both are there, else `text`, else the only one that holds strings."""
    names = [name for name, _ in columns]
    strings = [name for name, is_string in columns if is_string]
    if wanted is None and {*PAIR} <= {*names}:
        wanted = PAIRS
        if "text" in names:
            raise UserError(f"{path} has a column `text` and pairs of `prompt` and `completion`: choose with "
                            f"--text_column text or --text_column '{PAIRS}'")
    if wanted is None and "text" in names:
        wanted = "text"
    if wanted is None and "messages" in names:
        raise UserError(f"{path} {CHATS}")
    if wanted is None and len(strings) == 1:
        wanted = strings[0]
    for name in _names(wanted):
        if name not in names:
            raise UserError(f"{path} has no column `{name or 'text'}`, but {', '.join(names)}: name the one that holds "
                            "the documents with --text_column, or rename those of questions and answers `prompt` and "
                            "`completion`")
        if names.count(name) > 1:
            raise UserError(f"{path} has {names.count(name)} columns `{name}`: rename all but one of them")
    return wanted


def _read_json(path, wanted):
    """Objects with a text column, or strings, one per line or in one array.

    `datasets` reads JSON too, but cannot name a broken line, refuses half a surrogate pair, and turns rows of mixed
    types into strings by rules that change with its version.
    """
    size = max(1, path.stat().st_size)
    with _opened(path) as (file, raw):
        head = file.peek(4096)
        if head.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
        is_array = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
        first, rows = peeked(_json_rows(path, file, is_array), 100)
        objects = [row for _, row in first if isinstance(row, dict)]
        columns = {}
        for key, value in (item for row in objects for item in row.items()):
            columns[key] = columns.get(key, False) or isinstance(value, str)
        column = _text_column(path, list(columns.items()), wanted) if objects else wanted

        for batch in grouped(_text_of(where, row, column) for where, row in rows):
            yield batch._replace(read=raw.tell() / size, column=column)


def _json_rows(path, file, is_array):
    """(where it is, value) of every item of one array, or else of every line; None for an empty line."""
    where = path
    try:
        if is_array:
            for number, item in enumerate(JSON.decode(file.read().decode()), 1):
                yield f"{path}, item {number} of its array", item
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            yield where, None if line.isspace() else JSON.decode(line.decode())
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        reason = error
        if isinstance(error, json.JSONDecodeError):  # less its own number of the line, which is always 1
            reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise UserError(f"{where}: {reason}: give one array of objects, or one object a line") from error


def _text_of(where, row, column):
    """The text of a row of JSON, of pairs (prompt, completion); None where it has none. `UserError` for no text."""
    if row is None or (isinstance(row, str) and column != PAIRS):
        return row
    if not isinstance(row, dict):
        raise UserError(f"{where} is a {type(row).__name__}: give objects with a text column, or strings")
    if column == PAIRS:
        if missing := [name for name in PAIR if name not in row]:
            raise UserError(f"{where} {CHATS}" if "messages" in row else f"{where} has no `{missing[0]}`, and the file "
                            "holds pairs of `prompt` and `completion`: give it one, which may be empty")
        prompt, completion = (_text_of(where, row, name) for name in PAIR)
        return completion and (prompt or "", completion)
    text = row.get(column)
    if text is None or isinstance(text, str):
        return text
    raise UserError(f"{where}: `{column}` holds a {type(text).__name__}, not a string: turn it into text, or choose "
                    "another column with --text_column")


def _read_table(path, delimiter, wanted):
    """CSV and TSV, each row one document. The first row names the columns.

    CSV is RFC 4180's: a field that begins with a quote ends with one, a quote in it is doubled, and line ends may stand
    in it. In a TSV a line is a row and a quote a letter, but a field that as a whole is quoted like that is unquoted.
    A row with more fields than the header is refused, unless every row has one empty field at its end.
    """
    size = max(1, path.stat().st_size)
    with open(path, "rb") as raw:
        text = io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="" if delimiter == "," else "\n")
        lines = _checked_lines(path, text)
        rows = _csv_rows(path, lines) if delimiter == "," else _tsv_rows(path, lines)
        _, header = next(rows, (1, None))
        if header is None:
            raise UserError(f"{path} is empty: leave it out")
        first, rows = peeked(rows, 100)
        if len(header) == 1 and header[0] != wanted and (other := re.search(r"[;|\t,]", header[0])):
            raise UserError(f"{path}: its header {header[0]!r} is one column with {other[0]!r} in it: save the table "
                            f"with {delimiter!r} between its columns")
        is_string = [any(not _is_number(row[i]) for _, row in first if len(row) > i) for i in range(len(header))]
        column = _text_column(path, list(zip(header, is_string)), wanted)
        at, width = [header.index(name) for name in _names(column)], len(header)
        is_open = bool(first) and len(first[0][1]) == width + 1 and first[0][1][-1] == ""

        def texts():
            for number, row in rows:
                if len(row) > width + is_open or (is_open and (len(row) <= width or row[-1])):
                    raise UserError(f"{path}, line {number} has {len(row)} fields and the header {width}: put a text "
                                    f"with {delimiter!r} in it in quotes, or correct the line")
                if delimiter == "\t" and len(row) < width and row[-1].startswith('"'):
                    raise UserError(f"{path}, line {number} begins a text in quotes that does not end there: a TSV "
                                    "cannot hold line ends, save the table as CSV")
                fields = [row[i] if len(row) > i else "" for i in at]
                yield tuple(fields) if column == PAIRS else fields[0]

        for batch in grouped(texts()):
            yield batch._replace(read=raw.tell() / size, column=column)


def _checked_lines(path, text):
    """The lines of a text file that was opened with "surrogateescape". Raises `UserError` where one is not UTF-8."""
    for number, line in enumerate(text, 1):
        if not line.isascii() and re.search("[\ud800-\udfff]", line):
            raise UserError(f"{path}, line {number} is not UTF-8: {CONVERT}")
        yield line


def _csv_rows(path, lines):
    """(number of its first line, fields) of every row of a CSV that is not empty."""
    csv.field_size_limit(2**31 - 1)  # subtle: of the whole process; the default, 128 KiB, is less than some documents
    reader, number = csv.reader(lines, strict=True), 1
    try:
        for row in reader:
            if row:
                yield number, row
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {number} cannot be read as CSV ({error}): put its text in quotes, and double "
                        "those that are in it") from error


def _tsv_rows(path, lines):
    """(number, fields) of every line of a TSV that is not empty."""
    for number, line in enumerate(lines, 1):
        fields = line.rstrip("\r\n").split("\t")
        if fields != [""]:
            yield number, [field[1:-1].replace('""', '"') if QUOTED.fullmatch(field) else field for field in fields]


def _is_number(text):
    try:
        float(text or 0)
    except ValueError:
        return text.lower() in ("true", "false")
    return True


def grouped(texts):
    """Batches of some 2 MB from an iterable of texts, or of pairs (prompt, completion)."""
    batch, size, skipped = [], 0, 0
    for text in texts:
        parts = text if isinstance(text, tuple) else (text,)
        if parts[-1]:
            batch += map(whole_characters, parts)
            size += sum(len(part.encode()) for part in batch[-len(parts) :])
        else:
            skipped += 1
        if size >= BATCH_BYTES:
            yield Batch(batch, skipped, size, 0.0, literal=sum(SEPARATOR in text for text in batch))
            batch, size, skipped = [], 0, 0
    if batch or skipped:
        yield Batch(batch, skipped, size, 1.0, literal=sum(SEPARATOR in text for text in batch))
