"""A vocabulary of one's own through a model's whole life: prepared, trained, killed, resumed, sampled, scored,
exported, fine-tuned, evaluated; and what is refused. `tokenizer.gpt2` raises in all of it.
"""

import bz2
import hashlib
import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from helpers import ROOT, log_rows, metric_rows, run_ranks, run_trainer, strike, tiny_flags
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
    assert row["text_sha256"] == hashlib.sha256(val).hexdigest()


def test_every_vocabulary_is_validated_on_the_same_text(home, capsys):
    """Catches figures of two vocabularies that look comparable and are of different texts; a yardstick of another."""
    train_gpt2.main(flags(home, "bytes", tokenizer="bytes", max_steps=1))
    train, val = held_out(home)
    packed = len(bz2.compress(train + val)) - len(bz2.compress(train))
    assert f"bits per byte at the end; bzip2 needs {8 * packed / len(val):.2f})" in capsys.readouterr().out
    rows = [metric_rows(home / name, "val")[-1] for name in ("log", "bytes")]
    assert rows[0]["text_sha256"] == rows[1]["text_sha256"] and rows[0]["bytes"] == rows[1]["bytes"]
    assert GPT.from_checkpoint(home / "bytes").config.vocab_size == 257


def in_a_child(trainer, **struck):
    trainer.tokenizer.gpt2 = never
    if struck:
        strike(trainer, **struck)


def test_a_killed_run_goes_on_with_the_vocabulary_in_its_checkpoint(home):
    """Catches a resume that learns anew, from a text that has been changed or a cache that is gone, and other digits;
    two ranks, each of which needs the vocabulary."""
    straight, killed = home / "log", home / "killed"
    run = flags(home, "killed", save_minutes=1e-9)
    done = run_trainer(run, partial(in_a_child, name="train_step", call=8))
    assert done.returncode != 0 and list(killed.glob("rolling_*.pt"))
    shutil.rmtree(home / "cache")
    done = run_trainer(["--resume", "--log_dir", str(killed), "--device", "cpu", "--no-compile"], in_a_child)
    assert done.returncode == 0, done.stderr
    assert (killed / "log.txt").read_text() == (straight / "log.txt").read_text()
    a, b = (GPT.from_checkpoint(folder) for folder in (straight, killed))
    assert a.tokenizer == b.tokenizer and "learned" not in done.stdout
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    done = run_trainer(["--resume", "--log_dir", str(killed), "--tokenizer", "bytes"], in_a_child)
    assert done.returncode == 2 and "--tokenizer bytes contradicts" in done.stderr
    saved = torch.load(straight / "model_00010.pt", weights_only=True)
    assert tokenizer.from_json(saved["tokenizer"]) == a.tokenizer


def test_two_ranks_are_one(home):
    """Catches a rank that learns a vocabulary of its own, or waits for one."""
    for done in run_ranks(flags(home, "ranks", micro_batch_size=2), 2, in_a_child):
        assert done.returncode == 0, done.stderr
    for row, (step, kind, value) in zip(log_rows(home / "ranks"), log_rows(home / "log"), strict=True):
        assert row[:2] == (step, kind) and float(row[2]) == pytest.approx(float(value), abs=2e-4)


def test_exported_it_is_transformers_too(home, tmp_path):
    """Catches an export with GPT-2's files, or whose ids and text transformers gets otherwise; a second export that
    leaves the first one's vocabulary beside its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = GPT.from_checkpoint(home / "log").eval()
    for folder in (home / "log" / "hf", tmp_path):
        if folder == tmp_path:
            (folder / "vocab.json").write_text("{}")  # of an older export
            (folder / "merges.txt").write_text("")
            convert.save({**vars(model.config)}, model.state_dict(), folder, own=model.tokenizer)
        assert {"tokenizer.json", "tokenizer_config.json"} < {path.name for path in folder.iterdir()}
        assert not (folder / "vocab.json").exists() and not (folder / "merges.txt").exists()
        theirs = AutoTokenizer.from_pretrained(folder)
        for text in ("the bell, ThE BELL  rang\n\n naïve 日本 🙂\t12", "", "a<|endoftext|>b"):
            ids = model.tokenizer.encode(text, special=True).tolist()
            assert theirs.encode(text) == ids and theirs.decode(ids) == model.tokenizer.decode(ids) == text
        assert (theirs.eos_token_id, len(theirs)) == (399, 400)
        ids = torch.tensor([model.tokenizer.encode("the bell").tolist()])
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        assert torch.allclose(logits.log_softmax(-1), model(ids)[0].log_softmax(-1), atol=1e-4)
        assert GPT.from_pretrained(folder).tokenizer == model.tokenizer
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config["n_ctx"]) == (400, 399, 32)


def test_it_is_sampled_scored_and_converted(home, tmp_path, capsys):
    """Catches commands that know GPT-2's vocabulary only."""
    run = str(home / "log")
    sample.main(["--model", run, "--prompt", "the bell", "--max_new_tokens", "5", "--temperature", "0"])
    model = GPT.from_checkpoint(run).eval()
    ids = torch.tensor([model.tokenizer.encode("the bell").tolist()])
    expected = model.generate(ids, 5, temperature=0)[0].tolist()
    assert capsys.readouterr().out == model.tokenizer.decode(expected) + "\n"
    convert.main([run, str(tmp_path / "out")])
    assert GPT.from_pretrained(tmp_path / "out").tokenizer == model.tokenizer
    rows = [{"activity_label": "x", "ctx_a": "The", "ctx_b": "", "ctx": "The bell", "label": 1,
             "endings": [f"rang {word}" for word in ("once", "at sea", "b", "again")]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    hellaswag.main(["--model", run, "--hellaswag_path", str(tmp_path / "rows.jsonl"), "--device", "cpu"])
    captured = capsys.readouterr()
    assert "acc_norm " in captured.out and "400 tokens: the published numbers are of models with" in captured.err
    benchmark = hellaswag.load(tmp_path / "rows.jsonl", block_size=32, device="cpu", own=model.tokenizer)
    scores = hellaswag.ending_scores(model, benchmark.batches[0], "cpu", 256)[0]
    for ending, score in zip(rows[0]["endings"], scores.tolist()):
        context, tail = (model.tokenizer.encode(text).tolist() for text in ("The bell", " " + ending))
        logprobs = model(torch.tensor([context + tail]))[0][0].log_softmax(-1)
        due = sum(logprobs[len(context) - 1 + i, id].item() for i, id in enumerate(tail))
        assert score == pytest.approx(due, abs=1e-4)


def test_fine_tuning_and_evaluation_take_the_models_vocabulary(home, capsys):
    """Catches raw text encoded by GPT-2's vocabulary beside a model that has another, silently or by a refusal."""
    tuned = flags(home, "tuned", tokenizer=None, preset="finetune", init_from=home / "log" / "hf", n_layer=None,
                  n_head=None, n_embd=None, max_steps=2)
    train_gpt2.main(tuned)
    model = GPT.from_checkpoint(home / "log")
    assert GPT.from_checkpoint(home / "tuned").tokenizer == model.tokenizer
    for refused in (["--tokenizer", "gpt2"], ["--tokenizer", "bytes"]):
        with pytest.raises(UserError, match=f"--tokenizer {refused[1]} contradicts .*hf, which has .* 400"):
            train_gpt2.main([*tuned, *refused])
    capsys.readouterr()
    evaluated = train_gpt2.train(train_gpt2.TrainConfig(
        init_from=str(home / "log"), eval_only=True, data=str(home / "my.txt"), cache_dir=str(home / "cache"),
        device="cpu", compile=False, hellaswag_every=0))
    row = metric_rows(home / "log", "val")[-1]
    assert evaluated["val"][1][-1] == pytest.approx(row["loss"], abs=2e-4)
    assert f"{row['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out


def test_shards_name_their_vocabulary(home, tmp_path, capsys):
    """Catches shards read by another vocabulary than they were made with, and one that is lost, changed or learned
    anew for the second half of them."""
    def make(*more):
        fineweb.main(["--source", str(home / "my.txt"), "--out", str(tmp_path / "own"), "--shard_size", "9000", *more])

    make("--train_tokenizer", "400", "--max_shards", "2")
    own = tokenizer.read(tmp_path / "own")
    (tmp_path / "own" / "tokenizer.json").read_bytes()
    make("--train-tokenizer", "400")
    manifest = json.loads((tmp_path / "own" / "manifest.json").read_text())
    assert manifest["tokenizer_sha256"] == own.fingerprint == tokenizer.read(tmp_path / "own").fingerprint
    assert (manifest["tokenizer"], manifest["vocab_size"], manifest["end_of_text"]) == ("400", 400, 399)
    tokens = np.concatenate([np.load(tmp_path / "own" / name) for name in manifest["files"]])
    assert own.decode(tokens.tolist()) == "<|endoftext|>" + (home / "my.txt").read_text(encoding="utf-8")
    for other in ([], ["--tokenizer", "gpt2"], ["--train_tokenizer", "bytes"]):
        with pytest.raises(UserError, match="shards of another source or of other flags .tokenizer 400"):
            make(*other)
    with pytest.raises(UserError, match="257 .the bytes alone. to 65,536"):
        make("--train_tokenizer", "100")

    run = flags(home, "shards", tokenizer=None, max_steps=2)
    run[run.index("--data") + 1] = str(tmp_path / "own")
    train_gpt2.main(run)
    assert GPT.from_checkpoint(home / "shards").tokenizer == own
    for other in ("gpt2", "bytes", "500"):
        with pytest.raises(UserError, match=f"manifest.json says 400.*(--tokenizer {other}|GPT-2's)"):
            train_gpt2.main([*run, "--tokenizer", other])
    train_gpt2.main([*run, "--tokenizer", str(tmp_path / "own" / "tokenizer.json")])
    (tmp_path / "own" / "tokenizer.json").write_text(tokenizer.learn((), 257).json, encoding="utf-8")
    for command in (lambda: train_gpt2.main(run), lambda: fineweb.main(["--verify", "--out", str(tmp_path / "own")])):
        with pytest.raises(UserError, match="tokenizer.json is another one than that of the shards"):
            command()
    (tmp_path / "own" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        train_gpt2.main(run)
    (tmp_path / "own" / "manifest.json").unlink()  # now they could be anything
    with pytest.raises(UserError, match="tokens already, so that no vocabulary can be learned"):
        train_gpt2.main([*run, "--tokenizer", "400"])
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "tokenizer.json").write_text(own.json, encoding="utf-8")
    train_gpt2.main([*run, "--tokenizer", str(tmp_path / "file")])
    assert GPT.from_checkpoint(home / "shards").tokenizer == own


def test_a_refused_vocabulary_writes_nothing(home, tmp_path):
    """Catches a folder, a log or a cache that is begun for a vocabulary that cannot be."""
    (tmp_path / "bad.json").write_text('{"model": {}}')
    for run in (lambda: train_gpt2.main(flags(home, "none", tokenizer=tmp_path / "bad.json")),
                lambda: fineweb.main(["--source", str(home / "my.txt"), "--out", str(home / "none"), "--tokenizer",
                                      str(tmp_path / "bad.json")])):
        with pytest.raises(UserError, match="bad.json is damaged"):
            run()
        assert not [path for path in (home / "none").glob("*") if path.name != ".lock"]


@pytest.mark.parametrize(("language", "most"), [("Тихая вода качала старую лодку у моста. ", 1.5),
                                                ("灯塔上的老人每天晚上点亮那盏灯。", 1.0)])
def test_the_console_says_where_gpt2s_vocabulary_does_not_fit(language, most, tmp_path, monkeypatch, capsys):
    """Catches a text of which a token is a letter or less, and nobody says so."""
    monkeypatch.undo()
    (tmp_path / "my.txt").write_text(language * 400, encoding="utf-8")
    for vocabulary, warned in (("gpt2", True), ("300", False)):
        train_gpt2.main(flags(tmp_path, vocabulary, tokenizer=vocabulary, max_steps=1, val_every=0, sample_every=0))
        said = capsys.readouterr().out
        characters = float(said.partition(" characters a token")[0].rpartition(" ")[2])
        assert ("made for English" in said and "--tokenizer 8192" in said) == warned
        assert characters < most if warned else characters > most


def test_the_text_is_cut_at_a_byte():
    """Catches a character cut in two, text that is lost or double at the cut, and documents led twice or never."""
    from harness.documents import Batch

    texts = [["aä", "bcd"], ["ä" * 5], ["xy", "z"]]
    batches = [Batch(part, 0, len("".join(part).encode()), 1.0, leads=number != 1) for number, part in enumerate(texts)]
    whole = "".join("".join(part) for part in texts)
    for limit in range(len(whole.encode()) + 1):
        first = list(harness_text.cut(batches, limit, before=True))
        second = list(harness_text.cut(batches, limit, before=False))
        joined = ["".join("".join(batch.texts) for batch in part) for part in (first, second)]
        assert "".join(joined) == whole and 0 <= len(joined[0].encode()) - limit <= 1
        assert not second or second[0].leads
        assert all(text for batch in first + second for text in batch.texts)
