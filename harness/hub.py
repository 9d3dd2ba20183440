"""Data sets of the Hugging Face Hub: which files make up a split, and how to get them here whole.

HF_TOKEN, HF_ENDPOINT and HF_HOME mean what they mean to `huggingface_hub`.
"""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from harness.cli import UserError
from harness.documents import Source, SourceFile
from harness.files import DISK_FULL, sha256
from harness.folders import KINDS, text_kind


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
    its way. Raises `UserError` when the Hub cannot be reached or has no such data set, name or split.
    """
    options |= {"title": dataset.title, "name": dataset.shards}
    commit = newest_commit(dataset.repo, revision)
    prefix = f"hf://datasets/{dataset.repo}@{commit}/"
    with explained(dataset.title):
        urls = split_files(dataset, commit)
    for url in urls:
        if not url.startswith(prefix):
            raise UserError(f"{dataset.repo} keeps its files elsewhere ({url}): fetch them and pass them with --source")
        if not text_kind(url):
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
    except (exceptions.DataFilesNotFoundError, EmptyDatasetError, ValueError, RuntimeError) as error:
        # no files; an unknown or missing name, with those that there are; a script
        raise UserError(f"{dataset.title}: {error}: choose another --source or --name") from error
    if dataset.split not in splits:
        raise UserError(f"{dataset.repo} has no split {dataset.split}, but {', '.join(splits) or 'none'}: choose one "
                        "with --split")
    return sorted(splits[dataset.split])


def newest_commit(repo, revision=None):
    """The commit of a data set, the newest one unless `revision` names another."""
    from huggingface_hub import HfApi

    with explained(repo):
        return HfApi().dataset_info(repo, revision=revision, expand=["sha"]).sha


def repo_files(repo, folder, commit):
    """The files of a data set below `folder`: a list of `SourceFile` in the order of their names."""
    from huggingface_hub import HfApi, RepoFile

    with explained(f"{repo} {folder}".strip()):
        tree = HfApi().list_repo_tree(repo, folder or None, recursive=True, revision=commit, repo_type="dataset")
        return sorted(SourceFile(entry.path, entry.size, entry.path, entry.lfs.sha256 if entry.lfs else None)
                      for entry in tree if isinstance(entry, RepoFile))


def download(repo, commit, file, folder):
    """Fetch one file of a data set into `folder` unless it is there already; returns its verified path.

    huggingface_hub tries again by itself where a connection breaks, and continues from the byte where it broke.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # one bar is enough
    with explained(f"{repo} {file.name}"):
        path = Path(hf_hub_download(repo, file.where, repo_type="dataset", revision=commit, local_dir=folder))
        if path.stat().st_size != file.size or (file.sha256 and sha256(path) != file.sha256):
            path.unlink()
            raise OSError("it came damaged")
    return path


@contextmanager
def explained(what):
    """Turn what the Hub's client raises about `what` into one line."""
    from huggingface_hub import errors

    missing = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError,
               errors.HFValidationError)
    failed = (OSError, errors.HTTPError, getattr(errors, "XetDownloadError", OSError))  # not in every version
    try:
        yield
    except (*missing, *failed) as error:
        if getattr(error, "errno", None) in DISK_FULL:
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, missing) or status in (401, 403):
            raise UserError(f"the Hugging Face Hub has no {what}, or it is private ({error}): check its name; for a "
                            "private or gated one accept its terms there and set HF_TOKEN") from error
        raise UserError(f"cannot fetch {what} from the Hugging Face Hub ({type(error).__name__}: {error}). Check the "
                        "network and run the same command again: it continues where it stopped. Without a network, run "
                        "it on a machine that has one and copy its --out folder here, or bring the data set's files "
                        "here and pass them with --source") from error
