"""What people bring: tables, folders with links and leftovers in them, sources that change under the work."""

import csv
import errno
import gzip
import io
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT, make_shards, run_trainer, tiny_flags
from test_fineweb import contents, reference, stream, write_jsonl

import fineweb
from harness import documents, text
from harness.cli import UserError
from harness.shards import kind_of_data


def texts_of(path, column=None):
    """The documents of a file, in a list."""
    return [str(text) for batch in documents.read_file(Path(path), column) for text in batch.texts]


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def shards_of(source, out, *flags):
    """Make shards of 100 tokens by the command line; returns their tokens."""
    fineweb.main(["--source", str(source), "--out", str(out), "--shard_size", "100", *flags])
    return stream(Path(out))


# -- tables

WORDS = ["The harbour bell", "it rang, twice", 'she said "no"', "", "naïve", "1984", "tab\there", "line\nend", "日本"]
FLAWS = ["none", "more", "fewer", "ends", "some ends", "quote", "pair", "latin"]


def make_table(rng, delimiter):
    """(bytes of a table, texts that Python's csv reads in it, None where it is to be refused)."""
    names = rng.sample(["id", "label", "url"], rng.randrange(4))
    names.insert(rng.randrange(len(names) + 1), "text")
    words = WORDS if delimiter == "," else [word for word in WORDS if not re.search("[\t\n]", word)]
    rows = [[" ".join(rng.choices(words, k=3)) for _ in names] for _ in range(rng.randrange(2, 30))]
    file = io.StringIO()
    end = rng.choice(["\n", "\r\n"])
    flaw, at = rng.choice(FLAWS), rng.randrange(len(rows))
    if flaw == "more":
        rows[at] = [*rows[at], "x"]
    if flaw == "fewer":
        rows[at] = rows[at][:-1] or [""]
    if flaw == "ends":
        rows = [[*row, ""] for row in rows]
    if flaw == "some ends":
        rows[at] = [*rows[at], ""]
    if delimiter == ",":
        csv.writer(file, lineterminator=end).writerows([names, *rows])
    content = file.getvalue() or "".join(delimiter.join(row) + end for row in [names, *rows])
    if flaw in ("quote", "pair"):  # somebody's, who does not know of quoting
        lines = content.split("\n")
        for line in rng.sample(range(1, len(lines)), 1 if flaw == "quote" else 2):
            lines[line] = '"' + lines[line]
        content = "\n".join(lines)
    content = rng.choice([b"", b"\xef\xbb\xbf"]) + content.encode()
    if flaw == "latin":
        return content.rstrip(b"\r\n") + b"\n" + delimiter.encode().join([b"caf\xe9"] * len(names)), None
    try:
        lines = io.StringIO(content.decode("utf-8-sig"), newline="")
        header, *rows = csv.reader(lines, strict=True) if delimiter == "," else (
            line.rstrip("\r\n").split("\t") for line in lines)
    except csv.Error:
        return content, None
    rows = [row for row in rows if row and row != [""]]
    width = len(header)
    if not all(len(row) == width + 1 and row[-1] == "" for row in rows) and any(len(row) > width for row in rows):
        return content, None
    if delimiter == "\t" and any(len(row) < width and row[-1].startswith('"') for row in rows):
        return content, None  # it may be the first line of several
    column = header.index("text")
    expected = [row[column] for row in rows if len(row) > column]
    if delimiter == "\t":
        expected = [t[1:-1].replace('""', '"') if re.fullmatch('"([^"]|"")*"', t) else t for t in expected]
    return content, [text for text in expected if text]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_hundred_tables_against_pythons_csv(tmp_path, suffix):
    """Catches columns that are shifted, rows that are swallowed and halves of texts: too many or too few fields,
    delimiters at the end, lone quotes, byte order marks, line ends and other encodings."""
    refused = 0
    for seed in range(100):
        content, expected = make_table(random.Random(seed), "," if suffix == ".csv" else "\t")
        path = written(tmp_path / f"{seed}{suffix}", content)
        if expected is None:
            refused += 1
            with pytest.raises(UserError, match=rf"{seed}{suffix}, line \d+"):
                texts_of(path)
        else:
            assert texts_of(path) == expected, seed
    assert 10 < refused < 90


def test_tables_that_trained_on_the_wrong_column(tmp_path):
    """Catches half of every text, or the label in its place, where rows have more fields than the header."""
    for rows, message in (
        ("text\n" + "Sentence number one, and its second half\n" * 9, "line 2 has 2 fields and the header 1"),
        ("id,text,label\n" + '1,"a, b",x,\n' * 9 + '1,"a, b",x\n', "line 11 has 3 fields"),
        ("id,text\n1,fine\n2,not, fine\n", "line 3 has 3 fields and the header 2"),
        ("id;text\n1;a\n", r"header 'id;text' is one column with ';' in it"),
        ("text,n,text\na,1,b\n", "has 2 columns `text`"),
    ):
        with pytest.raises(UserError, match=message):
            texts_of(written(tmp_path / "a.csv", rows))
    assert texts_of(written(tmp_path / "b.csv", "id,text,label\n" + '1,"a, b",x,\n' * 3)) == ["a, b"] * 3
    assert texts_of(written(tmp_path / "d.csv", "text\n1984\nTrue\n")) == ["1984", "True"]
    assert texts_of(written(tmp_path / "e.csv", "text\n" + "x" * 200_000 + "\n"))[0] == "x" * 200_000


def test_a_quote_in_a_tsv_is_a_letter(tmp_path):
    """Catches a lone quote that swallows rows, and a text in quotes over several lines that is cut at the first."""
    expected = ['"' * (i in (20, 60)) + f"text {i}" for i in range(300)]
    rows = "".join(f"{i}\t{words}\tlab\n" for i, words in enumerate(expected))
    assert texts_of(written(tmp_path / "a.tsv", "id\ttext\tlab\n" + rows)) == expected
    assert texts_of(written(tmp_path / "b.tsv", 'id\ttext\n1\t"she said ""no"""\n2\t"a" and "b"\n')) == [
        'she said "no"', '"a" and "b"']
    with pytest.raises(UserError, match="line 3 begins a text in quotes that does not end there"):
        texts_of(written(tmp_path / "c.tsv", 'id\ttext\tn\n1\ta\t2\n2\t"first line\nsecond line"\t3\n'))


def test_columns_of_parquet_and_arrow(tmp_path):
    """Catches tracebacks and "damaged" for two columns of one name, a dotted name beside a struct, no text at all."""
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="has 2 columns `text`"):
        texts_of(tmp_path / "twice.parquet")
    pq.write_table(pa.table({"s": [{"text": "inside"}], "s.text": ["dotted"]}), tmp_path / "dotted.parquet")
    assert texts_of(tmp_path / "dotted.parquet", "s.text") == ["dotted"]
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "null.parquet")
    assert [batch.skipped for batch in documents.read_file(tmp_path / "null.parquet")] == [3]
    table = pa.table({"text": ["one", "", None, "two"], "n": [1, 2, 3, 4]})
    with pa.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as sink:
        sink.write_table(table)
    with pa.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as sink:
        sink.write_table(table, max_chunksize=2)
    for name in ("stream", "file"):
        assert texts_of(tmp_path / f"{name}.arrow") == ["one", "two"]


def test_parquet_that_unfolds(tmp_path):
    """Catches gigabytes of memory for a file of a kilobyte whose rows repeat one text."""
    pq.write_table(pa.table({"text": ["word " * 20_000] * 6_000}), tmp_path / "a.parquet")  # 600 MB
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    sizes = [batch.size for _, batch in zip(range(20), documents.read_file(tmp_path / "a.parquet"))]
    assert max(sizes) <= documents.BATCH_BYTES + 16 * 100_000


def test_numbers_of_five_thousand_digits(tmp_path):
    """Catches a row of JSON that is refused for a number beside its text."""
    assert texts_of(written(tmp_path / "a.jsonl", '{"n": ' + "9" * 5000 + ', "text": "ok"}\n')) == ["ok"]
    assert texts_of(written(tmp_path / "a.json", '[{"n": ' + "9" * 5000 + ', "text": "ok"}]')) == ["ok"]


def test_endoftext_in_a_row_is_said(tmp_path, capsys):
    """Catches documents that are joined by the letters of <|endoftext|>, in silence, where a .txt would be split."""
    texts = ["a<|endoftext|>b"] * 3 + ["plain words in a row"] * 60
    write_jsonl(tmp_path / "a.jsonl", texts)
    pq.write_table(pa.table({"text": texts}), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        assert shards_of(tmp_path / name, tmp_path / f"{name}_out") == reference(texts)
        assert "of 63 documents, 3 texts with <|endoftext|> as letters" in capsys.readouterr().out


# -- folders


def found_in(folder, **options):
    """Names of the files that a folder gives, and the notes about them."""
    source = documents.local_source([folder], **options)
    return [file.where.relative_to(folder).as_posix() for file in source.files], "; ".join(source.notes)


def test_links_are_followed_once(tmp_path):
    """Catches a folder that is left out because it is a link, a walk without end, and a file that is read twice."""
    written(tmp_path / "d" / "a.txt", "a")
    written(tmp_path / "books" / "b.txt", "b")
    (tmp_path / "d" / "books").symlink_to(tmp_path / "books")
    (tmp_path / "d" / "again").symlink_to(tmp_path / "d")
    (tmp_path / "books" / "up").symlink_to("..")
    assert found_in(tmp_path / "d") == (["a.txt", "books/b.txt"], "")
    make_shards(tmp_path / "books")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "far").symlink_to(tmp_path / "books")
    (tmp_path / "books" / "b.txt").unlink()
    (tmp_path / "books" / "up").unlink()
    assert kind_of_data(tmp_path / "s") == "shards"


def test_what_cannot_be_read_is_named(tmp_path):
    """Catches a file that is left out without a word since its link leads nowhere or its folder is closed."""
    written(tmp_path / "d" / "a.txt", "a")
    (tmp_path / "d" / "b.txt").symlink_to(".git/annex/objects/x")
    for look in (lambda: found_in(tmp_path / "d"), lambda: kind_of_data(tmp_path / "d")):
        with pytest.raises(UserError, match=r"b\.txt cannot be read \(No such file .*, a link to \.git/annex"):
            look()
    (tmp_path / "d" / "b.txt").unlink()
    (tmp_path / "d" / "closed").mkdir(mode=0)
    if not os.access(tmp_path / "d" / "closed", os.R_OK):  # root may read it
        with pytest.raises(UserError, match="closed cannot be read"):
            found_in(tmp_path / "d")


def test_outputs_are_not_inputs(tmp_path):
    """Catches logs, caches, shards and exports that become text, and text that is ignored for the shards made of it."""
    books = tmp_path / "books"
    words = "It was the best of times, it was the worst of times.\n" * 400
    written(books / "a.txt", words)
    for directory, more in (("log", []), ("log", ["--resume", "--max_steps", 2]), (".", [])):  # below the data, in it
        flags = tiny_flags(".", directory, cache_dir="cache", max_steps=1, val_every=0)
        result = run_trainer([*flags, *more], cwd=books)
        assert result.returncode == 0, result.stderr
    assert found_in(books, leave_out=[books / "cache"])[0] == ["a.txt"]
    for _ in range(2):
        command = [sys.executable, ROOT / "fineweb.py", "--source", ".", "--shard_size", "2000"]
        result = subprocess.run(command, cwd=books, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    with pytest.raises(UserError, match=r"holds text \(.*a\.txt\) and shards \(.*books_shards"):
        kind_of_data(books, cache_dir=books / "cache")


def test_a_changed_text_beside_its_cache_is_read(tmp_path):
    """Catches a run on the old text, out of a cache below the folder of the text."""
    books = tmp_path / "books"
    folders = set()
    for word in ("harbour", "bell"):
        written(books / "a.txt", f"The {word} of the town rang twice.\n" * 400)
        train, *_ = text.find_splits(books, None, books / "cache")
        folders.add(train[0][0].parent)
    assert len(folders) == 2 and kind_of_data(books) == "text", "also where another --cache_dir is given"
    assert kind_of_data(folders.pop()) == "shards"


def test_metadata_of_datasets_are_no_documents(tmp_path):
    """Catches a data set that is refused for the files that describe it, and documents that are left out for a name."""
    import datasets

    parts = {name: datasets.Dataset.from_dict({"text": [name] * 3}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    names, notes = found_in(tmp_path / "saved")
    assert all(name.endswith(".arrow") for name in names) and len(names) == 2
    assert f"names say test, train, and all of it is read as one text: to keep them apart give --data " \
           f"{tmp_path / 'saved' / 'train'}" in notes
    written(tmp_path / "clone" / "dataset_infos.json", '{"default": {"splits": {}, "features": {}}}')
    for split in ("train", "test", "validation"):
        path = written(tmp_path / "clone" / "data" / f"{split}-00000-of-00001.parquet", b"")
        pq.write_table(pa.table({"text": [split] * 200}), path)
    names, notes = found_in(tmp_path / "clone")
    assert names == ["data/train-00000-of-00001.parquet"] and "split train of test, train, validation" in notes
    assert found_in(tmp_path / "clone", split="test")[0] == ["data/test-00000-of-00001.parquet"]
    with pytest.raises(UserError, match="no split dev, but test, train, validation"):
        found_in(tmp_path / "clone", split="dev")
    assert set(shards_of(tmp_path / "clone", tmp_path / "out", "--split", "validation")) == {
        *reference(["validation"])}
    written(tmp_path / "own" / "state.json", '[{"text": "of a state"}]')
    assert found_in(tmp_path / "own")[0] == ["state.json"]


def test_names_that_say_their_split(tmp_path):
    """Catches test data that get into the weights without a word."""
    for name in ("train.txt", "valid.txt", "test.txt"):
        written(tmp_path / "d" / name, name)
    flags = f"--data {tmp_path / 'd' / 'train.txt'} --val_data {tmp_path / 'd' / 'valid.txt'}"
    assert flags in found_in(tmp_path / "d")[1]
    for name in ("train", "val"):
        written(tmp_path / "e" / name / "a.txt", name)
    assert f"--data {tmp_path / 'e' / 'train'} --val_data {tmp_path / 'e' / 'val'}" in found_in(tmp_path / "e")[1]
    written(tmp_path / "f" / "restrained.txt", "x")
    written(tmp_path / "f" / "training.txt", "x")
    assert found_in(tmp_path / "f")[1] == ""


def test_what_is_left_out_is_said(tmp_path, capsys):
    """Catches a folder of notes of which only requirements.txt is read, in silence, by the trainer or fineweb.py."""
    vault = tmp_path / "vault"
    for number in range(50):
        written(vault / f"{number}.md", "a note")
    written(vault / "requirements.txt", "numpy\n" * 100)
    write_jsonl(vault / "rows.jsonl", ["some words in a row"] * 60 + [""] * 5)
    written(vault / "c.zip", b"PK")
    text.find_splits(vault, None, tmp_path / "cache")
    fineweb.main(["--source", str(vault), "--out", str(tmp_path / "out"), "--shard_size", "100"])
    said = capsys.readouterr().out
    assert said.count("vault: 2 files (1 .txt, 1 .jsonl)") == 2 and said.count("left out: 50 .md, 1 .zip") == 2
    assert said.count("of 61 documents, 5 rows without text skipped") == 2
    text.find_splits(vault, None, tmp_path / "cache")
    assert "left out: 50 .md, 1 .zip" in capsys.readouterr().out, "also where the cache has it"
    written(tmp_path / "notes.md", "plain text\n" * 50)
    for look in (kind_of_data, lambda path: documents.local_source([path])):
        with pytest.raises(UserError, match="rename plain text to .txt"):
            look(tmp_path / "notes.md")


def test_a_file_beside_its_packed_self_is_refused(tmp_path):
    """Catches validation on what was trained on: a.jsonl and a.jsonl.gz are the same documents."""
    path = write_jsonl(tmp_path / "d" / "a.jsonl", ["x"]) if (tmp_path / "d").mkdir() is None else None
    (tmp_path / "d" / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.jsonl and a\.jsonl\.gz are the same file"):
        found_in(tmp_path / "d")


def test_text_beside_shards_of_nanogpt_is_said_to_be_ignored(tmp_path, capsys):
    """Catches a text that is passed over in silence."""
    for name in ("train.bin", "val.bin"):
        written(tmp_path / name, np.random.default_rng(0).integers(0, 50257, 500, dtype=np.uint16).tobytes())
    written(tmp_path / "input.txt", "text")
    text.find_splits(tmp_path, None, tmp_path / "cache")
    assert "its shards are read, the text beside them (input.txt) is not" in capsys.readouterr().out


# -- sources that change


def test_a_source_that_changed_is_not_continued(tmp_path):
    """Catches one folder of two texts: a change in the middle of a file, of the same size, before the place where the
    first run stopped, in the file at hand or in one that was read to its end."""
    words = (ROOT / "input.txt").read_text(encoding="utf-8")
    for number, (name, changes) in enumerate((("a.txt", "a.txt"), ("b.txt", "a.txt"), ("b.txt", "b.txt"))):
        source, out = tmp_path / str(number), tmp_path / f"out{number}"
        written(source / "a.txt", words[:200_000])
        if name == "b.txt":
            written(source / "b.txt", words[200_000:400_000])
        size = ["--shard_size", "15000", "--max_shards", "3" if name == "a.txt" else "6"]
        fineweb.main(["--source", str(source), "--out", str(out), *size])
        before, old = contents(out), (source / changes).read_text()
        written(source / changes, old[:50_000] + old[50_000:60_000].upper() + old[60_000:])
        with pytest.raises(UserError, match="is not what it was"):
            fineweb.main(["--source", str(source), "--out", str(out), "--shard_size", "15000"])
        assert all(contents(out)[name] == content for name, content in before.items() if name.endswith(".npy"))
        written(source / changes, old)
        fineweb.main(["--source", str(source), "--out", str(out), "--shard_size", "15000"])
        fineweb.main(["--source", str(source), "--out", str(tmp_path / f"straight{number}"), "--shard_size", "15000"])
        assert contents(out) == contents(tmp_path / f"straight{number}")


def test_a_corrected_file_costs_no_finished_shard(tmp_path):
    """Catches hours lost to one broken line: corrected or left out, the work goes on where it stopped."""
    rows = [f"document {i} of some words" for i in range(500)]
    for way in ("corrected", "left out"):
        source, out = tmp_path / way / "in", tmp_path / way / "out"
        source.mkdir(parents=True)
        for number in range(5):
            write_jsonl(source / f"{number}.jsonl", rows[number * 100 : number * 100 + 100])
        last = source / "4.jsonl"
        whole = last.read_bytes()
        last.write_bytes(whole[:-20] + b"\n")
        with pytest.raises(UserError, match=r"4\.jsonl, line 100"):
            shards_of(source, out)
        made = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}
        assert len(made) > 8
        if way == "corrected":
            last.write_bytes(whole)
        else:
            last.unlink()
        assert shards_of(source, out) == reference(rows if way == "corrected" else rows[:400])
        assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in made.items())


def test_a_finished_folder_knows_another_source(tmp_path):
    """Catches "complete" for a source that has grown, shrunk or changed since."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(2):
        write_jsonl(source / f"{number}.jsonl", ["some words in a row"] * 99)
    shards_of(source, out)
    shards_of(source, out)
    more = write_jsonl(source / "2.jsonl", ["more words"] * 99)
    with pytest.raises(UserError, match="is made of 2 files, and in has 3 now"):
        shards_of(source, out)
    more.unlink()
    (source / "1.jsonl").write_text((source / "1.jsonl").read_text().replace("row", "raw"))
    with pytest.raises(UserError, match=r"1\.jsonl is not what it was"):
        shards_of(source, out)


def test_a_text_that_changes_while_it_is_read_fills_no_cache(tmp_path, monkeypatch):
    """Catches a cache that is keyed by one text and holds another for ever."""
    path = written(tmp_path / "a.txt", "The harbour bell rang.\n" * 500)
    inner = documents.read_file

    def changing(file, *args):
        stat = path.stat()
        path.write_text("the harbour bell rang.\n" * 500)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return inner(file, *args)

    monkeypatch.setattr(documents, "read_file", changing)
    with pytest.raises(UserError, match=r"a\.txt changed while it was read"):
        text.prepare_text(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="other locks")
def test_the_lock_of_a_host_that_is_gone_is_named(tmp_path, monkeypatch):
    """Catches a wait for ever, without a word of what to delete, where locks are files with a host's name in them."""
    import fcntl

    from harness.files import folder_lock

    def missing(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    written(tmp_path / ".lock", "4242\npod-a\n")
    named = pytest.raises(UserError, match=r"process 4242 on pod-a: if that machine is gone, delete .*\.lock")
    with named, folder_lock(tmp_path, "--out"):
        pass
