"""Fine-tuning on answers: pairs of prompt and completion from their file to the export of a model that answers them."""

import csv
import gzip
import json
import math
import random
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import error_line, log_rows, make_shards, metric_rows, run_ranks, run_trainer, strike, tiny_flags
from torch.nn import functional as F

import fineweb
import train_gpt2
from harness import text, tokenizer
from harness.cli import UserError
from harness.plan import first_words
from harness.shards import Shards, find_shards, open_shard
from train_gpt2 import GPT, DataLoaderLite, GPTConfig

# "habit" is one token: apart and together differ. An empty prompt is one, an empty completion is none.
ROWS = [("ha", "bit"), ("", "no prompt"), ("never", ""), ("Snow<|endoftext|>", "<|endoftext|>"), ("ä" * 9, "\n")]
ROWS += [(f"What is {n} plus one?", f" It is {n + 1}.") for n in range(40)]


def by_hand(own=None):
    """(ids, whether each counts) of `ROWS`, by tiktoken or a vocabulary of one's own."""
    encode, end, ids, counts = own.encode if own else tokenizer.gpt2().encode_ordinary, 256 if own else 50256, [], []
    for prompt, completion in ROWS:
        if completion:
            asked, answer = encode(prompt), encode(completion)
            ids += [end, *asked, *answer]
            counts += [True, *[False] * len(asked), *[True] * len(answer)]
    return np.array(ids), np.array(counts)


def write_pairs(path, rows=ROWS):
    """Write pairs in the format that the name of the file says."""
    objects = [{"id": str(n), "prompt": pair[0], "completion": pair[1]} for n, pair in enumerate(rows)]
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["id", "prompt", "completion"], *(row.values() for row in objects)])
    elif path.suffix == ".parquet":
        objects = [{name: value or None for name, value in row.items()} for row in objects]  # nulls, too, are empty
        pq.write_table(pa.Table.from_pylist(objects), path, row_group_size=7)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in objects).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def stored(folder, split="train"):
    """(ids, whether each counts) of the shards of a split, read without this program's reader."""
    files = sorted(folder.glob(f"*_{split}_*.npy"))
    ids = [np.load(file) for file in files]
    bits = [np.unpackbits(np.fromfile(file.with_suffix(".mask"), np.uint8)) for file in files]
    assert all(len(more) == -(-len(part) // 8) * 8 for part, more in zip(ids, bits))
    return np.concatenate(ids), np.concatenate([more[: len(part)] == 1 for part, more in zip(ids, bits)])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_pairs_are_tokenized_apart_with_a_mask(tmp_path, name):
    """Catches prompt and completion as one text, a prompt that counts, an end that does not, a mask cut elsewhere than
    the ids; in a raw --data and in shards, made at once or again after one is lost."""
    source, (ids, counts), mask = write_pairs(tmp_path / name), by_hand(), tmp_path / "out" / "a_train_000002.mask"
    manifest = fineweb.make_shards(fineweb.local_source([source]), tmp_path / "out", shard_size=77)
    for expected, *parts in zip((ids, counts), stored(tmp_path / "out", "val"), stored(tmp_path / "out")):
        assert np.array_equal(np.concatenate(parts), expected)
    assert (manifest["documents"], manifest["skipped"]) == (len(ROWS) - 1, 1)
    assert sum(entry["counted"] for entry in manifest["files"].values()) == counts.sum()
    before = mask.read_bytes()
    mask.unlink()
    with pytest.raises(UserError, match="a_train_000002.mask is missing"):
        text.find_splits(tmp_path / "out", None, tmp_path / "cache")
    fineweb.make_shards(fineweb.local_source([source]), tmp_path / "out", shard_size=77)
    assert mask.read_bytes() == before
    mask.write_bytes(bytes([before[0] ^ 1]) + before[1:])
    with pytest.raises(UserError, match="1 of 14 files are bad: a_train_000002.mask is missing or damaged"):
        text.verify(tmp_path / "out")

    held_out = len(ids) // 10
    train, val, _ = text.find_splits(source, None, tmp_path / "cache")
    for split, part in (("train", slice(0, len(ids) - held_out)), ("val", slice(len(ids) - held_out, None))):
        for expected, now in zip((ids, counts), stored(train[0][0].parent, split)):
            assert np.array_equal(now, expected[part])
    assert first_words(train[0], tokenizer.gpt2_tokenizer()) == "<|endoftext|>ha"
    column, _, _ = text.find_splits(source, None, tmp_path / "cache", text_column="completion")
    assert not Shards(column, 4).masked and open_shard(column[0][0])[2] < len(ids)


def test_targets_that_do_not_count_are_minus_100(tmp_path):
    """Catches a mask that is one token off, that begins with its file where a part does not, and a rank's own count."""
    (ids, counts), file = by_hand(), tmp_path / "a_train_000001.npy"
    np.save(file, ids.astype(np.uint16))
    file.with_suffix(".mask").write_bytes(np.packbits(counts))
    for data, split, begin in ((tmp_path, "train", 0), (file, "val", len(ids) - len(ids) // 10)):
        rows = [slice(first, first + 6) for first in range(begin, len(ids) - 5, 5)]
        expected_y = [np.where(counts[row], ids[row], -100)[1:] for row in rows]
        for rank in (0, 1):
            loader = DataLoaderLite(data, 2, 5, split=split, rank=rank, world_size=2, shuffle=False)
            for start in range(2 * rank, len(rows) - 1, 4):
                x, y = loader.next_batch()
                assert np.array_equal(x, [ids[row][:-1] for row in rows[start : start + 2]])
                assert np.array_equal(y, expected_y[start : start + 2])
                assert loader.counted == sum((row >= 0).sum() for row in expected_y[start : start + 2])
            loader.close()
    assert Shards(find_shards(tmp_path, "train"), 5, masked=False).counted([0, 1]).all()


# --- a step by hand -------------------------------------------------------------------------------------------------

COUNTED_ROWS = [[3, 4, 9], [], [0], list(range(16))]  # of the 16 targets of each row of a step
SHAPE = GPTConfig(16, n_layer=2, n_head=2, n_embd=32)


def keep_gradients(folder, trainer):
    """Make an update leave each rank's gradients, as they are before clipping, in `folder`."""
    inner, rank = trainer.nn.utils.clip_grad_norm_, trainer.rank_from_environment()[0]

    def clip(parameters, *args):
        parameters = list(parameters)
        torch.save([p.grad.clone() for p in parameters], Path(folder, f"{rank}.pt"))
        return inner(parameters, *args)

    trainer.nn.utils.clip_grad_norm_ = clip


def overflow(trainer):
    scaler = trainer.torch.amp.GradScaler
    trainer.torch.amp.GradScaler = lambda *args, **kwargs: scaler(*args, init_scale=2.0**40, **kwargs)


def one_step(folder, log_dir, rows, **changes):
    """Flags of a run whose steps read `rows` sequences each, in order."""
    return tiny_flags(folder, log_dir, **{"total_batch_size": 16 * rows, "micro_batch_size": 1, "max_steps": 1,
                                          "val_every": 0, "shuffle": False, **changes})


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Shards with a mask of which the first four sequences count as in `COUNTED_ROWS`."""
    folder = make_shards(tmp_path_factory.mktemp("masked") / "data", train=(97,), val=(97,))
    bits = np.zeros(97, bool)
    for row, targets in enumerate(COUNTED_ROWS):
        bits[[16 * row + 1 + target for target in targets]] = True
    for file in folder.glob("*.npy"):
        file.with_suffix(".mask").write_bytes(np.packbits(bits))
    return folder


def hand_count(folder, rows):
    """(loss, gradients) of a new model on the first sequences, the mean over all their counted targets, in fp64."""
    ids = torch.from_numpy(np.load(next(folder.glob("*_train_*.npy"))).astype(np.int64))
    model = GPT(SHAPE, 1337).double()
    nats, count = 0, 0
    for row in range(rows):
        logits = model(ids[None, 16 * row : 16 * row + 16])[0][0]
        for target in COUNTED_ROWS[row]:
            nats, count = nats - F.log_softmax(logits[target], -1)[ids[16 * row + target + 1]], count + 1
    (nats / count).backward()
    return (nats / count).item(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("rows, ranks, B", [(4, 1, 1), (4, 1, 2), (4, 1, 4), (4, 2, 1), (4, 2, 2), (2, 2, 1)])
def test_a_step_is_the_mean_over_its_counted_tokens(masked, tmp_path, rows, ranks, B):
    """Catches a mean of micro-batches' or ranks' means, nan from one that counts nothing, and a gradient that is scaled
    twice or after clipping."""
    flags = one_step(masked, tmp_path / "log", rows, micro_batch_size=B)
    for result in run_ranks(flags, ranks, before=partial(keep_gradients, tmp_path)):
        assert result.returncode == 0, result.stderr
    row, (loss, gradients) = metric_rows(tmp_path / "log", "train")[0], hand_count(masked, rows)
    assert abs(row["loss"] - loss) < 1e-6 * loss and not row["skipped"]
    assert math.isclose(row["grad_norm"], torch.cat([g.flatten() for g in gradients]).norm().item(), rel_tol=1e-5)
    for rank in range(ranks):
        for ours, expected in zip(torch.load(tmp_path / f"{rank}.pt"), gradients, strict=True):
            assert (ours - expected).abs().max() < 1e-6


def test_a_step_that_counts_nothing(masked, tmp_path):
    """Catches weights that become nan where all of a step's targets are of prompts."""
    assert run_trainer(one_step(masked, tmp_path / "log", 1, max_steps=3)).returncode == 0
    assert all(math.isfinite(row["loss"]) and not row["skipped"] for row in metric_rows(tmp_path / "log", "train"))


def test_gradients_of_fp16_are_scaled_once(masked, tmp_path):
    """Catches a weight that is applied before the scaler's own is taken off, and an overflow that reaches weights."""
    flags = [one_step(masked, tmp_path / name, 4, dtype="float16") for name in ("log", "over")]
    assert run_trainer(flags[0], before=partial(keep_gradients, tmp_path)).returncode == 0
    loss, gradients = hand_count(masked, 4)
    assert abs(metric_rows(tmp_path / "log", "train")[0]["loss"] - loss) < 2e-3 * loss
    ours, expected = (torch.cat([g.flatten() for g in part]) for part in (torch.load(tmp_path / "0.pt"), gradients))
    assert (ours - expected).norm() < 0.01 * expected.norm()
    assert run_trainer(flags[1], before=overflow).returncode == 0
    saved, fresh = torch.load(tmp_path / "over" / "model_00001.pt", weights_only=True), GPT(SHAPE, 1337).state_dict()
    assert metric_rows(tmp_path / "over", "train")[0]["skipped"] and saved["scaler"]["scale"] == 2.0**39
    assert all(torch.equal(saved["model"][name], fresh[name]) for name in fresh)


def test_validation_counts_what_counts(masked, tmp_path):
    """Catches a validation loss or bits per byte over prompts, and figures that do not say over what they are."""
    flags = partial(tiny_flags, masked, max_steps=1, total_batch_size=64, val_tokens=64)
    said = run_trainer(flags(tmp_path / "log")).stdout
    assert "validation on 64 tokens, of which 20 count" in said and "loss is taken on completions alone" in said
    row, ids = metric_rows(tmp_path / "log", "val")[0], np.load(next(masked.glob("*_val_*.npy"))).astype(np.int64)
    model = GPT(SHAPE, 1337)
    nats, size, table = 0.0, 0, tokenizer.gpt2_tokenizer().table
    for n, targets in enumerate(COUNTED_ROWS):
        losses = -F.log_softmax(model(torch.tensor(ids[None, 16 * n : 16 * n + 16]))[0][0], -1)
        nats += sum(losses[target, ids[16 * n + target + 1]].item() for target in targets)
        size += sum(len(table[ids[16 * n + target + 1]]) for target in targets)
    assert row["counted"] == 20 and math.isclose(row["loss"], nats / 20, rel_tol=1e-6)
    assert row["bytes"] == size and math.isclose(row["bits_per_byte"], nats / math.log(2) / size, rel_tol=1e-6)
    assert "validation on 64 tokens\n" in run_trainer(flags(tmp_path / "all", loss_on="all")).stdout
    assert "counted" not in metric_rows(tmp_path / "all", "val")[0]


def test_killed_and_resumed_like_a_straight_run(tmp_path):
    """Catches a mask that a resume leaves out, and one that has changed since."""
    source = write_pairs(tmp_path / "pairs.jsonl")
    fineweb.main(["--source", str(source), "--out", str(tmp_path / "data"), "--shard_size", "150"])
    flags = partial(tiny_flags, tmp_path / "data", dropout=0.1, save_minutes=1e-6, val_tokens=64)
    assert run_trainer(flags(tmp_path / "straight")).returncode == 0
    assert run_trainer(flags(tmp_path / "log"), before=partial(strike, name="train_step", call=6)).returncode < 0
    bits = (mask := tmp_path / "data" / "pairs_train_000001.mask").read_bytes()
    mask.write_bytes(bits[:-9] + bytes([bits[-9] ^ 8]) + bits[-8:])
    assert mask.name in error_line(run_trainer(["--resume", "--log_dir", tmp_path / "log"]))
    mask.write_bytes(bits)
    assert "contradicts" in error_line(run_trainer(["--resume", "--log_dir", tmp_path / "log", "--loss_on", "all"]))
    assert run_trainer(["--resume", "--log_dir", tmp_path / "log"]).returncode == 0
    assert log_rows(tmp_path / "log") == log_rows(tmp_path / "straight")
    ours, expected = (GPT.from_checkpoint(tmp_path / name).state_dict() for name in ("log", "straight"))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_model_that_learned_the_pairs_answers_them(tmp_path):
    """Catches a loss on the wrong tokens: 200 answers, greedy, with the end of text after each, in the export too."""
    from transformers import GPT2LMHeadModel

    rng = random.Random(0)
    rows = [(f"{n:03d}?", "".join(rng.choices("abcdefgh", k=3))) for n in range(201)]  # a row of 8 tokens is a pair
    source = write_pairs(tmp_path / "pairs.jsonl", rows)
    train_gpt2.main(tiny_flags(
        source, tmp_path / "log", val_data=source, tokenizer="bytes", seq_len=8, total_batch_size=512, max_steps=200,
        micro_batch_size=64, n_embd=64, optimizer="muon", max_lr=2e-2, warmup_steps=10, val_every=0, save_minutes=0))
    model = GPT.from_checkpoint(tmp_path / "log").eval()
    encode, end = model.tokenizer.encode, model.tokenizer.end_of_text
    asked = torch.tensor([[end, *encode(question).tolist()] for question, _ in rows[:200]])
    expected = torch.tensor([[*encode(answer).tolist(), end] for _, answer in rows[:200]])
    assert torch.equal(model.generate(asked, 4, temperature=0)[:, 5:], expected)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "log" / "hf").eval()
    answers = theirs.generate(asked, do_sample=False, max_new_tokens=4, attention_mask=torch.ones_like(asked),
                              eos_token_id=None, pad_token_id=0)
    assert torch.equal(answers[:, 5:], expected)


def test_a_vocabulary_of_ones_own_holds_out_whole_pairs(tmp_path):
    """Catches pairs that are cut in two between training and validation, and prompts taken for completions after it."""
    train, _, own = text.find_splits(write_pairs(tmp_path / "a.jsonl"), None, tmp_path / "cache", vocabulary="bytes")
    parts = [stored(train[0][0].parent, split) for split in ("train", "val")]
    for now, expected in zip(zip(*parts), by_hand(own)):
        assert np.array_equal(np.concatenate(now), expected)
    assert parts[1][0][0] == own.end_of_text == 256


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}


@pytest.mark.parametrize("rows, said", [
    ([CHAT], ["my.jsonl", "`messages`", "`prompt`", "`completion`", ".messages[-1].content"]),
    ([{"prompt": "a", "completion": "b"}, CHAT], ["my.jsonl, line 2", "`messages`", "jq"]),
    ([{"prompt": "a", "completion": "b"}, {"completion": "b"}], ["my.jsonl, line 2 has no `prompt`"]),
    ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 4}], ["my.jsonl, line 2", "a float"]),
    ([{"prompt": "a", "completion": "b", "text": "ab"}], ["my.jsonl", "--text_column text", "'prompt, completion'"]),
    ([{"question": "a", "answer": "b"}], ["my.jsonl", "--text_column", "rename", "`prompt`", "`completion`"]),
])
def test_rows_that_are_no_pairs_are_named(tmp_path, rows, said):
    """Catches chats and half pairs that are trained on as something else, and a message without file and row."""
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as error:
        text.find_splits(path, None, tmp_path / "cache")
    assert all(words in str(error.value) for words in said), error.value


def test_the_sequence_length_that_fits_is_named(tmp_path):
    """Catches a message that names a file of the cache, and a length that does not do either."""
    source = write_pairs(tmp_path / "pairs.jsonl")
    said = error_line(run_trainer(tiny_flags(source, tmp_path / "log", seq_len=1024, total_batch_size=16384)))
    assert "pairs.jsonl" in said and "cache" not in said
    fit = int(said.split("give --seq_len ")[1].split(",")[0])
    assert 1 < fit < len(by_hand()[0]) // 10
    train_gpt2.main(tiny_flags(source, tmp_path / "log", seq_len=fit, total_batch_size=16384, max_steps=1))
    flags = tiny_flags(make_shards(tmp_path / "shards"), tmp_path / "other", text_column="prompt")
    assert "leave it out" in error_line(run_trainer(flags))
