"""fineweb.py: the right tokens, whole shards after any accident, and every bad input reported in one line."""

import contextlib
import csv
import gzip
import hashlib
import http.server
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.parse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT

import fineweb
from harness import documents as harness_documents
from harness import text as harness_text
from harness import tokenizer
from harness.cli import UserError
from harness.files import sha256

EOT = tokenizer.END_OF_TEXT
ODD = [  # what tokenizers, readers and splitters trip over
    "Hello, world!", "a<|endoftext|>b", "  leading and trailing  ", "\n\n\nlines\n \nof\t\tspace\u3000\u2028",
    "naïve façade", "日本語の文章。", "🙂👩‍👩‍👧 emoji", "\x00 nul and \x85", "don't DON'T we'll", "1234567890" * 9,
    "x" * 3000, "word " * 700,
]


def reference(documents):
    """The plain loop: every document led by <|endoftext|>, in one list."""
    tokens = []
    for document in documents:
        if document:
            tokens += [EOT, *tokenizer.gpt2().encode_ordinary(document)]
    return tokens


def shards(folder):
    """The shards of a folder in order, {name: array}."""
    return {path.name: np.load(path) for path in sorted(folder.glob("*.npy"), key=lambda path: path.stem[-6:])}


def stream(folder):
    return np.concatenate(list(shards(folder).values())).tolist()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_parquet(path, texts, rows=7, **other):
    pq.write_table(pa.table({"text": texts, **other}), path, row_group_size=rows)
    return path


def write_jsonl(path, texts, **other):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
    return path


def run(*arguments, status=0, start_only=False, cwd=None, **environment):
    """`python fineweb.py ARGUMENTS` as a process; its stderr."""
    command = [sys.executable, str(ROOT / "fineweb.py"), *map(str, arguments)]
    environment = os.environ | {key: str(value) for key, value in environment.items()}
    if start_only:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stderr


@pytest.fixture
def small_batches(monkeypatch):
    """Batches of a few documents, so that small files have many."""
    monkeypatch.setattr(harness_documents, "BATCH_BYTES", 200)


# -- the right tokens


def test_worked_example_of_twenty_token_shards(tmp_path):
    """Catches tokens lost or doubled at shard ends, wrong sizes or names, and a manifest that is not true."""
    documents = [f"Document {i} says: {'la ' * (i % 9)}" for i in range(40)] + ["", None, "<|endoftext|>"]
    manifest = fineweb.write_shards(documents, tmp_path / "out", "toy", 20)
    found = shards(tmp_path / "out")
    assert stream(tmp_path / "out") == reference(documents)
    assert list(found)[:3] == ["toy_val_000000.npy", "toy_train_000001.npy", "toy_train_000002.npy"]
    assert all(array.dtype == np.uint16 and array.ndim == 1 for array in found.values())
    *full, last = (len(array) for array in found.values())
    assert set(full) == {20} and 0 < last <= 20
    assert manifest == harness_text.read_manifest(tmp_path / "out")
    assert manifest["complete"] and manifest["expected_shards"] == len(found) == len(manifest["files"])
    assert (manifest["documents"], manifest["skipped"]) == (41, 2)
    assert (manifest["tokenizer"], manifest["dtype"], manifest["vocab_size"]) == ("gpt2", "uint16", 50257)
    for name, entry in manifest["files"].items():
        assert (entry["tokens"], entry["sha256"]) == (len(found[name]), sha256(tmp_path / "out" / name))


@pytest.mark.parametrize("count", [20, 39, 40, 41, 60, 61])
def test_shard_ends_at_every_offset(tmp_path, count):
    """Catches the exact end: a stream that just fills its last shard, and one that begins the next by one token."""
    text = " a" * (count - 1)
    if count == 20:
        with pytest.raises(UserError, match="20 tokens.*smaller --shard_size, for example 2"):
            fineweb.write_shards([text], tmp_path, "toy", 20)
        assert not list(tmp_path.glob("*.npy")) and harness_text.read_manifest(tmp_path) is None
        return
    fineweb.write_shards([text], tmp_path, "toy", 20)
    assert [len(array) for array in shards(tmp_path).values()] == [20] * (count // 20) + [count % 20] * (count % 20 > 0)
    assert stream(tmp_path) == reference([text])


def test_max_shards_and_folder_in_use(tmp_path):
    """Catches a limit that cuts differently, and writing over another dataset."""
    documents = ["some words here"] * 50
    whole, part = tmp_path / "whole", tmp_path / "part"
    fineweb.write_shards(documents, whole, "toy", 20)
    manifest = fineweb.write_shards(documents, part, "toy", 20, max_shards=3)
    assert manifest["complete"] and len(manifest["files"]) == 3
    assert all((part / name).read_bytes() == (whole / name).read_bytes() for name in manifest["files"])
    with pytest.raises(UserError, match="holds shards already"):
        fineweb.write_shards(documents, part, "toy", 20)
    for name, value in (("max_shards", 1), ("shard_size", 1)):
        with pytest.raises(UserError, match=f"{name} is 1"):
            fineweb.write_shards(documents, tmp_path / "new", **{"name": "toy", "shard_size": 20, name: value})


def test_real_documents_equal_a_plain_loop(tmp_path, shared_documents):
    """Catches every document's tokens, by gigatoken where it is installed, and the same bytes for 1 and 2 workers."""
    source = harness_documents.local_source([shared_documents])
    assert source.size > harness_text.SMALL_SOURCE  # so that the fast tokenizer is what is tested
    for workers in (1, 2):
        fineweb.make_shards(source, tmp_path / str(workers), 1_000_000, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    texts = pq.read_table(shared_documents, columns=["text"]).column("text").to_pylist()
    tokens = np.concatenate(list(shards(tmp_path / "1").values()))
    documents = np.split(tokens, np.flatnonzero(tokens == EOT))[1:]
    assert len(documents) == len(texts)
    for document, text in zip(documents, texts):
        assert document[1:].tolist() == tokenizer.gpt2().encode_ordinary(text)


def plain(documents):
    """GPT-2's tokens, document by document."""
    return harness_text.plainly(tokenizer.gpt2_tokenizer())(documents)


@pytest.fixture(scope="module", params=["gpt2", "4096", "bytes"])
def twins(request):
    """The fast function for a vocabulary, and the one whose tokens it must give, document by document."""
    pytest.importorskip("gigatoken")
    own = tokenizer.chosen(request.param) or tokenizer.learn(
        [(ROOT / "input.txt").read_text(encoding="utf-8")], tokenizer.size_to_learn(request.param))
    return harness_text.with_gigatoken(own), harness_text.plainly(own)


def test_gigatoken_equals_tiktoken_for_every_character(twins):
    """Catches tokens that hang on a library's tables: every character that this Python's Unicode has."""
    fast, plain = twins
    codes = (code for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs"))
    characters = [chr(code) for code in codes]
    for begin in range(0, len(characters), 8192):
        part = characters[begin : begin + 8192]
        documents = [" ".join(f"{c}'s{c}" for c in part), "".join(f"{c}{c}a \n{c}b{c} " for c in part),
                     *(f"a{c}1  {c}" for c in part[::256])]
        assert np.array_equal(fast(documents), plain(documents)), hex(ord(part[0]))


def test_gigatoken_equals_tiktoken_for_odd_documents(twins):
    """Catches special tokens, control characters, runs of white space, slices of arrays and empty batches."""
    fast, plain = twins
    rng, spaces = random.Random(0), ["a", "\n", " ", "\t", "\u3000", "\x85", "\x1f", ".", "'s", "\x1e"]
    for _ in range(50):
        documents = ["".join(rng.choices(ODD, k=3)) for _ in range(20)]
        documents += ["".join(rng.choices(spaces[: rng.choice((6, 9, 10))], k=30)) for _ in range(rng.randrange(50))]
        assert np.array_equal(fast(documents), plain(documents))
        arrow = pa.array(documents, pa.large_string())[rng.randrange(19) :]
        assert np.array_equal(fast(arrow), plain(arrow))
    assert len(fast([])) == len(plain([])) == 0


def test_a_tokenizer_that_errs_is_found_out(monkeypatch, capsys):
    """Catches a fast tokenizer that is trusted unseen, and failing where it is not installed."""
    monkeypatch.setattr(harness_text, "with_gigatoken", lambda own: lambda texts: np.array([1], np.uint16))
    encode = harness_text.encoder(["text"], harness_text.SMALL_SOURCE, tokenizer.gpt2_tokenizer())
    assert encode(["text"]).tolist() == [EOT, 5239]
    assert "differ" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    encode = harness_text.encoder(["text"], harness_text.SMALL_SOURCE, tokenizer.gpt2_tokenizer())
    assert encode(["text"]).tolist() == [EOT, 5239]
    assert "no gigatoken" in capsys.readouterr().err


# -- every kind of source, from any place


def split(text):
    """The documents of a .txt file."""
    return re.split(r"<\|endoftext\|>(?:\r?\n)?", text)


def write_sources(folder, documents):
    """A source of every kind in a folder each; all but the text files hold `documents`. The documents of the texts."""
    for kind in ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "json", "csv", "txt"):
        (folder / kind).mkdir(parents=True)
    half = len(documents) // 2
    for i, part in enumerate((documents[:half], documents[half:])):
        write_parquet(folder / "parquet" / f"{i}.PARQUET", part, score=list(range(len(part))))
        write_jsonl(folder / "jsonl" / f"{i}.jsonl", part)
        write_jsonl(folder / "jsonl.gz" / f"{i}.jsonl.gz", part)
        packed = pa.compress(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in part), "zstd", asbytes=True)
        (folder / "jsonl.zst" / f"{i}.jsonl.zst").write_bytes(packed)
        rows = [{"text": text, "n": [1, {"a": "]"}]} for text in part]
        (folder / "json" / f"{i}.JSON").write_text(json.dumps(rows if i else part, indent=i or None))
        with open(folder / "csv" / f"{i}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["n", "text"], *((n, text) for n, text in enumerate(part))])
    text = ("\r\n".join(documents) + "\nline\nafter line\n" * 40).replace("\0", "")
    (folder / "txt" / "0.TXT").write_bytes(text.encode())
    with gzip.open(folder / "txt" / "1.txt.gz", "wb") as file:
        file.write(b"\xef\xbb\xbf" + text.encode() * 2)
    return split(text) + split(text * 2)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "json", "csv", "txt"])
def test_every_kind_of_source_and_every_place_to_resume(tmp_path, small_batches, kind):
    """Catches the readers, and a resume that misses or repeats tokens: here every shard's start is resumed from."""
    documents = [f"{i} {odd}" for i, odd in enumerate(ODD * 2)]
    if kind == "csv":
        documents = [text.replace("\0", "").replace("\r", "") for text in documents]  # a CSV cannot hold these
    texts = write_sources(tmp_path, documents)
    expected = texts if kind == "txt" else documents
    source = harness_documents.local_source([tmp_path / kind])
    straight, steps = tmp_path / "straight", tmp_path / "steps"
    manifest = fineweb.make_shards(source, straight, 400)
    assert stream(straight) == reference(expected)
    assert manifest["documents"] == len(expected)
    assert manifest["separators"] == (len(expected) - 2 if kind == "txt" else 0)
    for count in range(2, len(manifest["files"]) + 1, 4 if kind == "csv" else 1):  # opening a CSV takes a while
        part = fineweb.make_shards(source, steps, 400, max_shards=count)
        assert len(part["files"]) == count and part["complete"]
    fineweb.make_shards(source, steps, 400)
    assert contents(steps) == contents(straight)
    for name in list(manifest["files"])[1::3]:
        (steps / name).unlink()
    fineweb.make_shards(source, steps, 400)
    assert contents(steps) == contents(straight)


def test_text_is_cut_where_the_tokenizer_cuts(tmp_path, monkeypatch):
    """Catches the pieces of a long text, at whatever bytes it is cut: their tokens are those of the whole, a document
    begins after each separator and nowhere else."""
    alphabet = ["a", "b'", " ", "\n", "\n", "\r\n", "\u3000", "é", "日", "。", "🙂", "1", ".", "\x1f", "\u2028", "\xa0",
                "\u2029", "\x85", "ァ", harness_documents.SEPARATOR, harness_documents.SEPARATOR + "\n"]
    rng = random.Random(3)
    for _ in range(80):
        monkeypatch.setattr(harness_documents, "BATCH_BYTES", rng.randrange(1, 60))
        text = "".join(rng.choices(alphabet, k=200)) + "end"
        (tmp_path / "a.txt").write_bytes(text.encode())
        for keep, documents in ((False, split(text)), (True, [text])):
            batches = list(harness_documents.read_file(tmp_path / "a.txt", keep_endoftext=keep))
            tokens = [plain(batch.texts)[not batch.leads :] for batch in batches]
            assert np.concatenate(tokens).tolist() == reference(documents)
            assert sum(batch.documents for batch in batches) == len(list(filter(None, documents)))
            assert sum(batch.skipped for batch in batches) == documents[1:].count("")


@pytest.mark.parametrize("line", ["The quick brown fox.\n", "The quick brown fox.\r\n", "The quick brown fox.\n\n",
                                  " The quick brown fox . \n", "速い茶色の狐。\n", "x = 1\n" + " " * 60,
                                  "速い茶色の狐。飛、越。"])
def test_every_kind_of_line_end_is_cut(tmp_path, monkeypatch, line):
    """Catches a text that is one piece, and so many times slower, for its CRLF, blank lines or blanks."""
    monkeypatch.setattr(harness_documents, "BATCH_BYTES", 1000)
    (tmp_path / "a.txt").write_text(line * 1000, newline="")
    batches = list(harness_documents.read_file(tmp_path / "a.txt"))
    assert len(batches) >= len(line.encode()) and max(batch.size for batch in batches) <= 1000
    tokens = [plain(batch.texts)[not batch.leads :] for batch in batches]
    assert np.concatenate(tokens).tolist() == reference([line * 1000])


@pytest.mark.parametrize("space", [" ", "\n", "\r\n", "\u3000", " \n\t"])
def test_a_million_blanks_in_a_row(space):
    """Catches the traceback of tiktoken's matcher, and other tokens where a run is cut for its sake."""
    run = space * (1_000_000 // len(space))
    for before, after in (("a", "b"), ("", " b"), ("a", "")):
        tokens = tokenizer.gpt2_tokenizer().encode(before + run + after)
        assert tokenizer.gpt2().decode(tokens.tolist()) == before + run + after
    for length in (9_999, 10_000, 10_001, 30_000):  # those that tiktoken can do by itself
        text = f"a b{(space * length)[:length]}c d{(space * length)[:length]}"
        assert tokenizer.gpt2_tokenizer().encode(text).tolist() == tokenizer.gpt2().encode_ordinary(text)


def test_stories_with_endoftext_between_them(tmp_path):
    """Catches TinyStories' text files: a document each, led by the token and not by its letters; counted and said."""
    stories = [f"Once upon a time, {i}.\n" for i in range(50)]
    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>\n".join(stories) + "<|endoftext|>\n")
    run("--source", path, "--out", tmp_path / "out", "--shard_size", 100)
    assert stream(tmp_path / "out") == reference(stories)
    manifest = harness_text.read_manifest(tmp_path / "out")
    assert (manifest["documents"], manifest["separators"], manifest["skipped"]) == (50, 50, 0)
    assert "split at 50 <|endoftext|>" in harness_text.summary(manifest)
    run("--source", path, "--out", tmp_path / "kept", "--shard_size", 100, "--keep_endoftext")
    assert stream(tmp_path / "kept") == reference([path.read_text()])
    error = run("--source", path, "--out", tmp_path / "kept", "--shard_size", 100, status=2)
    assert "of other flags (keep_endoftext True, not False)" in error
    folder = harness_text.prepare_text(path, tmp_path / "cache")
    found = list(shards(folder).values())
    assert np.concatenate([found[1], found[0]]).tolist() == reference(stories)


@pytest.mark.parametrize(("suffix", "place"), [  # where commit f510d01 stopped after seven shards of 50 tokens
    (".jsonl", {"row": 30, "skip": 59, "documents": 30, "separators": 0}),
    (".csv", {"row": 30, "skip": 59, "documents": 30, "separators": 0}),
    (".parquet", {"row": 35, "skip": 4, "documents": 35, "separators": 0}),
    (".txt", {"row": 1359, "skip": 33, "documents": 33, "separators": 32}),
])
def test_half_made_folders_of_an_older_version_continue(tmp_path, small_batches, suffix, place):
    """Catches a place that names a row (of a .txt a byte) being taken for one in tokens of the whole file, or refused:
    the shards are those of a run that was not stopped."""
    texts, path = [f"Document {i} says: " + "la " * (i % 9) for i in range(60)], tmp_path / f"docs{suffix}"
    if suffix == ".parquet":
        write_parquet(path, texts)
    elif suffix == ".jsonl":
        write_jsonl(path, texts)
    else:
        path.write_text("<|endoftext|>".join(texts) if suffix == ".txt" else "\n".join(["text", *texts]))
    out = tmp_path / "out"
    fineweb.main(["--source", str(path), "--out", str(out), "--shard_size", "50"])
    whole, manifest = contents(out), json.loads((out / "manifest.json").read_text())
    names = list(manifest["files"])
    for name in names[7:]:
        (out / name).unlink()
    for number, name in enumerate(names[:7]):
        manifest["files"][name]["start"] = {"file": 0, "row": 0, "skip": 50 * number, "documents": 0, "skipped": 0}
    manifest["files"] = {name: manifest["files"][name] for name in names[:7]}
    del manifest["source_sha256"]
    manifest |= {"revision": harness_text.old_revision(harness_documents.local_source([path]).files),
                 "complete": False, "next": {"file": 0, "skipped": 0, **place}}
    (out / "manifest.json").write_text(json.dumps(manifest))
    fineweb.main(["--source", str(path), "--out", str(out), "--shard_size", "50"])
    again, now = contents(out), json.loads((out / "manifest.json").read_text())
    assert {name: again[name] for name in names} == {name: whole[name] for name in names}
    assert (now["complete"], now["documents"]) == (True, 60)


@pytest.mark.parametrize("stem", ["train", "val", "train_val", "Train", "my-val.2"])
def test_names_with_train_and_val_in_them(tmp_path, stem):
    """Catches the splits: a source called train.jsonl once gave shards that were training and validation at once."""
    source = write_jsonl(tmp_path / f"{stem}.jsonl", ["some words in a row"] * 99)
    fineweb.make_shards(harness_documents.local_source([source]), tmp_path / "out", 100)
    for name in shards(tmp_path / "out"):
        words = re.split(r"[^a-z]+", name.lower())
        assert ("train" in words) + ("val" in words) == 1


def test_text_columns(tmp_path):
    """Catches choice of the column: `text`, the only one of strings, the one that is named; else they are listed."""
    texts = ["some words in a row"] * 99
    pq.write_table(pa.table({"id": range(99), "body": texts}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"id": i, "body": t}) + "\n" for i, t in enumerate(texts)))
    (tmp_path / "c.csv").write_text("id,body\n" + "".join(f"{i},{t}\n" for i, t in enumerate(texts)))
    manifest = fineweb.make_shards(harness_documents.local_source([tmp_path]), tmp_path / "out", 200)
    assert manifest["text_column"] == "body" and stream(tmp_path / "out") == reference(texts * 3)
    both = write_parquet(tmp_path / "both.parquet", texts, body=[text[::-1] for text in texts])
    run("--source", both, "--text_column", "body", "--out", tmp_path / "body", "--shard_size", 200)
    assert stream(tmp_path / "body") == reference(text[::-1] for text in texts)
    error = run("--source", both, "--text_column", "text", "--out", tmp_path / "body", "--shard_size", 200, status=2)
    assert "text_column body, not text" in error
    error = run("--source", both, "--text_column", "txt", "--out", tmp_path / "x", status=2)
    assert "no column `txt`, but text, body" in error


def test_rows_without_text_are_skipped_and_counted(tmp_path, small_batches):
    """Catches a crash or an empty document where a row has no text, and half a surrogate pair in JSON."""
    rows = ["one one one", None, "", "two two two"] * 20
    write_parquet(tmp_path / "a.parquet", rows)
    lines = ['{"text": "one one one"}', '{"id": 3}', '{"text": null}', "", '{"text": "x\\ud83dy"}']
    (tmp_path / "b.jsonl").write_text("\n".join(lines * 9))
    manifest = fineweb.make_shards(harness_documents.local_source([tmp_path]), tmp_path / "out", 50)
    assert stream(tmp_path / "out") == reference(rows + ["one one one", "x\ufffdy"] * 9)
    assert (manifest["documents"], manifest["skipped"]) == (40 + 2 * 9, 40 + 3 * 9)


def test_document_of_50_megabytes(tmp_path):
    """Catches one long document that no buffer was made for."""
    line = "The quick brown fox jumps over the lazy dog. 0123456789\n"
    write_jsonl(tmp_path / "long.jsonl", ["short", line * 900_000, "short"])
    fineweb.make_shards(harness_documents.local_source([tmp_path / "long.jsonl"]), tmp_path / "out", 8_000_000)
    tokens = np.concatenate(list(shards(tmp_path / "out").values()))
    assert np.flatnonzero(tokens == EOT).tolist() == [0, 2, len(tokens) - 2]
    assert np.array_equal(tokens[3:-2], np.tile(tokenizer.gpt2().encode(line), 900_000))


# -- accidents


def test_ten_kills_at_random_moments(tmp_path, shared_documents):
    """Catches torn files, shards made twice and other bytes after kills -9 at any moment."""
    arguments = ("--source", shared_documents, "--shard_size", 100_000)
    run(*arguments, "--out", tmp_path / "straight")
    out, rng, kept = tmp_path / "killed", random.Random(7), {}

    def recorded():
        return len((harness_text.read_manifest(out) or {"files": ()})["files"])

    for kill in range(10):
        process = run(*arguments, "--out", out, start_only=True)
        if kill % 2:
            while recorded() <= len(kept) and process.poll() is None:
                time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1 if kill % 2 else 2))
        process.kill()
        process.wait()
        manifest = harness_text.read_manifest(out)
        for name in manifest["files"] if manifest else ():
            assert len(np.load(out / name)) <= 100_000
            kept.setdefault(name, (out / name).stat().st_mtime_ns)
        for path in out.glob("*.npy"):
            assert path.read_bytes() == (tmp_path / "straight" / path.name).read_bytes()
    run(*arguments, "--out", out)
    assert contents(out) == contents(tmp_path / "straight")
    assert kept and all((out / name).stat().st_mtime_ns == made for name, made in kept.items())


def test_gaps_are_filled_and_damage_is_found(tmp_path):
    """Catches `--verify`, and a rerun that must make what is missing and nothing else."""
    source = write_jsonl(tmp_path / "docs.jsonl", [f"document number {i} of the toy" for i in range(300)])
    out = tmp_path / "out"
    arguments = ("--source", source, "--out", out, "--shard_size", 200)
    run(*arguments)
    before = contents(out)
    run(*arguments, "--verify")
    names = sorted(name for name in before if "_train_" in name)
    (out / names[0]).unlink()
    (out / names[2]).write_bytes(before[names[2]][:-2])
    (out / names[4]).write_bytes(before[names[4]][:-1] + bytes([before[names[4]][-1] ^ 1]))  # the size stays
    (out / "other_train_000099.npy").write_bytes(before[names[0]])
    error = run("--verify", "--out", out, status=2)
    assert all(name in error for name in (names[0], names[2], names[4], "other_train_000099.npy"))
    assert "4 of" in error and names[1] not in error and error.count("\n") == 1
    for name in (names[2], names[4], "other_train_000099.npy"):
        (out / name).unlink()
    stamp = (out / names[1]).stat().st_mtime_ns
    run(*arguments)
    assert contents(out) == before and (out / names[1]).stat().st_mtime_ns == stamp


def test_other_data_is_never_mixed_in(tmp_path):
    """Catches a folder of shards against a run of another source, another size, and changed files."""
    source = write_jsonl(tmp_path / "docs.jsonl", ["some words in a row"] * 200)
    other = write_jsonl(tmp_path / "other.jsonl", ["some words in a row"] * 200)
    out = tmp_path / "out"
    run("--source", source, "--out", out, "--shard_size", 100, "--max_shards", 3)
    before = contents(out)
    assert "another source" in run("--source", other, "--out", out, "--shard_size", 100, status=2)
    assert "shard_size 100, not 101" in run("--source", source, "--out", out, "--shard_size", 101, status=2)
    assert {**contents(out), "manifest.json": before["manifest.json"]} == before
    (out / "manifest.json").unlink()
    assert "no manifest" in run("--source", source, "--out", out, "--shard_size", 100, status=2)


def test_too_small_a_disk_is_reported_before_the_start(tmp_path, monkeypatch):
    """Catches hours of work that cannot end: what is needed and what is free, and nothing written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    source = write_jsonl(tmp_path / "docs.jsonl", ["some words in a row"] * 3000)
    with pytest.raises(UserError, match="needs 32 kB more, but 1 kB are free: .*another disk.*--max_shards"):
        fineweb.make_shards(harness_documents.local_source([source]), tmp_path / "out", 4000)
    listed = [harness_documents.SourceFile("a_val_0.bin", 10**7, "a")]
    monkeypatch.setattr(fineweb, "newest_commit", lambda *args: "a")
    monkeypatch.setattr(fineweb, "repo_files", lambda *args: listed)
    with pytest.raises(UserError, match="needs 10.0 MB more, but 1 kB are free"):
        fineweb.fetch_pretokenized("repo", fineweb.HUB["fineweb"], tmp_path / "out")
    assert os.listdir(tmp_path) == ["docs.jsonl"]


# -- bad input


def bad_parquet(folder):
    content = write_parquet(folder / "bad.parquet", ["word " * 99] * 500).read_bytes()
    (folder / "bad.parquet").write_bytes(content[:-400] + b"\0" * 400)
    return folder / "bad.parquet"


def torn_parquet(folder):
    path = folder / "torn.parquet"
    texts = [random.Random(i).randbytes(300).hex() for i in range(500)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=50, compression="zstd")
    content = bytearray(path.read_bytes())
    content[200:700] = b"\xff" * 500
    path.write_bytes(content)
    return path


def invalid_parquet(folder):
    texts = pa.array([b"fine", b"caf\xe9"] * 99).cast(pa.binary())
    array = pa.StringArray.from_buffers(len(texts), texts.buffers()[1], texts.buffers()[2])
    pq.write_table(pa.table({"text": array}), folder / "latin.parquet")
    return folder / "latin.parquet"


def other_columns(folder):
    pq.write_table(pa.table({"body": ["x"], "url": ["y"]}), folder / "a.parquet")
    return folder / "a.parquet"


def written(name, content):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return make


def array_with(item):
    return json.dumps([{"text": "ok"}, item]).encode()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
LINES = '{"text": "ok"}\n{"text": "okay"}\n'
BAD = {
    "missing": (lambda folder: folder / "nowhere", "nowhere does not exist: .*OWNER/NAME"),
    "long name": (lambda folder: "x" * 5000, "does not exist"),
    "empty folder": (lambda folder: folder, "no file of these kinds: .txt"),
    "unknown kind": (written("a.pdf", b"%PDF"), "no file of these kinds: .txt"),
    "hidden": (lambda folder: written("._a.txt", b"x" * 99)(folder).parent, "no file of these kinds: .txt"),
    "empty text": (written("a.txt", b""), "holds no text"),
    "empty json": (written("a.jsonl", b""), "holds no text"),
    "latin text": (written("a.txt", b"x" * 5000 + b"caf\xe9"), r"not UTF-8 text \(byte 5,003 is 0xe9\).*iconv"),
    "utf-16": (written("a.txt", "some words".encode("utf-16")), r"not UTF-8 text \(byte 0 is 0xff\): .*UTF-16"),
    "utf-16le": (written("a.txt", "some words".encode("utf-16-le")), r"byte 1 is 0x00\).*UTF-16.*NULs"),
    "utf-16 json": (written("a.jsonl", LINES.encode("utf-16")), "a.jsonl, line 1: .*utf-8"),
    "utf-16 csv": (written("a.csv", "text\nsome words".encode("utf-16")), "a.csv, line 1 is not UTF-8: .*UTF-16"),
    "nul": (written("a.txt", b"x" * 5000 + b"\0" + b"y" * 5000), r"byte 5,000 is 0x00\).*NULs"),
    "latin json": (written("a.jsonl", b'{"text": "ok"}\n{"text": "caf\xe9"}\n'), "a.jsonl, line 2"),
    "no json": (written("a.jsonl", b'{"text": "ok"}\n{"text": \n'), "a.jsonl, line 2"),
    "no text in json": (written("a.jsonl", b'{"body": "ok", "id": "1"}\n' * 9), "no column `text`, but body, id"),
    "numbers in json": (written("a.jsonl", b'{"text": "ok"}\n{"text": 3}\n'), "line 2: `text` holds a float"),
    "rows of json": (written("a.jsonl", b'{"text": "ok"}\n[1]\n'), "line 2 is a list"),
    "arrays of json": (written("a.jsonl", b'["text"]\n["text"]\n'), "a.jsonl: Extra data.*give one array"),
    "object of json": (written("a.json", b'{"data": [{"text": "ok"}]}'), "no column `text`, but data"),
    "broken array": (written("a.json", array_with(1)[:-3] + b'{"text": oops}]'), "a.json: Expecting value.*one array"),
    "torn array": (written("a.json", array_with({"text": "word " * 99})[:-30]), "a.json: Unterminated string"),
    "number in an array": (written("a.json", array_with(3)), "item 2 of its array is a float"),
    "torn gzip": (written("a.jsonl.gz", gzip.compress(b'{"text": "ok"}\n' * 9999)[:-99]), "a.jsonl.gz is damaged"),
    "no gzip": (written("a.jsonl.gz", b'{"text": "ok"}\n'), "a.jsonl.gz is damaged"),
    "torn zst": (written("a.jsonl.zst", pa.compress(LINES.encode() * 9999, "zstd", asbytes=True)[:-20]),
                 "a.jsonl.zst is damaged"),
    "long zst": (written("a.txt.zst", bytes.fromhex("28b52ffd00a8190000") + b"abc"), "packed with --long: unpack it"),
    "no zst": (written("a.json.zst", LINES.encode()), "a.json.zst is damaged"),
    "no column": (other_columns, "no column `text`, but body, url"),
    "numbers": (lambda f: write_parquet(f / "a.parquet", [1, 2]), "column `text` holds int64"),
    "lists": (lambda f: write_parquet(f / "a.parquet", [["a"], ["b"]]), "column `text` holds list"),
    "bad parquet": (bad_parquet, "bad.parquet is damaged"),
    "torn parquet": (torn_parquet, "torn.parquet is damaged"),
    "invalid parquet": (invalid_parquet, "latin.parquet is damaged.*[Ii]nvalid UTF"),
    "no csv": (written("a.csv", b'text,n\n"ok,1\n'), "a.csv, line 2 cannot be read as CSV"),
    "uneven csv": (written("a.csv", b"text,n\nok,1\nok,1,2,3\n"), "a.csv, line 3 has 4 fields and the header 2"),
    "latin csv": (written("a.csv", b"text,n\ncaf\xe9,1\n"), "a.csv, line 2 is not UTF-8"),
    "empty csv": (written("a.csv", b""), "a.csv is empty"),
    "no column in csv": (written("a.csv", b"body,url\nx,y\n"), "no column `text`, but body, url"),
    "no arrow": (written("a.arrow", b"no arrow" * 99), "a.arrow is damaged or no .arrow file"),
    **{f"pointer {suffix}": (written("a" + suffix, POINTER), "is a Git LFS pointer.*git lfs pull")
       for suffix in (".txt", ".parquet", ".jsonl", ".jsonl.gz", ".csv", ".arrow")},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sources(tmp_path, case):
    """Catches one line with the file and the fix for every bad source, and nothing left under a final name."""
    make, message = BAD[case]
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=message):
        fineweb.main(["--source", str(make(tmp_path / "in")), "--out", str(tmp_path / "out"), "--shard_size", "1000"])
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("arguments, message", [
    (["--shard_size", "1"], "shard_size is 1"), (["--shard_size", "0"], "shard_size is 0"),
    (["--max_shards", "1"], "max_shards is 1"), (["--workers", "0"], "--workers is 0"),
    (["--workers", "x"], "invalid int value"), (["--sorce", "x"], "--sorce"),
    (["--name", "sample-10BT"], "--name sample-10BT"), (["--pretokenized"], "nobody has tokenized"),
    (["--verify"], "nothing to verify"),
])
def test_bad_flags(tmp_path, arguments, message):
    """Catches one line with value and fix for flags that make no sense."""
    source = write_jsonl(tmp_path / "docs.jsonl", ["some words"] * 99)
    with pytest.raises(UserError, match=re.escape(message)):
        fineweb.main(["--source", str(source), "--out", str(tmp_path / "out"), *arguments])
    assert not list(tmp_path.glob("out/*.npy"))


def changed(**changes):
    def make(manifest):
        manifest.update(changes)

    return make


def bad_entry(**changes):
    def make(manifest):
        manifest["files"][next(iter(manifest["files"]))].update(changes)

    return make


@pytest.mark.parametrize("content", ["{", "[]", '{"files": {}}', "null", "\xe9", "[" * 100_000, "9" * 5000, '"\\ud800"',
                                     '{"files": 1e999}', changed(files=[]),
                                     changed(files={"a_val_0.npy": 3}), changed(files={"../a.npy": {}}),
                                     changed(name=None), bad_entry(tokens="20"), bad_entry(sha256=None)])
def test_damaged_manifest(tmp_path, content):
    """Catches a traceback, and overwriting, where the manifest is damaged or not of this kind."""
    assert harness_text.read_manifest(tmp_path) is None and harness_text.read_manifest(tmp_path / "nowhere") is None
    if not isinstance(content, str):
        fineweb.write_shards(["some words here"] * 50, tmp_path, "toy", 20)
        manifest = harness_text.read_manifest(tmp_path)
        content(manifest)
        content = json.dumps(manifest)
    (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="manifest.json is"):
        fineweb.main(["--verify", "--out", str(tmp_path)])
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(UserError, match="manifest.json cannot be read"):
        fineweb.main(["--verify", "--out", str(tmp_path)])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet", ".csv"])
def test_file_names_that_are_no_text(tmp_path, suffix):
    """Catches a UnicodeEncodeError for a name that is not UTF-8, and names that are patterns to `glob` or addresses to
    `fsspec`."""
    folder = tmp_path / os.fsdecode(b"caf\xe9 [a]*?::b")
    folder.mkdir()
    path = folder / os.fsdecode(b"\xe9[1]" + suffix.encode())
    texts = ["some words in a row"] * 99
    if suffix == ".parquet":
        write_parquet(tmp_path / "a.parquet", texts).rename(path)
    elif suffix == ".jsonl":
        write_jsonl(path, texts)
    else:
        path.write_text("\n".join(["text", *texts]))
    run("--source", folder, "--out", tmp_path / "out", "--shard_size", 100)
    assert stream(tmp_path / "out") == reference(["text\n" + "\n".join(texts)] if suffix == ".txt" else texts)
    run("--verify", "--out", tmp_path / "out")
    cached = harness_text.prepare_text(path, tmp_path / "cache", held_out=0)
    assert stream(cached) == stream(tmp_path / "out")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file sizes")
@pytest.mark.parametrize("blocks", [1, 100])
def test_a_limit_on_file_sizes(tmp_path, shared_documents, blocks):
    """Catches one line, wherever `ulimit -f` strikes: manifest, tokenizer, shards, the trainer's cache."""
    out = shlex.quote(str(tmp_path / "out"))
    prepare = ("import sys; from harness import cli, text; "
               "sys.exit(cli.exit_status(text.prepare_text, sys.argv[1], sys.argv[2]) or 0)")
    for command in (["fineweb.py", "--shard_size", "100000", "--source", "input.txt", "--out"],
                    ["-c", prepare, str(shared_documents)], ["-c", prepare, "input.txt"]):
        command = " ".join(map(shlex.quote, [sys.executable, *command]))
        result = subprocess.run(["bash", "-c", f"ulimit -f {blocks}; {command} {out}"], cwd=ROOT, capture_output=True,
                                text=True, timeout=120)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result
        assert "no room for" in result.stderr or "cannot be written (File too large)" in result.stderr
        assert not list(tmp_path.rglob("*.*"))


# -- raw text for the trainer


def test_prepared_text(tmp_path):
    """Catches the split into train and validation, one making only, and another key for other text and other splits."""
    text = "Enter a player.\nHow now, what news? " * 400
    path = tmp_path / "play.txt"
    path.write_text(text)
    folder = harness_text.prepare_text(path, tmp_path / "cache")
    found, tokens = shards(folder), reference([text])
    last = len(tokens) // 10
    assert found["play_train_000001.npy"].tolist() == tokens[:-last]
    assert found["play_val_000000.npy"].tolist() == tokens[-last:]
    manifest = harness_text.read_manifest(folder)
    assert manifest["complete"] and len(manifest["files"]) == len(found) == 2
    harness_text.verify(folder)
    made = (folder / "manifest.json").stat().st_mtime_ns
    assert harness_text.prepare_text(path, tmp_path / "cache") == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == made
    alone = harness_text.prepare_text(path, tmp_path / "cache", held_out=0)
    assert list(shards(alone)) == ["play_train_000001.npy"] and stream(alone) == tokens
    path.write_text(text + "!")
    assert harness_text.prepare_text(path, tmp_path / "cache") not in (folder, alone)
    (folder / "play_val_000000.npy").unlink()  # a damaged cache is made again
    path.write_text(text)
    assert harness_text.prepare_text(path, tmp_path / "cache") == folder and list(shards(folder)) == list(found)
    assert not list((tmp_path / "cache").glob(".*"))


def test_prepared_folder_of_documents(tmp_path, small_batches, monkeypatch):
    """Catches raw text that is more than one file and more than one train shard."""
    monkeypatch.setattr(harness_text, "SHARD_SIZE", 500)
    documents = [f"{i} {odd}".replace("\0", "") for i, odd in enumerate(ODD)]
    texts = write_sources(tmp_path / "in", documents)
    folder = harness_text.prepare_text(tmp_path / "in", tmp_path / "cache")
    expected = reference(documents * 6 + texts)
    found = list(shards(folder).values())
    assert len(found) > 3 and np.concatenate([*found[1:], found[0]]).tolist() == expected


def test_a_killed_preparation_leaves_nothing_behind(tmp_path):
    """Catches a folder of half-made tokens that stays in the cache for ever, and two processes at once."""
    path, cache = tmp_path / "play.txt", tmp_path / "cache"
    path.write_text("Enter a player.\nHow now, what news? " * 40_000)
    program = f"from harness import text; print(text.prepare_text({str(path)!r}, {str(cache)!r}))"
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(cache.glob(".*.making/tokens")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert list(cache.glob(".*.making"))
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0] and len(folders) == 1
    assert [str(left) for left in cache.iterdir()] == list(folders)


def test_a_cache_that_cannot_be_written(tmp_path):
    """Catches one line that names --cache_dir where it is a file, lies under one, or is read-only."""
    path = tmp_path / "play.txt"
    path.write_text("Enter a player.\nHow now, what news? " * 400)
    for cache in (path, path / "cache", Path("/proc/nowhere")):
        with pytest.raises(UserError, match="--cache_dir .* cannot be written .*another one"):
            harness_text.prepare_text(path, cache)
    prepared = harness_text.prepare_text(path, tmp_path / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness_text, "folder_lock", None)  # what is prepared needs none: the cache may be read-only
        assert harness_text.prepare_text(path, tmp_path / "cache") == prepared


def test_only_a_text_with_separators_gets_another_key(tmp_path):
    """Catches old caches of texts whose tokens are the same, and runs on a text whose documents are now split."""
    plain, stories = tmp_path / "plain.txt", tmp_path / "stories.txt"
    plain.write_text("Enter a player.\nHow now, what news? " * 400)
    assert harness_text.prepare_text(plain, tmp_path / "cache").name == "plain-3ffd8f54fbcca323"
    stories.write_text("Enter a player.\n<|endoftext|>\n" * 400)
    contents_of = [(".txt", sha256(stories))]
    old = hashlib.sha256(json.dumps([1, 0.1, "stories", contents_of]).encode()).hexdigest()[:16]
    assert harness_text.prepare_text(stories, tmp_path / "cache").name not in ("stories-" + old, "stories")


def test_default_text_needs_no_heavy_package(tmp_path):
    """Catches the start of the default run: a small text is made into shards without pyarrow, datasets or gigatoken."""
    program = (
        "import sys\nfrom harness import text as harness_text\n"
        f"harness_text.prepare_text('input.txt', {str(tmp_path)!r})\n"
        "heavy = {'pyarrow', 'datasets', 'gigatoken', 'awkward', 'huggingface_hub', 'torch', 'tqdm'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "", result.stdout + result.stderr


# -- the Hugging Face Hub, as far as it matters, on this machine


class Hub(http.server.ThreadingHTTPServer):
    """Speaks enough of the Hub's protocol to list a dataset and to fetch its files, whole or from a byte on."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.files, self.commit = {}, "a" * 40  # {"repo": {"path": content}}
        self.fail = lambda path: None  # a status to fail with, for the path of a request
        self.cut = lambda path: None  # (bytes, seconds): after how many bytes the answer to a path hangs, how long
        self.bend = lambda path, content: content  # what really goes over the wire
        self.requests = []  # (method, path, range, authorization)
        self.fetched = []  # paths of the files sent, with the byte each was asked from
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self):
        address = f"http://127.0.0.1:{self.server_address[1]}"
        return {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": self.home}


class HubRequest(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            size, seconds = self.server.cut(self.path) or (None, 0)
            self.wfile.write(content[:size])
            self.wfile.flush()
            if size is not None:
                time.sleep(seconds)
                self.close_connection = True

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
        status = hub.fail(path)
        if status:
            return self.answer(b"", status)
        if path.startswith("/api/datasets/"):
            repo, _, rest = path.removeprefix("/api/datasets/").partition("/tree/")
            repo = repo.partition("/revision/")[0]
            if repo not in hub.files:
                return self.answer(b'{"error": "no such dataset"}', 404, X_Error_Code="RepoNotFound")
            if not rest:
                return self.answer(json.dumps({"id": repo, "sha": hub.commit}).encode())
            folder, recursive = rest.partition("/")[2], "recursive=true" in self.path.lower()
            listed = {}
            for name, content in hub.files[repo].items():
                parts = name.split("/")
                above = ["/".join(parts[:i]) for i in range(1, len(parts))]
                for path in (*above, name):
                    parent = path.rpartition("/")[0]
                    if parent != folder and not (recursive and (not folder or path.startswith(folder + "/"))):
                        continue
                    listed[path] = {"type": "directory", "path": path, "oid": "1" * 40, "size": 0}
                    if path == name:
                        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
                        listed[path] |= {"type": "file", "size": len(content), "lfs": lfs}
            if folder and not listed:
                return self.answer(b'{"error": "no such folder"}', 404, X_Error_Code="EntryNotFound")
            listed = list(listed.values())
            return self.answer(json.dumps(listed).encode())
        repo, _, rest = path.removeprefix("/datasets/").partition("/resolve/")
        commit, _, name = rest.partition("/")
        content = hub.files.get(repo, {}).get(name)
        if content is None or commit != hub.commit:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound")
        etag = hashlib.sha256(content).hexdigest()
        content, size = hub.bend(name, content), len(content)
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if self.command == "GET" and name != "README.md":
            hub.fetched.append((name, begin))
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if begin:
            headers["Content_Range"] = f"bytes {begin}-{size - 1}/{size}"
        return self.answer(content[begin:], 206 if begin else 200, **headers)


@pytest.fixture
def hub(tmp_path_factory):
    server = Hub()
    server.home = tmp_path_factory.mktemp("huggingface")
    yield server
    server.shutdown()
    server.server_close()


def parquet_bytes(texts, **other):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts, **other}), sink, row_group_size=50)
    return sink.getvalue().to_pybytes()


def llmc_bytes(tokens):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.asarray(tokens, np.uint16).tobytes()


CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
A data set with two configurations, as FineWeb-Edu's card has them.
"""


def fineweb_edu(hub, files=3, rows=200):
    documents = [f"document {i} of the toy web, {'word ' * (i % 40)}" for i in range(files * rows)]
    listed = {"README.md": CARD, "data/CC-MAIN-2024-10/000_00000.parquet": parquet_bytes(["a crawl"] * 50)}
    for i in range(files):
        listed[f"sample/10BT/{i:03d}_00000.parquet"] = parquet_bytes(documents[i * rows : (i + 1) * rows])
    hub.files["HuggingFaceFW/fineweb-edu"] = listed
    return documents


def test_download_survives_failures_and_damage(hub, tmp_path):
    """Catches the default command on a bad network: errors, a damaged body, then the right shards and nothing else."""
    documents, seen = fineweb_edu(hub), set()

    def once(kind, path, value, other):
        first = (kind, path) not in seen
        seen.add((kind, path))
        return value if first else other

    hub.fail = lambda path: once("fail", path, 503, None) if "001_00000" in path or "/tree/" in path else None
    hub.bend = lambda name, body: once("bend", name, body[:-9] + b"?" * 9, body) if "002_" in name else body
    run("--out", tmp_path / "out", "--shard_size", 3000, **hub.environment)
    assert stream(tmp_path / "out") == reference(documents)
    manifest = harness_text.read_manifest(tmp_path / "out")
    assert list(manifest["files"])[:2] == ["edufineweb_val_000000.npy", "edufineweb_train_000001.npy"]
    assert (manifest["source"] == "HuggingFaceFW/fineweb-edu sample-10BT" and manifest["revision"] == hub.commit)
    assert not (tmp_path / "out" / ".download").exists()
    hub.fail = lambda path: 500  # what is complete asks nobody
    run("--out", tmp_path / "out", "--shard_size", 3000, **hub.environment)


def test_killed_download_continues_with_the_same_revision(hub, tmp_path):
    """Catches fetching or tokenizing again what is there, a pile of fetched files, and a mix of revisions."""
    documents = fineweb_edu(hub, files=6)
    arguments = ("--out", tmp_path / "out", "--shard_size", 2000)
    hub.fail = lambda path: time.sleep(60) if "004_" in path else None  # the network hangs
    process = run(*arguments, start_only=True, **hub.environment)
    manifest, most = tmp_path / "out" / "manifest.json", 0
    while len(hub.fetched) < 4 or not manifest.exists() or len(json.loads(manifest.read_text())["files"]) < 4:
        most = max(most, len(list((tmp_path / "out" / ".download").rglob("*.parquet"))))
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert most <= 2  # the one in use and the next
    assert {name for name, _ in hub.fetched} == {f"sample/10BT/{i:03d}_00000.parquet" for i in range(4)}
    hub.fail = lambda path: None
    hub.fetched.clear()
    run(*arguments, **hub.environment)
    assert stream(tmp_path / "out") == reference(documents)
    assert "sample/10BT/000_00000.parquet" not in {name for name, _ in hub.fetched}


def test_pretokenized(hub, tmp_path):
    """Catches ready-made shards: the right files whole and verified, resumed after a kill, nothing fetched twice."""
    rng = np.random.default_rng(0)
    names = ["finewebedu_val_000000.bin", *(f"finewebedu_train_{i:06d}.bin" for i in (1, 2, 3))]
    files = {name: llmc_bytes(rng.integers(0, 50257, 5000)) for name in names}
    hub.files["kjj0/finewebedu10B-gpt2"] = {"README.md": b"shards", **files}
    out = tmp_path / "out"
    hub.fail = lambda path: time.sleep(60) if names[2] in path else None
    process = run("--pretokenized", "--out", out, start_only=True, **hub.environment)
    while not (out / names[1]).exists() or len(harness_text.read_manifest(out)["files"]) < 2:
        time.sleep(0.02)
    process.kill()
    process.wait()
    manifest = harness_text.read_manifest(out)
    assert (not manifest["complete"] and manifest["expected_shards"] == 4 and list(manifest["files"]) == names[:2])
    hub.fail = lambda path: None
    hub.fetched.clear()
    run("--pretokenized", "--out", out, "--max_shards", 3, **hub.environment)
    assert {name for name, _ in hub.fetched} == {names[2]}
    (out / names[1]).unlink()
    run("--pretokenized", "--out", out, **hub.environment)
    assert contents(out).keys() == {*names, "manifest.json"}
    assert all((out / name).read_bytes() == content for name, content in files.items())
    manifest = harness_text.read_manifest(out)
    assert manifest["complete"] and list(manifest["files"]) == names
    assert manifest["files"][names[0]] == {"tokens": 5000, "sha256": hashlib.sha256(files[names[0]]).hexdigest()}
    run("--verify", "--out", out)
    assert "another source" in run("--out", out, status=2, **(fineweb_edu(hub) and hub.environment))


def test_pretokenized_header_must_be_right(hub, tmp_path):
    """Catches a file that is no llm.c shard, or says another length than it has."""
    good = llmc_bytes(range(100))
    for number, bad in enumerate((good[:-2], b"\0" * 4 + good[4:], good[:10])):
        hub.commit = f"{number:040d}"
        hub.files["kjj0/fineweb10B-gpt2"] = {"fineweb_val_000000.bin": bad, "fineweb_train_000001.bin": good}
        error = run("--pretokenized", "--source", "fineweb", "--out", tmp_path / "out", status=2, **hub.environment)
        assert "it is torn" in error or "no llm.c header" in error
        assert not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize("flags", [[], ["--pretokenized"]])
def test_no_network(tmp_path, flags):
    """Catches one line that says what to do without a network, and nothing left behind."""
    out = tmp_path / "new" / "out"
    for environment in ({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_XET": 1}, {"HF_HUB_OFFLINE": 1}):
        error = run("--out", out, *flags, status=2, **environment)
        assert "Check the network" in error.splitlines()[-1] and "Traceback" not in error
        assert "copy its --out folder here, or bring the data set's files here" in error
        assert not os.listdir(tmp_path)


def test_what_was_there_stays_when_a_start_fails(tmp_path):
    """Catches the user's folder and files against the clearing up, and a running process against a second one."""
    source = write_jsonl(tmp_path / "docs.jsonl", [""])
    for name, kept in (("empty", []), ("used", ["notes"])):
        (tmp_path / name).mkdir()
        for file in kept:
            (tmp_path / name / file).touch()
        with pytest.raises(UserError, match="holds no text"):
            fineweb.make_shards(harness_documents.local_source([source]), tmp_path / name)
        assert os.listdir(tmp_path / name) == kept
    with harness_text.folder_for(tmp_path / "new"):
        assert "in use by another run" in run("--source", source, "--out", tmp_path / "new", status=2)
        assert os.listdir(tmp_path / "new") == [".lock"]
    assert not (tmp_path / "new").exists()


def test_no_such_dataset(hub, tmp_path):
    """Catches one line that names what the Hub does not have: data set, configuration, split, column, text."""
    out = ("--out", tmp_path / "out")
    assert "has no Skylion007/openwebtext" in run("--source", "openwebtext", *out, status=2, **hub.environment)
    fineweb_edu(hub)
    error = run("--name", "sample-9BT", *out, status=2, **hub.environment)
    assert "sample-9BT" in error and "sample-10BT" in error and "--name" in error
    error = run("--split", "test", *out, status=2, **hub.environment)
    assert "no split test, but train" in error
    error = run("--text_column", "body", "--out", tmp_path / "kept", status=2, **hub.environment)
    assert "no column `body`, but text" in error  # the file that was fetched stays for the next try
    hub.files["some/pictures"] = {"cat.png": b"PNG", "dog.png": b"PNG"}
    error = run("--source", "some/pictures", *out, status=2, **hub.environment)
    assert "cat.png, which is no text" in error
    assert "has no some/.." in run("--source", "some/..", *out, status=2, **hub.environment)
    for fails in ("", "/resolve/"):  # all of it, or the first file, for which the client has made folders by then
        hub.fail = lambda path, fails=fails: 401 if fails in path else None
        assert "HF_TOKEN" in run(*out, status=2, **hub.environment)
    assert not (tmp_path / "out").exists()


def test_any_data_set_of_the_hub(hub, tmp_path):
    """Catches data sets without a short name, in the formats that people push, and who is asked for what."""
    stories = [f"Once upon a time, {i}. The end." for i in range(120)]
    lines = "".join(json.dumps({"story": text, "id": i}) + "\n" for i, text in enumerate(stories)).encode()
    hub.files["roneneldan/TinyStories"] = {
        "README.md": b"no configurations", "data/train-00000-of-00002.parquet": parquet_bytes(stories[:60]),
        "data/train-00001-of-00002.parquet": parquet_bytes(stories[60:]),
        "data/validation-00000-of-00001.parquet": parquet_bytes(["another one"] * 40)}
    hub.files["some/lines"] = {"stories.jsonl": lines}
    hub.files["karpathy/climbmix-400b-shuffle"] = {"shard_00000.parquet": parquet_bytes(stories)}
    for source, out, flags, expected in (
        ("roneneldan/TinyStories", "TinyStories", [], stories), ("some/lines", "lines", [], stories),
        ("roneneldan/TinyStories", "TinyStories_validation", ["--split", "validation"], ["another one"] * 40),
        ("climbmix", "climbmix", [], stories),
    ):
        run("--source", source, "--shard_size", 50, *flags, cwd=tmp_path, HF_TOKEN="hf_secret", **hub.environment)
        assert stream(tmp_path / out) == reference(expected)
        assert next(iter(shards(tmp_path / out))) == f"{out.split('_')[0]}_val_000000.npy"
    asked = [(path, token) for _, path, _, token in hub.requests if path.startswith(("/api/datasets", "/datasets"))]
    assert asked and all(token == "Bearer hf_secret" for _, token in asked)


def partial_sizes(out):
    """Bytes of each file that is being fetched into `out`; those that go while they are looked for are left out."""
    sizes = []
    with contextlib.suppress(FileNotFoundError):
        for path in out.glob(".download/**/*.incomplete"):
            sizes.append(path.stat().st_size)
    return sizes


def test_downloads_that_break_or_are_killed_in_the_middle(hub, tmp_path):
    """Catches fetching 2 GB again when a connection breaks, more than one file again after a kill, half a file
    that stays for ever, and other bytes than those of an undisturbed run."""
    documents = fineweb_edu(hub)
    bulk = [random.Random(i).randbytes(150_000) for i in range(200)]  # the client writes 10 MB at a time
    name = "sample/10BT/001_00000.parquet"
    hub.files["HuggingFaceFW/fineweb-edu"][name] = parquet_bytes(documents[200:400], image=bulk)
    run("--out", tmp_path / "straight", "--shard_size", 3000, **hub.environment)
    assert stream(tmp_path / "straight") == reference(documents)

    hub.fetched.clear()
    hub.cut = lambda path: (25_000_000, 0) if "001_" in path and (name, 0) in hub.fetched[-1:] else None
    run("--out", tmp_path / "broken", "--shard_size", 3000, **hub.environment)
    assert [begin >= 20_000_000 for file, begin in hub.fetched if file == name] == [False, True]
    assert contents(tmp_path / "broken") == contents(tmp_path / "straight")

    hub.fetched.clear()
    hub.cut = lambda path: (25_000_000, 60) if "001_" in path else None
    out, most, deadline = tmp_path / "killed", 0, time.monotonic() + 60
    process = run("--out", out, "--shard_size", 3000, start_only=True, **hub.environment)
    while most < 20_000_000 and time.monotonic() < deadline:
        most = max(partial_sizes(out), default=0)
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert most >= 20_000_000
    hub.cut = lambda path: None
    process = run("--out", out, "--shard_size", 3000, start_only=True, **hub.environment)
    while process.poll() is None:
        assert len(partial_sizes(out)) <= 2
        time.sleep(0.02)
    assert contents(out) == contents(tmp_path / "straight")
    assert sorted(file for file, _ in hub.fetched).count(name) == 2 and len(hub.fetched) <= 5
