"""Any text or data set to GPT-2 token shards: downloads, tokenizes on all cores, writes, resumes and verifies.

    python fineweb.py                                  FineWeb-Edu's 10B-token sample -> edu_fineweb10B/
    python fineweb.py --pretokenized                   the same tokens ready-made: minutes instead of an hour
    python fineweb.py --source roneneldan/TinyStories  any data set of the Hugging Face Hub; `fineweb`, `openwebtext`
                                                       and `climbmix` are short names
    python fineweb.py --source books/ notes.jsonl.gz   files or folders of .txt, .jsonl, .json, .parquet, .csv
    python fineweb.py --verify                         checks every shard against the manifest

Writes NAME_val_000000.npy, NAME_train_000001.npy, ... (one-dimensional uint16, every document led by <|endoftext|>) and
manifest.json. The shards are a pure function of source and options: the same bytes for any number of workers and after
any interruption. A shard appears under its name only when whole, so the process may be killed at any moment, and the
same command continues where it stopped.

In order: shards · progress · ready-made shards · CLI. What it stands on: harness/documents.py reads, harness/text.py
tokenizes and writes, harness/hub.py knows the Hugging Face Hub.
"""

if __name__ == "__main__":
    from harness.cli import quiet_imports
    quiet_imports()

import os
import re
import shutil
import sys
import time
from pathlib import Path

from harness import shards, text
from harness.cli import Parser, UserError, exit_status, say
from harness.documents import (
    KINDS,
    Source,
    fetch_ahead,
    is_text,
    local_source,
    peeked,
    read_source,
    shard_stem,
)
from harness.files import sha256
from harness.hub import HubDataset, download, hub_source, newest_commit, repo_files, split_files
from harness.text import SHARD_SIZE, write_shards  # noqa: F401 (part of this file's interface)

HUB = {  # short names
    "fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", "edufineweb", "edu_fineweb", "sample-10BT"),
    "fineweb": HubDataset("HuggingFaceFW/fineweb", "fineweb", "fineweb", "sample-10BT"),
    "openwebtext": HubDataset("Skylion007/openwebtext", "openwebtext", "openwebtext"),
    "climbmix": HubDataset("karpathy/climbmix-400b-shuffle", "climbmix", "climbmix"),
}
OWNER_AND_NAME = r"[\w.-]+/[\w.-]+"
PRETOKENIZED = {  # GPT-2 tokens that a private person (kjj0 on the Hub) has made, as llm.c files
    ("fineweb-edu", "sample-10BT"): "kjj0/finewebedu10B-gpt2",
    ("fineweb", "sample-10BT"): "kjj0/fineweb10B-gpt2",
    ("fineweb", "sample-100BT"): "kjj0/fineweb100B-gpt2",
}

# ---------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------


def make_shards(source, out, shard_size=SHARD_SIZE, workers=None, max_shards=None):
    """Tokenize a `Source` into shards in the folder `out`, continuing where an earlier run stopped.

    Returns the manifest (see `text.read_manifest`). Raises `UserError` when `out` holds other data, when the source is
    damaged or too small, and when the disk is full.
    """
    out, workers = Path(out), workers or text.cores()
    text.check_sizes(shard_size, max_shards)
    with text.folder_for(out):
        has_txt = any(".txt" in Path(file.name).name.lower() for file in source.files)
        manifest = text.continued(out, text.new_manifest(source, shard_size), has_txt)
        gaps, encode = text.gaps(out, manifest, max_shards), None
        if gaps or not manifest["complete"]:  # a kill may have come between the last shard and this word
            with text.recorded(out, manifest), text.writer(out, manifest) as save:
                for place, first, stop in gaps:
                    head, batches = peeked(read_source(source, manifest, place))
                    position = first * shard_size - place["skip"]  # in the stream of all tokens
                    progress = Progress(source, manifest, max_shards, position)
                    if head and encode is None:
                        encode = text.encoder(head[0].texts, source.size)
                        progress.announce(out, head[0], encode, workers)
                    tokenized = progress.watch(text.tokenized(batches, encode, workers))
                    text.cut_into_shards(tokenized, place, first, stop, shard_size, save)
        say(f"{out} is complete: {text.summary(manifest)}")
    return manifest


# ---------------------------------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------------------------------


class Progress:
    """What a run reports: the size of the task before it starts, then one bar, or a line now and then in a log file."""

    def __init__(self, source, manifest, max_shards, position):
        self.source, self.manifest, self.max_shards = source, manifest, max_shards
        self.position = position  # tokens from the source's beginning

    def announce(self, out, head, encode, workers):
        """Report size, disk space and time, from the first batch. Raises `UserError` when the disk is too small."""
        source, started = self.source, time.monotonic()
        tokens = len(encode(head.texts))
        pace = (time.monotonic() - started) / max(1, tokens) / workers
        expected = self._expected(self.position + tokens, head.done)
        left = max(0, expected - sum(entry["tokens"] for entry in self.manifest["files"].values()))
        needed, free, fetched = 2 * left, shutil.disk_usage(out).free, 0
        if source.remote:
            needed += 2 * max(file.size for file in source.files)  # the one in use and the one being fetched
            fetched = head.done * (expected / max(1, self.position + tokens) - 1)
        column = f" (column `{head.column}`)" if head.column not in (None, "text") else ""
        say(f"{source.title}{column}: {len(source.files)} files, {gigabytes(source.size)}; about {expected:,.0f} "
            f"tokens -> {-(-expected // self.manifest['shard_size']):,} shards, {gigabytes(2 * expected)} in {out} "
            f"({gigabytes(free)} free); about {duration(pace * left)} on {workers} threads"
            + (f" and the download of {gigabytes(fetched)}" if fetched > 0 else ""))
        check_room(out, 0.9 * needed, free)  # an estimate gets the benefit of the doubt

    def _expected(self, position, done):
        """Tokens when everything is read (or `max_shards` are written), from `position` tokens in `done` bytes."""
        tokens = round(position / max(done, 1) * self.source.size)
        return tokens if self.max_shards is None else min(tokens, self.max_shards * self.manifest["shard_size"])

    def watch(self, tokenized):
        """Pass (batch, tokens) through and show how far they are."""
        from tqdm import tqdm

        size, first, read = self.manifest["shard_size"], self.position, 0
        reported = started = time.monotonic()
        with tqdm(unit=" tokens", unit_scale=True, initial=first, disable=None, dynamic_ncols=True) as bar:
            for batch, tokens in tokenized:
                self.position += len(tokens)
                read += batch.size
                expected, seconds = self._expected(self.position, batch.done), time.monotonic() - started
                self.manifest["expected_shards"] = count = -(-expected // size)
                state = f"{read / seconds / 1e6:.0f} MB/s, shard {self.position // size + 1:,} of {count:,}"
                bar.total = expected
                bar.set_postfix_str(state, refresh=False)
                bar.update(len(tokens))
                if bar.disable and time.monotonic() - reported > 10:
                    reported = time.monotonic()
                    left = seconds * (expected - self.position) / max(1, self.position - first)
                    say(f"{self.position:,} tokens, {state}, {duration(left)} left")
                yield batch, tokens


def check_room(out, needed, free):
    if needed > free:
        raise UserError(f"{out} needs {gigabytes(needed)} more, but {gigabytes(free)} are free: choose an --out on "
                        "another disk, or end at fewer shards with --max_shards")


def gigabytes(count):
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------------------------------------------------------
# Ready-made shards
# ---------------------------------------------------------------------------------------------------------------


def fetch_pretokenized(repo, dataset, out, max_shards=None):
    """Fetch ready-made GPT-2 shards (llm.c `.bin`) into the folder `out`, validation first; returns the manifest.

    Every file is checked: its header against its size, its SHA-256 against the Hub's. Files that are whole are not
    fetched again. `dataset` is the `HubDataset` that they are said to hold. Raises `UserError` when the Hub cannot be
    reached or `out` holds other data.
    """
    from tqdm import tqdm

    out = Path(out)
    text.check_sizes(2, max_shards)
    with text.folder_for(out):
        commit = newest_commit(repo, begun_revision(out, repo), ".bin")
        files = [file for file in repo_files(repo, "", commit) if file.name.endswith(".bin")]
        if not files:
            raise UserError(f"{repo} holds no .bin files any more: leave --pretokenized out")
        files = sorted(files, key=lambda file: ("_val_" not in file.name, file.name))
        manifest = text.continued(out, text.new_manifest(Source(repo, commit, dataset.shards, tuple(files)), None))
        wanted, known = files[:max_shards], manifest["files"]
        missing = [f for f in wanted if f.name not in known or not text.is_whole(out / f.name, known[f.name])]
        total, free = sum(file.size for file in missing), shutil.disk_usage(out).free
        check_room(out, total, free)
        say(f"{repo}: made by a private person, {repo.split('/')[0]} on the Hugging Face Hub, not by {dataset.repo} "
            f"or this project. {check_count(files, dataset.name)}")
        say(f"{len(missing)} of {len(wanted)} shards to fetch, {gigabytes(total)} into {out} "
            f"({gigabytes(free)} free); about {duration(total / 1.25e8)} at 1 Gbit/s")
        manifest["expected_shards"] = len(wanted)
        fetched = fetch_ahead(lambda file: download(repo, commit, file, out / ".download"), missing)
        bar = tqdm(total=total, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)
        with bar, text.recorded(out, manifest):
            for file, path in zip(missing, fetched):
                entry = {"tokens": bin_tokens(path), "sha256": file.sha256 or sha256(path)}
                os.replace(path, out / file.name)
                known[file.name] = entry
                manifest["files"] = known = {f.name: known[f.name] for f in files if f.name in known}
                manifest["next"] = {"file": len(known)} if len(known) < len(files) else None
                text.save_manifest(out, manifest)
                bar.update(file.size)
                bar.set_postfix_str(f"shard {len(known)} of {len(wanted)}")
        say(f"{out} is complete: {text.summary(manifest)}")
        say(check_beginning(out / files[0].name, dataset))
    return manifest


def bin_tokens(path):
    """How many tokens the llm.c file at `path` holds; its header must be right and agree with its size."""
    _, offset, tokens = shards.open_shard(path)
    if offset != shards.LLMC_HEADER:
        raise UserError(f"{path} has no llm.c header: the repository has changed; leave --pretokenized out")
    return tokens


def check_count(files, sample):
    """A sentence on whether the sizes of ready-made shards fit the sample that they are said to hold."""
    tokens = sum((file.size - shards.LLMC_HEADER) // 2 for file in files)
    due = int(re.search(r"(\d+)BT", sample)[1]) * 1_000_000_000
    fits = "as" if abs(tokens / due - 1) < 0.1 else "NOT the number that"
    return f"By their sizes {len(files)} shards hold {tokens:,} tokens, {fits} {sample} should have."


def check_beginning(shard, dataset, documents=5):
    """A sentence on whether a shard begins with the first documents of the official `dataset`, a few MB of which are
    read. Only this much can be checked without tokenizing everything again.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from huggingface_hub import HfFileSystem, errors

    try:
        first = split_files(dataset, newest_commit(dataset.repo))[0]
        with HfFileSystem().open(first, block_size=1 << 20) as file, pq.ParquetFile(file) as parquet:
            batch = next(parquet.iter_batches(documents, columns=["text"], use_threads=False))
        due = text.with_tiktoken(batch.column(0).to_pylist())
    except (UserError, OSError, errors.HTTPError, pa.ArrowException, StopIteration, KeyError) as error:
        return f"whether they begin as {dataset.title} does could not be checked ({type(error).__name__}: {error})"
    _, offset, tokens = shards.open_shard(shard)
    with open(shard, "rb") as file:
        file.seek(offset)
        same = file.read(2 * min(len(due), tokens)) == due[:tokens].astype("<u2").tobytes()
    if same:
        return f"checked: they begin with the first {batch.num_rows} documents of {dataset.title}, token by token"
    return (f"WARNING: they do not begin with the first documents of {dataset.title} as it is now, so whether they "
            "hold the same data cannot be checked; leave --pretokenized out to be sure")


# ---------------------------------------------------------------------------------------------------------------
# CLI
# ---------------------------------------------------------------------------------------------------------------


def arguments(argv):
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                    epilog="Killed or failed, the same command continues where it stopped.")
    parser.add_argument("--source", nargs="+", default=["fineweb-edu"], metavar="NAME|PATH",
                        help=f"{', '.join(HUB)} or OWNER/NAME of any data set on the Hugging Face Hub, or files and "
                             f"folders of {KINDS}")
    parser.add_argument("--name", help="configuration of a data set on the Hub (FineWeb's: sample-10BT)")
    parser.add_argument("--split", help="split of a data set on the Hub (train)")
    parser.add_argument("--text_column", "--text-column", metavar="NAME",
                        help="column of the documents (`text`, or the only one that holds strings)")
    parser.add_argument("--keep_endoftext", "--keep-endoftext", action="store_true",
                        help="take <|endoftext|> in a .txt as ordinary letters, not as the end of a document")
    parser.add_argument("--out", type=Path, help="folder of the shards (default by source: edu_fineweb10B, ...)")
    parser.add_argument("--shard_size", "--shard-size", type=int, help=f"tokens a shard ({SHARD_SIZE:,})")
    parser.add_argument("--workers", type=int, help="threads that tokenize (as many as cores)")
    parser.add_argument("--max_shards", "--max-shards", type=int, help="end at so many shards, validation included")
    parser.add_argument("--pretokenized", action="store_true",
                        help="fetch ready-made shards of FineWeb(-Edu), which a private person has made")
    parser.add_argument("--verify", action="store_true", help="check the shards in --out against their manifest")
    return parser.parse_args(argv)


def hub_dataset(args):
    """The `HubDataset` that --source, --name and --split choose; None where --source names files or folders."""
    source = args.source[0]
    if len(args.source) == 1 and source in HUB:
        dataset = HUB[source]
    elif len(args.source) > 1 or os.path.exists(source) or is_text(source) or not re.fullmatch(OWNER_AND_NAME, source):
        for flag, value in (("--name", args.name), ("--split", args.split)):
            if value:
                raise UserError(f"{flag} {value} chooses a part of a data set on the Hub, not of {source}")
        return None
    else:
        stem = source.split("/")[1]
        dataset = HubDataset(source, shard_stem(stem), stem)
    return dataset._replace(name=args.name or dataset.name, split=args.split or dataset.split)


def default_out(args, dataset):
    """As people know them: edu_fineweb10B for FineWeb-Edu's sample-10BT, fineweb100B for FineWeb's sample-100BT, ..."""
    if dataset is None:
        return f"{local_source(args.source).name}_shards"
    sample = re.fullmatch(r"sample-(.*?)T?", dataset.name or "")
    folder = dataset.out + (sample[1] if sample else f"_{dataset.name}" if dataset.name else "")
    return folder if dataset.split == "train" else f"{folder}_{dataset.split}"


def main(argv=None):
    args = arguments(argv)
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers is {args.workers}, but at least 1 thread must do the work")
    dataset = hub_dataset(args)
    out = args.out or Path(default_out(args, dataset))
    size = SHARD_SIZE if args.shard_size is None else args.shard_size
    try:
        if args.verify:
            manifest = text.verify(out, args.workers)
            state = "" if manifest["complete"] else f" (of {manifest['expected_shards'] or 'unknown many'} expected)"
            say(f"{out} is whole: {text.summary(manifest)}{state}")
        elif args.pretokenized:
            pretokenized(args, dataset, out)
        elif dataset is None:
            source = local_source(args.source, args.text_column, args.keep_endoftext)
            make_shards(source, out, size, args.workers, args.max_shards)
        else:
            from_hub(args, dataset, out, size)
    except KeyboardInterrupt:
        say(f"\nstopped: whole shards stay in {out}, and the same command continues from them", sys.stderr)
        return 130
    return 0


def pretokenized(args, dataset, out):
    key = (args.source[0], dataset and dataset.name)
    if key not in PRETOKENIZED or dataset.split != "train":
        known = "; ".join(f"--source {source} --name {name}" for source, name in PRETOKENIZED)
        raise UserError(f"nobody has tokenized {' '.join(args.source)} for us: --pretokenized knows {known}")
    if args.shard_size is not None or args.workers is not None or args.text_column is not None:
        raise UserError("--shard_size, --workers and --text_column have no say in ready-made shards: leave them out")
    fetch_pretokenized(PRETOKENIZED[key], dataset, out, args.max_shards)


def from_hub(args, dataset, out, size):
    revision = begun_revision(out, dataset.title)
    if revision is not None:
        manifest = text.read_manifest(out)
        if manifest["shard_size"] == size and manifest["complete"] and not text.gaps(out, manifest, args.max_shards):
            say(f"{out} is complete: {text.summary(manifest)}")
            return
    options = {"text_column": args.text_column, "keep_endoftext": args.keep_endoftext}
    make_shards(hub_source(dataset, out, revision, **options), out, size, args.workers, args.max_shards)


def begun_revision(out, title):
    """The revision that the shards in `out` are made of, to continue with whatever the Hub has by now, or None."""
    manifest = text.read_manifest(out)
    return manifest["revision"] if manifest and manifest["source"] == title else None


if __name__ == "__main__":
    sys.exit(exit_status(main))
