"""Turns any text or data set into GPT-2 token shards: downloads, tokenizes on all cores, resumes, verifies.

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
    import sys
    sys.path.insert(0, __file__.removesuffix("fineweb.py"))  # python -P leaves it out
    from harness.cli import quiet_imports
    quiet_imports()

import os
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from harness import shards, text, tokenizer
from harness.cli import Parser, UserError, count, duration, exit_status, gigabytes, say
from harness.documents import Source, local_source, peeked, read_source, shard_stem
from harness.files import sha256
from harness.folders import KINDS, text_kind
from harness.hub import HubDataset, download, hub_source, newest_commit, repo_files
from harness.text import SHARD_SIZE, write_shards  # noqa: F401 (part of this file's interface)
from harness.threads import cores

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

# --- shards ---


def make_shards(source, out, shard_size=SHARD_SIZE, workers=None, max_shards=None, vocabulary="gpt2"):
    """Tokenize a `Source` into shards in the folder `out`, continuing where an earlier run stopped.

    `vocabulary`: that of `tokenizer.chosen`, or learned from the source, of a data set on the Hub from its first file.
    Returns the manifest (see `text.read_manifest`). Raises `UserError` when `out` holds other data, when the source is
    damaged or too small, and when the disk is full.
    """
    out, workers = Path(out), workers or cores()
    text.check_sizes(shard_size, max_shards)
    with text.folder_for(out):
        manifest = text.continued(out, source, shard_size, vocabulary)
        if manifest["tokenizer_sha256"] or manifest["tokenizer"] == "gpt2":
            own = tokenizer.chosen(vocabulary) or text.tokenizer_of(out, manifest)
        else:
            kept = replace(source, files=source.files[:1], discard=lambda path: None)
            some = kept if source.remote else source
            own = text.learned(vocabulary, read_source(some), some.size)
            manifest |= text.describe(own, vocabulary)
        gaps, encode = text.gaps(out, manifest, max_shards), None
        if gaps or not manifest["complete"]:  # a kill may have come between the last shard and this word
            with text.ShardFolder(out, manifest, own) as folder:
                for place, first, stop in gaps:
                    head, batches = peeked(read_source(source, place, manifest["text_column"]))
                    position = first * shard_size - place["skip"]  # in the stream of all tokens
                    progress = Progress(source, manifest, max_shards, position)
                    if head and encode is None:
                        encode = text.encoder(head[0].texts, source.size, own)
                        progress.announce(out, head[0], encode)
                    tokenized = progress.watch(text.tokenized(batches, encode, workers))
                    for shard in text.cut_into_shards(tokenized, place, first, stop, shard_size):
                        folder.add(shard, progress.expected_shards)
        say(f"{out} is complete: {text.summary(manifest)}")
    return manifest


# --- progress ---


class Progress:
    """What a run reports: the size of the task before it starts, then one bar, or a line now and then in a log file."""

    def __init__(self, source, manifest, max_shards, position):
        self.source, self.manifest, self.max_shards = source, manifest, max_shards
        self.position = position  # tokens from the source's beginning
        self.expected_shards = None  # an estimate

    def announce(self, out, head, encode):
        """Report size and disk space, from the first batch. Raises `UserError` when the disk is too small."""
        source = self.source
        expected = self._expected(self.position + len(text.tokens_of(head, encode)), head.done)
        left = max(0, expected - sum(entry["tokens"] for entry in self.manifest["files"].values()))
        needed, free = 2 * left, shutil.disk_usage(out).free
        if source.remote:
            needed += 2 * max(file.size for file in source.files)  # the one in use and the one being fetched
        say(f"{source.in_words(head.column)}; about {expected:,.0f} tokens -> "
            f"{count(-(-expected // self.manifest['shard_size']), 'shard')}, {gigabytes(2 * expected)} in {out} "
            f"({gigabytes(free)} free)")
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
                self.expected_shards = shards = -(-expected // size)
                state = f"{read / seconds / 1e6:.0f} MB/s, shard {self.position // size + 1:,} of {shards:,}"
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


# --- ready-made shards ---


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
        commit = newest_commit(repo, begun_revision(out, repo))
        files = [file for file in repo_files(repo, "", commit) if file.name.endswith(".bin")]
        if not files:
            raise UserError(f"{repo} holds no .bin files any more: leave --pretokenized out")
        files = sorted(files, key=lambda file: ("_val_" not in file.name, file.name))
        manifest = text.continued(out, Source(repo, commit, dataset.shards, tuple(files)), None)
        wanted, bad = files[:max_shards], text.missing_shards(out, manifest)
        missing = [file for file in wanted if file.name not in manifest["files"] or file.name in bad]
        total, free = sum(file.size for file in missing), shutil.disk_usage(out).free
        check_room(out, total, free)
        say(f"{repo}: made by a private person, {repo.split('/')[0]} on the Hugging Face Hub, not by {dataset.repo} "
            "or this project")
        say(f"{len(missing)} of {count(len(wanted), 'shard')} to fetch, {gigabytes(total)} into {out} "
            f"({gigabytes(free)} free); about {duration(total / 1.25e8)} at 1 Gbit/s")
        bar = tqdm(total=total, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)
        with bar, text.ShardFolder(out, manifest, tokenizer.gpt2_tokenizer()) as folder:
            for file in missing:
                path = download(repo, commit, file, out / ".download")
                _, offset, tokens = shards.open_shard(path)
                if offset != shards.LLMC_HEADER:
                    raise UserError(f"{path} has no llm.c header: the repository has changed; leave --pretokenized out")
                entry = {"tokens": tokens, "sha256": file.sha256 or sha256(path)}
                os.replace(path, out / file.name)
                done = len(manifest["files"].keys() | {file.name})
                folder.record(file.name, entry, next={"file": done} if done < len(files) else None,
                              expected_shards=len(wanted))
                bar.update(file.size)
                bar.set_postfix_str(f"shard {done} of {len(wanted)}")
        say(f"{out} is complete: {text.summary(manifest)}")
    return manifest


# --- CLI ---


def arguments(argv):
    parser = Parser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False,
                    epilog="Killed or failed, the same command continues where it stopped.")
    parser.add_argument("--source", nargs="+", default=["fineweb-edu"], metavar="NAME|PATH",
                        help=f"{', '.join(HUB)} or OWNER/NAME of any data set on the Hugging Face Hub, or files and "
                             f"folders of {KINDS}")
    parser.add_argument("--name", help="configuration of a data set on the Hub (FineWeb's: sample-10BT)")
    parser.add_argument("--split", help="split of a data set on the Hub (train)")
    parser.add_argument("--text_column", metavar="NAME",
                        help="text column (`text`, or the only column of strings)")
    parser.add_argument("--keep_endoftext", action="store_true",
                        help="treat <|endoftext|> in a .txt as ordinary text, not as the end of a document")
    parser.add_argument("--tokenizer", metavar="gpt2|FILE|FOLDER",
                        help="vocabulary: GPT-2's, or that of a tokenizer.json with byte-level BPE [gpt2]")
    parser.add_argument("--train_tokenizer", metavar="N",
                        help="learn a vocabulary of N ids from the source; bytes: the 256 bytes alone")
    parser.add_argument("--out", type=Path, help="folder of the shards (default by source: edu_fineweb10B, ...)")
    parser.add_argument("--shard_size", type=int, help=f"tokens per shard ({SHARD_SIZE:,})")
    parser.add_argument("--workers", type=int, help="tokenizer threads (one per core)")
    parser.add_argument("--max_shards", type=int, help="shards to stop at, validation included")
    parser.add_argument("--pretokenized", action="store_true",
                        help="fetch ready-made shards of FineWeb(-Edu), made by a private person")
    parser.add_argument("--verify", action="store_true", help="check the shards in --out against their manifest")
    return parser.parse_args(argv)


def hub_dataset(args):
    """The `HubDataset` that --source, --name and --split choose; None where --source names files or folders."""
    source = args.source[0]
    could_be_hub = len(args.source) == 1 and not os.path.exists(source) and not text_kind(source)
    if len(args.source) == 1 and source in HUB:
        dataset = HUB[source]
    elif could_be_hub and re.fullmatch(OWNER_AND_NAME, source):
        stem = source.split("/")[1]
        dataset = HubDataset(source, shard_stem(stem), stem)
    else:
        if args.name:
            raise UserError(f"--name {args.name} chooses a part of a data set on the Hub, not of {source}")
        return None
    return dataset._replace(name=args.name or dataset.name, split=args.split or dataset.split)


def default_out(args, dataset):
    """As people know them: edu_fineweb10B for FineWeb-Edu's sample-10BT, fineweb100B for FineWeb's sample-100BT, ..."""
    if dataset is None:
        name = local_source(args.source, split=args.split).name
        return f"{name}_{args.split}_shards" if args.split else f"{name}_shards"
    sample = re.fullmatch(r"sample-(.*?)T?", dataset.name or "")
    folder = dataset.out + (sample[1] if sample else f"_{dataset.name}" if dataset.name else "")
    return folder if dataset.split == "train" else f"{folder}_{dataset.split}"


def main(argv=None):
    args = arguments(argv)
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers is {args.workers}, but it must be at least 1")
    if args.tokenizer and args.train_tokenizer:
        raise UserError(f"--tokenizer {args.tokenizer} and --train_tokenizer {args.train_tokenizer}: give one of them")
    if args.train_tokenizer and not tokenizer.size_to_learn(args.train_tokenizer):
        raise UserError(f"--train_tokenizer {args.train_tokenizer}: it is a number of ids, 257 to 65,536, or bytes")
    vocabulary = args.train_tokenizer or args.tokenizer or "gpt2"
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
            source = local_source(args.source, args.text_column, args.keep_endoftext, args.split, [out])
            make_shards(source, out, size, args.workers, args.max_shards, vocabulary)
        else:
            from_hub(args, dataset, out, size, vocabulary)
    except KeyboardInterrupt:
        say(f"\nstopped: whole shards stay in {out}, and the same command continues from them", sys.stderr)
        return 130
    return 0


def pretokenized(args, dataset, out):
    key = (args.source[0], dataset and dataset.name)
    if key not in PRETOKENIZED or dataset.split != "train":
        known = "; ".join(f"--source {source} --name {name}" for source, name in PRETOKENIZED)
        raise UserError(f"nobody has tokenized {' '.join(args.source)} for us: --pretokenized knows {known}")
    choices = (args.shard_size, args.workers, args.text_column, args.tokenizer, args.train_tokenizer)
    if any(choice is not None for choice in choices):
        raise UserError("--shard_size, --workers, --text_column, --tokenizer and --train_tokenizer do not apply to "
                        "--pretokenized: leave them out")
    fetch_pretokenized(PRETOKENIZED[key], dataset, out, args.max_shards)


def from_hub(args, dataset, out, size, vocabulary):
    revision = begun_revision(out, dataset.title)
    if revision is not None:
        manifest = text.read_manifest(out)
        same = manifest["shard_size"] == size and manifest["tokenizer"] == vocabulary
        same = same and args.text_column in (None, manifest["text_column"])
        if same and manifest["complete"] and not text.gaps(out, manifest, args.max_shards):
            say(f"{out} is complete: {text.summary(manifest)}")
            return
    options = {"text_column": args.text_column, "keep_endoftext": args.keep_endoftext}
    make_shards(hub_source(dataset, out, revision, **options), out, size, args.workers, args.max_shards,
                vocabulary)


def begun_revision(out, title):
    """The revision that the shards in `out` are made of, to continue with whatever the Hub has by now, or None."""
    manifest = text.read_manifest(out)
    return manifest["revision"] if manifest and manifest["source"] == title else None


if __name__ == "__main__":
    sys.exit(exit_status(main))
