"""Data sets of the Hugging Face Hub: which files make up a split, and how to get them here whole.

HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE mean what they mean to `huggingface_hub`.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from harness.cli import UserError, say
from harness.documents import KINDS, Source, SourceFile, is_text
from harness.files import sha256
from harness.text import NO_ROOM, disk_full_explained

RETRY_SECONDS = (1, 2, 4, 8, 16, 32)  # pauses between attempts when the network fails
WITHOUT_NETWORK = {  # by the suffix of the files that are to be fetched
    ".bin": "run this command on a machine that has one, and copy its --out folder here",
    "": "bring the data set's files here and pass them with --source",
}


class HubDataset(NamedTuple):
    repo: str
    shards: str  # what shards are called
    out: str  # what output folders are called, before the size of the sample
    name: str | None = None  # the configuration; None for the data set's own default
    split: str = "train"

    @property
    def title(self):
        """What a manifest calls it."""
        return " ".join(filter(None, [self.repo, self.name, self.split if self.split != "train" else None]))


def hub_source(dataset, out, revision=None, **options):
    """A `Source` of one split's files, which come one by one through `out`/.download; `options` as `Source` has them.

    `datasets` knows which files make up a configuration and a split. The files themselves are fetched here, whole: they
    are checked by their SHA-256, a connection that breaks costs nothing, and a kill costs at most the file that was on
    its way. With HF_HUB_OFFLINE they are those in the user's cache. Raises `UserError` when the Hub cannot be reached
    or has no such data set, name or split.
    """
    from huggingface_hub import is_offline_mode

    options |= {"title": dataset.title, "name": dataset.shards}
    if is_offline_mode():
        folder = _cached_folder(dataset.repo, revision)
        paths = [Path(path) for path in split_files(dataset._replace(repo=str(folder)), None)]
        files = [SourceFile(path.relative_to(folder).as_posix(), path.stat().st_size, path) for path in paths]
        say(f"HF_HUB_OFFLINE: {len(files)} files of {dataset.title} are in the cache, {folder}")
        return Source(revision=folder.name, files=tuple(sorted(files)), **options)

    commit = newest_commit(dataset.repo, revision)
    prefix = f"hf://datasets/{dataset.repo}@{commit}/"
    urls = patiently(lambda: split_files(dataset, commit), dataset.title, "", RETRY_SECONDS[:2])
    for url in urls:
        if not url.startswith(prefix):
            raise UserError(f"{dataset.repo} keeps its files elsewhere ({url}): fetch them and pass them with --source")
        if not is_text(url):
            raise UserError(f"{dataset.title} holds {url}, which is no text: files of {KINDS} can be read")
    wanted = {url.removeprefix(prefix) for url in urls}
    folder = os.path.commonpath([os.path.dirname(path) for path in wanted])
    return Source(
        revision=commit,
        files=tuple(file for file in repo_files(dataset.repo, folder, commit) if file.name in wanted),
        fetch=lambda file: download(dataset.repo, commit, file, Path(out) / ".download"),
        discard=lambda path: path.unlink(),
        remote=True,
        **options,
    )


def split_files(dataset, commit):
    """Addresses of the files of a data set's split, as `datasets` resolves them, in the order of their names."""
    from datasets import exceptions, load_dataset_builder, logging
    from datasets.data_files import EmptyDatasetError

    logging.set_verbosity(logging.CRITICAL)  # its exceptions say the same
    try:
        with tempfile.TemporaryDirectory() as empty:  # a data set in the user's cache may be of another revision
            builder = load_dataset_builder(dataset.repo, dataset.name, revision=commit, cache_dir=empty)
        splits = builder.config.data_files or {}
    except (exceptions.DataFilesNotFoundError, EmptyDatasetError) as error:
        raise UserError(f"{dataset.title} has no files ({error}): choose another --source or --name") from error
    except (ValueError, RuntimeError) as error:  # an unknown or missing name, with those that there are; a script
        raise UserError(f"{dataset.title}: {error}; a configuration is chosen with --name") from error
    if dataset.split not in splits:
        raise UserError(f"{dataset.repo} has no split {dataset.split}, but {', '.join(splits) or 'none'}: choose one "
                        "with --split")
    return sorted(splits[dataset.split])


def _cached_folder(repo, revision):
    """The folder of a data set in the user's cache."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True))
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"HF_HUB_OFFLINE is set and {repo} is not in the cache: fetch it on a machine with a network "
                        f"(`hf download --repo-type dataset {repo}`), or unset it") from error


def newest_commit(repo, revision=None, suffix=""):
    """The commit of a data set, the newest one unless `revision` names another; `suffix` of the files to be fetched."""
    from huggingface_hub import HfApi

    return patiently(lambda: HfApi().dataset_info(repo, revision=revision, expand=["sha"]).sha, repo, suffix,
                     RETRY_SECONDS[:2])


def repo_files(repo, folder, commit):
    """The files of a data set below `folder`: a list of `SourceFile` in the order of their names."""
    from huggingface_hub import HfApi, RepoFile

    def listed():
        tree = HfApi().list_repo_tree(repo, folder or None, recursive=True, revision=commit, repo_type="dataset")
        return [entry for entry in tree if isinstance(entry, RepoFile)]

    files = patiently(listed, f"{repo} {folder}".strip(), "", RETRY_SECONDS[:2])
    return sorted(SourceFile(e.path, e.size, e.path, e.lfs.sha256 if e.lfs else None) for e in files)


def download(repo, commit, file, folder):
    """Fetch one file of a data set into `folder` unless it is there already; returns its verified path."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # one bar is enough

    def once():
        path = Path(hf_hub_download(repo, file.where, repo_type="dataset", revision=commit, local_dir=folder))
        if path.stat().st_size != file.size or (file.sha256 and sha256(path) != file.sha256):
            path.unlink()
            raise OSError(f"{file.name} came damaged")
        return path

    with disk_full_explained(folder):
        return patiently(once, f"{repo} {file.name}", Path(file.name).suffix, RETRY_SECONDS)


def patiently(call, what, suffix, pauses):
    """`call()`, tried again after each of `pauses` seconds when the network or the Hub fails."""
    from huggingface_hub import errors

    missing = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError)
    transient = (OSError, errors.HTTPError, getattr(errors, "XetDownloadError", OSError))  # not in every version
    for pause in (*pauses, None):
        try:
            return call()
        except errors.HFValidationError as error:
            raise UserError(f"{what} is neither a path here nor the name of a data set on the Hub ({error})") from error
        except transient as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if isinstance(error, missing) or status in (401, 403):
                raise UserError(f"the Hugging Face Hub has no {what}, or keeps it from you ({error}): check its name; "
                                "for a private or gated one accept its terms there and set HF_TOKEN") from error
            if getattr(error, "errno", None) in NO_ROOM:
                raise
            if pause is None or isinstance(error, errors.OfflineModeIsEnabled):
                advice = WITHOUT_NETWORK.get(suffix, WITHOUT_NETWORK[""])
                raise UserError(f"cannot fetch {what} from the Hugging Face Hub ({type(error).__name__}: {error}). "
                                "Check the network and run the same command again: it continues where it stopped. "
                                f"Without a network, {advice}") from error
            say(f"{what}: {type(error).__name__}; next try in {pause} s", sys.stderr)
            time.sleep(pause)
    raise AssertionError("unreachable")
