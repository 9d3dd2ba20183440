"""How fast fineweb.py makes shards, beside a straightforward pool of processes and the bare decoding of the parquet.

    python tests/scripts/tokenize_speed.py DOCUMENTS [--copies 15]

DOCUMENTS holds parquet files with a column `text`; they are copied until they make a corpus of some size. Every
contender runs as a process of its own on the same files, one after the other, from its start to the last shard on
disk. The pool is what one writes first: half of the cores, one document a task, `encode_ordinary`.
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
    import fineweb

    for path in sorted(Path(corpus).iterdir()):
        for _ in fineweb._read(path):
            pass


def encode_document(text):
    """One document's tokens, led by <|endoftext|>: the task of the pool."""
    import numpy as np

    import tokenizer

    return np.array([tokenizer.END_OF_TEXT, *tokenizer.gpt2().encode_ordinary(text)], np.uint16)


def pool(corpus, out):
    """The straightforward way to shards."""
    import numpy as np
    import pyarrow.parquet as pq

    def documents():
        for path in sorted(Path(corpus).iterdir()):
            for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
                yield from batch.column(0).to_pylist()

    Path(out).mkdir()
    shard, held, index = np.empty(SHARD_SIZE, np.uint16), 0, 0
    with multiprocessing.Pool(max(1, os.cpu_count() // 2)) as workers:
        for tokens in workers.imap(encode_document, documents(), chunksize=16):
            while len(tokens):
                room = min(len(tokens), SHARD_SIZE - held)
                shard[held : held + room] = tokens[:room]
                tokens, held = tokens[room:], held + room
                if held == SHARD_SIZE:
                    np.save(f"{out}/shard_{index:06d}.npy", shard)
                    held, index = 0, index + 1
    np.save(f"{out}/shard_{index:06d}.npy", shard[:held])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("documents", type=Path)
    parser.add_argument("--copies", type=int, default=15)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        corpus.mkdir()
        for copy in range(args.copies):
            for path in args.documents.glob("*.parquet"):
                shutil.copyfile(path, corpus / f"{copy:03d}_{path.name}")
        text = text_bytes(corpus)
        print(f"{text / 1e6:.0f} MB of text in {len(list(corpus.iterdir()))} files, {os.cpu_count()} cores")
        tokens = None
        for name, program in CONTENDERS.items():
            out = Path(scratch) / "out"
            arguments = ["--source", str(corpus), "--out", str(out), "--shard_size", str(SHARD_SIZE)]
            program = program.format(corpus=str(corpus), out=str(out), arguments=arguments)
            started = time.perf_counter()
            environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
            subprocess.run([sys.executable, "-c", program], check=True, env=environment, capture_output=True)
            seconds = time.perf_counter() - started
            if (out / "manifest.json").exists():
                files = json.loads((out / "manifest.json").read_text())["files"].values()
                tokens = sum(file["tokens"] for file in files)
            rate = (
                f", {tokens / seconds / 1e6:7.2f} M tokens/s" if tokens and name != "decoding alone" else ""
            )
            print(f"{name:22} {seconds:7.2f} s  {text / seconds / 1e6:7.1f} MB/s{rate}", flush=True)
            shutil.rmtree(out, ignore_errors=True)


def text_bytes(corpus):
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    return sum(
        pc.sum(pc.binary_length(pq.read_table(p, columns=["text"])["text"])).as_py() for p in corpus.iterdir()
    )


if __name__ == "__main__":
    main()
