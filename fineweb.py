"""Raw text to GPT-2 token shards: downloads, tokenizes on all cores, writes, resumes and verifies.

    python fineweb.py                                  FineWeb-Edu's 10B-token sample -> edu_fineweb10B/
    python fineweb.py --pretokenized                   the same tokens ready-made: minutes instead of an hour
    python fineweb.py --source fineweb                 FineWeb; `openwebtext` likewise
    python fineweb.py --source books/ notes.jsonl.gz   .parquet, .jsonl, .jsonl.gz and .txt files or folders of them
    python fineweb.py --verify                         checks every shard against the manifest

Writes NAME_val_000000.npy, NAME_train_000001.npy, ... (one-dimensional uint16, every document led by <|endoftext|>) and
manifest.json. The shards are a pure function of source and options: the same bytes for any number of workers and after
any interruption. A shard appears under its name only when whole, so the process may be killed at any moment, and the
same command goes on where it stopped.

In order: manifest · reading · tokenizing · sources · shards · the Hugging Face Hub · data for the trainer · CLI.
"""

import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

from harness import shards
from harness.cli import Parser, UserError, exit_status
from harness.files import sha256
from harness.shards import TEXT_SUFFIXES
from harness.text import (
    NO_ROOM,
    SHARD_SIZE,
    Source,
    SourceFile,
    _check_room,
    _check_sizes,
    _continued,
    _disk_full_explained,
    _duration,
    _fetched,
    _folder_for,
    _gaps,
    _gigabytes,
    _is_whole,
    _new_manifest,
    _recorded,
    _save_manifest,
    _summary,
    local_source,
    make_shards,
    read_manifest,
    verify,
)

RETRY_SECONDS = (1, 2, 4, 8, 16, 32)  # pauses between attempts when the network fails
WITHOUT_NETWORK = {  # by the kind of files that are to be fetched
    ".parquet": "bring the parquet files here and pass them with --source",
    ".bin": "run this command on a machine that has one, and copy its --out folder here",
}

# ---------------------------------------------------------------------------------------------------------------
# Hub
# ---------------------------------------------------------------------------------------------------------------


class HubDataset(NamedTuple):
    repo: str
    shards: str  # what shards are called
    out: str  # what output folders are called, before the size of the sample


HUB = {
    "fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", "edufineweb", "edu_fineweb"),
    "fineweb": HubDataset("HuggingFaceFW/fineweb", "fineweb", "fineweb"),
    "openwebtext": HubDataset("Skylion007/openwebtext", "openwebtext", "openwebtext"),
}
PRETOKENIZED = {  # GPT-2 tokens that others have made, as llm.c files
    ("fineweb-edu", "sample-10BT"): "kjj0/finewebedu10B-gpt2",
    ("fineweb", "sample-10BT"): "kjj0/fineweb10B-gpt2",
    ("fineweb", "sample-100BT"): "kjj0/fineweb100B-gpt2",
}


def hub_source(dataset, name, out, revision=None):
    """The parquet files of a dataset on the Hugging Face Hub, which come one by one through `out`/.download."""
    folder = ""
    if name is not None:  # FineWeb keeps `sample-10BT` in sample/10BT, crawls in data/
        folder = name.replace("-", "/", 1) if name.startswith("sample-") else f"data/{name}".removesuffix("/default")
    commit, files = _hub_files(dataset.repo, folder, ".parquet", revision)
    return Source(
        title=_hub_title(dataset, name),
        revision=commit,
        name=dataset.shards,
        files=tuple(files),
        fetch=lambda file: _download(dataset.repo, commit, file, Path(out) / ".download"),
        discard=lambda path: path.unlink(),
        remote=True,
    )


def _hub_title(dataset, name):
    return dataset.repo if name is None else f"{dataset.repo} {name}"


def _begun_revision(out, title):
    """The revision that the shards in `out` are made of, to go on with whatever the Hub has by now; None for none."""
    manifest = read_manifest(out)
    return manifest["revision"] if manifest and manifest["source"] == title else None


def _hub_files(repo, folder, suffix, revision=None):
    """(commit, files) of a dataset's files below `folder` that end in `suffix`, in the order of their names."""
    from huggingface_hub import HfApi, RepoFile

    def listed():
        commit = api.dataset_info(repo, revision=revision, expand=["sha"]).sha
        tree = api.list_repo_tree(repo, folder or None, recursive=True, revision=commit, repo_type="dataset")
        return commit, [entry for entry in tree if isinstance(entry, RepoFile) and entry.path.endswith(suffix)]

    api = HfApi()
    commit, files = _patiently(listed, f"{repo} {folder}".strip(), suffix, RETRY_SECONDS[:2])
    if not files:
        raise UserError(f"{repo} holds no {suffix} files in its folder {folder or '/'}: choose another --name")
    return commit, sorted(SourceFile(e.path, e.size, e.path, e.lfs.sha256 if e.lfs else None) for e in files)


def _download(repo, commit, file, folder):
    """Fetch one file of a dataset into `folder`, going on with a partial download; returns its verified path."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # one bar is enough

    def fetched():
        path = Path(hf_hub_download(repo, file.where, repo_type="dataset", revision=commit, local_dir=folder))
        if path.stat().st_size != file.size or (file.sha256 and sha256(path) != file.sha256):
            path.unlink()
            raise OSError(f"{file.name} came damaged")
        return path

    with _disk_full_explained(folder):
        return _patiently(fetched, f"{repo} {file.name}", Path(file.name).suffix, RETRY_SECONDS)


def _patiently(call, what, suffix, pauses):
    """`call()`, tried again after each of `pauses` seconds when the network or the Hub fails."""
    from huggingface_hub import errors

    missing = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError)
    transient = (OSError, errors.HTTPError, getattr(errors, "XetDownloadError", OSError))  # not in every version
    for pause in (*pauses, None):
        try:
            return call()
        except missing as error:
            raise UserError(f"the Hugging Face Hub has no {what}, or keeps it from you ({error}): choose another "
                            "--source or --name") from error
        except transient as error:
            if getattr(error, "errno", None) in NO_ROOM:
                raise
            if pause is None:
                raise UserError(f"cannot fetch {what} from the Hugging Face Hub ({type(error).__name__}: {error}). "
                                "Check the network and run the same command again: it goes on where it stopped. "
                                f"Without a network, {WITHOUT_NETWORK[suffix]}") from error
            print(f"{what}: {type(error).__name__}; next try in {pause} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    raise AssertionError("unreachable")


def fetch_pretokenized(repo, name, out, max_shards=None):
    """Fetch ready-made GPT-2 shards (llm.c `.bin`) into the folder `out`, validation first; returns the manifest.

    Every file is checked: its header against its size, its SHA-256 against the Hub's. Files that are whole are not
    fetched again. Raises `UserError` when the Hub cannot be reached or `out` holds other data.
    """
    from tqdm import tqdm

    out = Path(out)
    _check_sizes(2, max_shards)
    with _folder_for(out):
        commit, files = _hub_files(repo, "", ".bin", _begun_revision(out, repo))
        files = sorted(files, key=lambda file: ("_val_" not in file.name, file.name))
        manifest, wanted = _continued(out, _new_manifest(repo, commit, name, None)), files[:max_shards]
        known = manifest["files"]
        missing = [f for f in wanted if f.name not in known or not _is_whole(out / f.name, known[f.name])]
        total, free = sum(file.size for file in missing), shutil.disk_usage(out).free
        _check_room(out, total, free)
        print(f"{repo}: {len(missing)} of {len(wanted)} shards to fetch, {_gigabytes(total)} into {out} "
              f"({_gigabytes(free)} free); about {_duration(total / 1.25e8)} at 1 Gbit/s", flush=True)
        manifest["expected_shards"] = len(wanted)
        fetched = _fetched(lambda file: _download(repo, commit, file, out / ".download"), missing)
        bar = tqdm(total=total, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)
        with bar, _recorded(out, manifest):
            for file, path in zip(missing, fetched):
                entry = {"tokens": _bin_tokens(path), "sha256": file.sha256 or sha256(path)}
                os.replace(path, out / file.name)
                known[file.name] = entry
                manifest["files"] = known = {f.name: known[f.name] for f in files if f.name in known}
                manifest["next"] = {"file": len(known)} if len(known) < len(files) else None
                _save_manifest(out, manifest)
                bar.update(file.size)
                bar.set_postfix_str(f"shard {len(known)} of {len(wanted)}")
        print(f"{out} is complete: {_summary(manifest)}")
    return manifest


def _bin_tokens(path):
    """How many tokens the llm.c file at `path` holds; its header must be right and agree with its size."""
    _, offset, tokens = shards.open_shard(path)
    if offset != shards.LLMC_HEADER:
        raise UserError(f"{path} has no llm.c header: the repository has changed; leave --pretokenized out")
    return tokens


# ---------------------------------------------------------------------------------------------------------------
# CLI
# ---------------------------------------------------------------------------------------------------------------


def _arguments(argv):
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                    epilog="Killed or failed, the same command goes on where it stopped.")
    parser.add_argument("--source", nargs="+", default=["fineweb-edu"], metavar="NAME|PATH",
                        help=f"{', '.join(HUB)} (from the Hugging Face Hub), or files and folders of "
                             f"{', '.join(TEXT_SUFFIXES)}")
    parser.add_argument("--name", help="sample or crawl of FineWeb(-Edu): sample-10BT (default), sample-100BT, ...")
    parser.add_argument("--out", type=Path, help="folder of the shards (default by source: edu_fineweb10B, ...)")
    parser.add_argument("--shard_size", "--shard-size", type=int, help=f"tokens a shard ({SHARD_SIZE:,})")
    parser.add_argument("--workers", type=int, help="threads that tokenize (as many as cores)")
    parser.add_argument("--max_shards", "--max-shards", type=int, help="end at so many shards, validation included")
    parser.add_argument("--pretokenized", action="store_true", help="fetch ready-made shards of FineWeb(-Edu)")
    parser.add_argument("--verify", action="store_true", help="check the shards in --out against their manifest")
    return parser.parse_args(argv)


def _default_out(source, dataset, name):
    """As people know them: edu_fineweb10B for FineWeb-Edu's sample-10BT, fineweb100B for FineWeb's sample-100BT, ..."""
    if dataset is None:
        return f"{local_source(source).name}_shards"
    sample = re.fullmatch(r"sample-(.*?)T?", name or "")
    return dataset.out + (sample[1] if sample else f"_{name}" if name else "")


def main(argv=None):
    args = _arguments(argv)
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers is {args.workers}, but at least 1 thread must do the work")
    dataset = HUB.get(args.source[0]) if len(args.source) == 1 else None
    if args.name is not None:
        if dataset is None:
            raise UserError(f"--name {args.name} chooses a part of {' or '.join(HUB)}, not of {args.source[0]}")
        if dataset is HUB["openwebtext"]:
            raise UserError(f"--name {args.name}: OpenWebText has one part only, leave --name out")
    elif dataset not in (None, HUB["openwebtext"]):
        args.name = "sample-10BT"
    out = args.out or Path(_default_out(args.source, dataset, args.name))
    size = SHARD_SIZE if args.shard_size is None else args.shard_size
    try:
        if args.verify:
            manifest = verify(out, args.workers)
            state = "" if manifest["complete"] else f" (of {manifest['expected_shards'] or 'unknown many'} expected)"
            print(f"{out} is whole: {_summary(manifest)}{state}")
        elif args.pretokenized:
            _pretokenized(args, out)
        elif dataset is None:
            make_shards(local_source(args.source), out, size, args.workers, args.max_shards)
        else:
            _from_hub(args, dataset, out, size)
    except KeyboardInterrupt:
        print(f"\nstopped: whole shards stay in {out}, and the same command goes on from them", file=sys.stderr)
        return 130
    return 0


def _pretokenized(args, out):
    repo = PRETOKENIZED.get((args.source[0], args.name))
    if repo is None or len(args.source) > 1:
        known = "; ".join(f"--source {source} --name {name}" for source, name in PRETOKENIZED)
        raise UserError(f"nobody has tokenized {' '.join(args.source)} for us: --pretokenized knows {known}")
    if args.shard_size is not None or args.workers is not None:
        raise UserError("--shard_size and --workers have no say in ready-made shards: leave them out")
    fetch_pretokenized(repo, HUB[args.source[0]].shards, out, args.max_shards)


def _from_hub(args, dataset, out, size):
    title = _hub_title(dataset, args.name)
    revision = _begun_revision(out, title)
    if revision is not None:
        manifest = read_manifest(out)
        if manifest["shard_size"] == size and manifest["complete"] and not _gaps(out, manifest, args.max_shards):
            print(f"{out} is complete: {_summary(manifest)}")
            return
    make_shards(hub_source(dataset, args.name, out, revision), out, size, args.workers, args.max_shards)


if __name__ == "__main__":
    sys.exit(exit_status(main))
