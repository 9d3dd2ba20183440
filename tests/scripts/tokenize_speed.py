"""How fast fineweb.py makes shards, beside a straightforward pool of processes and the bare decoding of the parquet.

    python tests/scripts/tokenize_speed.py DOCUMENTS [--copies 15] [--rounds 3] [--before CHECKOUT]
    python tests/scripts/tokenize_speed.py --line_ends [--megabytes 200] [--before CHECKOUT]

DOCUMENTS holds parquet files with a column `text`; they are copied until they make a corpus of some size. Every
contender runs as a process of its own on the same files, one after the other, from its start to the last shard on
disk. The pool is what one writes first: half of the cores, one document a task, `encode_ordinary`. Besides the seconds
on the wall stand those of the processors, which other work on the machine disturbs less. `--before` runs another
version of this project in turns with this one.

`--line_ends` makes shards of a .txt with each of five kinds of line ends: seconds and the peak of the memory.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
SHARD_SIZE = 10_000_000
CONTENDERS = {
    "decoding alone": "import tokenize_speed as t; t.decode({corpus!r})",
    "pool of processes": "import tokenize_speed as t; t.pool({corpus!r}, {out!r})",
    "fineweb.py, tiktoken": "import sys; sys.modules['gigatoken'] = None; import fineweb; fineweb.main({arguments!r})",
    "fineweb.py, gigatoken": "import fineweb; fineweb.main({arguments!r})",
}


def decode(corpus):
    """Read every document of the corpus as fineweb.py does, and do nothing with it."""
    from harness import documents

    for path in sorted(Path(corpus).iterdir()):
        for _ in documents.read_file(path):
            pass


def encode_document(text):
    """One document's tokens, led by <|endoftext|>: the task of the pool."""
    from harness import tokenizer

    return np.array([tokenizer.END_OF_TEXT, *tokenizer.gpt2().encode_ordinary(text)], np.uint16)


def pool(corpus, out):
    """The straightforward way to shards."""
    import pyarrow.parquet as pq

    def documents():
        for path in sorted(Path(corpus).iterdir()):
            for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
                yield from batch.column(0).to_pylist()

    Path(out).mkdir()
    shard, filled, index = np.empty(SHARD_SIZE, np.uint16), 0, 0
    with multiprocessing.Pool(max(1, os.cpu_count() // 2)) as workers:
        for tokens in workers.imap(encode_document, documents(), chunksize=16):
            while len(tokens):
                room = min(len(tokens), SHARD_SIZE - filled)
                shard[filled : filled + room] = tokens[:room]
                tokens, filled = tokens[room:], filled + room
                if filled == SHARD_SIZE:
                    np.save(f"{out}/shard_{index:06d}.npy", shard)
                    filled, index = 0, index + 1
    np.save(f"{out}/shard_{index:06d}.npy", shard[:filled])


LINE_ENDS = {"LF": "{}\n", "CRLF": "{}\r\n", "blank lines": "{}\n\n", "WikiText": " {} \n", "no line ends": "{} "}
MEASURED = """
import resource, sys, time, fineweb
started = time.perf_counter()
fineweb.main({arguments!r})
peak = max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0)
print(f"{{time.perf_counter() - started:.2f}} {{peak / 1e6:.2f}}", file=sys.stderr)
"""


def line_ends(megabytes, checkouts):
    """Seconds and peak memory of shards of a text with each kind of line ends, for every checkout."""
    words = (ROOT / "input.txt").read_text(encoding="utf-8").split()
    lines = [" ".join(words[i : i + 12]) for i in range(0, len(words), 12)]
    with tempfile.TemporaryDirectory() as scratch:
        path, out = Path(scratch) / "text.txt", Path(scratch) / "out"
        for kind, form in LINE_ENDS.items():
            part = "".join(map(form.format, lines)).encode()
            path.write_bytes(part * (megabytes * 1_000_000 // len(part)))
            for name, checkout in checkouts.items():
                arguments = ["--source", str(path), "--out", str(out), "--shard_size", str(SHARD_SIZE)]
                result = subprocess.run([sys.executable, "-c", MEASURED.format(arguments=arguments)], check=True,
                                        cwd=checkout, capture_output=True, text=True)
                seconds, peak = result.stderr.split()[-2:]
                shutil.rmtree(out)
                print(f"{kind:14} {name:8} {seconds:>7} s, {peak} GB", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("documents", type=Path, nargs="?")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    parser.add_argument("--line_ends", action="store_true")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--copies", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    checkouts = {"now": ROOT} | ({"before": args.before.resolve()} if args.before else {})
    if args.line_ends:
        line_ends(args.megabytes, checkouts)
        return
    contenders = {name: (program, ROOT) for name, program in CONTENDERS.items()}
    if args.before:
        contenders["before, gigatoken"] = (CONTENDERS["fineweb.py, gigatoken"], checkouts["before"])
    seconds = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as scratch:
        corpus, out = Path(scratch) / "corpus", Path(scratch) / "out"
        corpus.mkdir()
        for copy in range(args.copies):
            for path in args.documents.glob("*.parquet"):
                shutil.copyfile(path, corpus / f"{copy:03d}_{path.name}")
        text, tokens = text_bytes(corpus) / 1e6, 0
        print(f"{text:.0f} MB of text in {len(list(corpus.iterdir()))} files, {os.cpu_count()} cores")
        arguments = ["--source", str(corpus), "--out", str(out), "--shard_size", str(SHARD_SIZE)]
        for _ in range(args.rounds):
            for name, (program, checkout) in contenders.items():
                environment = os.environ | {"PYTHONPATH": f"{checkout}{os.pathsep}{Path(__file__).parent}"}
                program = program.format(corpus=str(corpus), out=str(out), arguments=arguments)
                before, started = os.times(), time.perf_counter()
                subprocess.run([sys.executable, "-c", program], check=True, cwd=checkout, env=environment,
                               capture_output=True)
                wall, after = time.perf_counter() - started, os.times()
                busy = after.children_user + after.children_system - before.children_user - before.children_system
                seconds[name].append((wall, busy))
                print(f"    {name:22} {wall:7.2f} s, {busy:7.2f} of the processors", flush=True)
                if (out / "manifest.json").exists():
                    files = json.loads((out / "manifest.json").read_text())["files"].values()
                    tokens = sum(file["tokens"] for file in files)
                shutil.rmtree(out, ignore_errors=True)
    pool_of = np.array(seconds["pool of processes"])
    print(f"medians of {args.rounds}; against the pool: median of the rounds' ratios")
    for name, times in seconds.items():
        wall, busy = np.median(times, 0)
        ahead, thrift = np.median(pool_of / times, axis=0)
        print(f"{name:22} {wall:7.2f} s {text / wall:6.1f} MB/s {tokens / wall / 1e6:6.2f} M tokens/s, {ahead:5.2f} x; "
              f"processors {busy:6.2f} s, {thrift:5.2f} x")


def text_bytes(corpus):
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    return sum(pc.sum(pc.binary_length(pq.read_table(p, columns=["text"])["text"])).as_py() for p in corpus.iterdir())


if __name__ == "__main__":
    main()
