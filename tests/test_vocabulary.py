"""A vocabulary of one's own through a model's whole life: prepared, trained, killed, resumed, sampled, scored, exported,
fine-tuned, evaluated; and what is refused. `tokenizer.gpt2` raises in all of it.
"""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import metric_rows, run_trainer, strike, tiny_flags
from torch.nn import functional as F

import convert
import fineweb
import hellaswag
import sample
import train_gpt2
from harness import text as harness_text
from harness import tokenizer
from harness.cli import UserError
from train_gpt2 import GPT

ROOT = Path(__file__).resolve().parent.parent


def never():
    raise AssertionError("GPT-2's vocabulary was asked for")


@pytest.fixture(autouse=True)
def without_gpt2(monkeypatch):
    monkeypatch.setattr(tokenizer, "gpt2", never)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text of 60,000 bytes, some letters of it of two bytes, and a finished run on it in log/."""
    home = tmp_path_factory.mktemp("own")
    words = (ROOT / "input.txt").read_text(encoding="utf-8").replace("a", "ä")
    (home / "my.txt").write_bytes(words.encode()[:60_000])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "gpt2", never)
        train_gpt2.main(flags(home, "log"))
    return home


def flags(home, log_dir, **changes):
    own = {"preset": "tiny", "tokenizer": "400", "seq_len": 32, "val_tokens": 10**6, "sample_every": 6,
           "sample_tokens": 8, "num_samples": 1, **changes}
    return tiny_flags(home / "my.txt", home / log_dir, **own)


def held_out(home):
    """The last tenth of the text in bytes, cut at a character: worked out here by itself."""
    data = (home / "my.txt").read_bytes()
    cut = len(data) - int(len(data) * 0.1)
    while data[cut] & 0xC0 == 0x80:
        cut += 1
    return data[:cut], data[cut:]


def test_bits_per_byte_are_those_counted_by_hand(home):
    """Catches a split that depends on the tokens, a tail that is not validated, and bytes that are not the text's."""
    train, val = held_out(home)
    own = tokenizer.learn([train.decode()], 400)
    model = GPT.from_checkpoint(home / "log").eval()
    assert model.tokenizer == own and model.config.vocab_size == own.size == 400
    ids = torch.tensor([own.end_of_text, *own.encode(val.decode()).tolist()])
    nats = 0.0
    with torch.no_grad():
        for begin in range(0, len(ids) - 1, 32):
            x, y = ids[begin : begin + 32], ids[begin + 1 : begin + 33]
            nats += F.cross_entropy(model(x[None, : len(y)])[0][0].double(), y, reduction="sum").item()
    row = metric_rows(home / "log", "val")[-1]
    assert row["bytes"] == len(val) and row["tokens"] == len(ids) - 1
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(val), rel=1e-6)
    assert row["text_sha256"] == __import__("hashlib").sha256(val).hexdigest()


def test_every_vocabulary_is_validated_on_the_same_text(home):
    """Catches figures of two vocabularies that look comparable and are of different texts."""
    train_gpt2.main(flags(home, "bytes", tokenizer="bytes", max_steps=1))
    rows = [metric_rows(home / name, "val")[-1] for name in ("log", "bytes")]
    assert rows[0]["text_sha256"] == rows[1]["text_sha256"] and rows[0]["bytes"] == rows[1]["bytes"]
    assert GPT.from_checkpoint(home / "bytes").config.vocab_size == 257
