"""The order of the data, batches against a ten-line loop, shard formats, and reading that is ahead and small."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, make_shards, metric_rows, tiny_flags

import train_gpt2
from harness.cli import UserError
from harness.device import DeviceCopies
from harness.runtime import Runtime
from harness.shards import Shards, find_shards, kind_of_data, shuffled
from train_gpt2 import DataLoaderLite

pytestmark = pytest.mark.quick

# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 255, 256, 257, 1000, 4095, 4096, 4097, 99991, 300000])
def test_order_is_a_bijection(n):
    """A sequence that is read twice in an epoch, or never."""
    read = shuffled(1337, 0, np.arange(n), n)
    assert read.dtype == np.int64 and np.array_equal(np.sort(read), np.arange(n))


def test_order_depends_on_seed_and_epoch_alone():
    """The same order every epoch; an order that depends on how many indices are asked for at once."""
    n = 5000
    first = shuffled(1, 0, np.arange(n), n)
    assert np.array_equal(np.concatenate([shuffled(1, 0, np.arange(i, i + 100), n) for i in range(0, n, 100)]), first)
    for other in (shuffled(1, 1, np.arange(n), n), shuffled(2, 0, np.arange(n), n)):
        assert (other == first).mean() < 0.01
    big = 10**13
    assert shuffled(1, 0, np.array([0, 1, big - 1]), big).max() < big


@pytest.mark.parametrize("n", [1000, 4096, 30011])
def test_order_looks_random(n):
    """An order with a pattern: neighbours that stay near, a drift, a period, one epoch like the next."""
    reads = np.stack([shuffled(7, epoch, np.arange(n), n) for epoch in range(20)]) / n  # about uniform on [0, 1)

    def correlation(a, b):
        return np.corrcoef(a, b)[0, 1] * np.sqrt(len(a))  # standard normal for independent ones

    for i, read in enumerate(reads):
        scores = [correlation(read[:-lag], read[lag:]) for lag in (1, 2, 3, 4, 8, 16, 32, 64, 128)]
        scores += [correlation(read, np.arange(n)), correlation(read, reads[i - 1])]
        scores += [correlation(read, np.arange(n) % p) for p in (2, 3, 4, 8, 16, 64)]
        assert max(map(abs, scores)) < 5, scores
        counts = np.histogram2d(np.arange(n), read, bins=10)[0]  # where each tenth of the epoch reads
        assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 81 + 6 * np.sqrt(2 * 81)
        spectrum = np.abs(np.fft.rfft(read - read.mean())[1:]) ** 2 / (n * read.var())
        assert spectrum.max() < np.log(n) + 12, "a wave in the order is a wave in the loss"
    spots = reads[:, n // 2] * 20  # one position over the epochs
    assert len(set(spots.astype(int))) > 8


# --- batches ---------------------------------------------------------------------------------------------------------


def by_hand(shards, T, seed, shuffle, positions):
    """What positions of the run read, in ten lines: (inputs, targets)."""
    sequences = [s[i * T : i * T + T + 1] for s in shards for i in range((len(s) - 1) // T)]
    N = len(sequences)
    rows = []
    for p in positions:
        i = int(shuffled(seed, p // N, np.array([p % N]), N)[0]) if shuffle else p % N
        rows.append(sequences[i].astype(np.int64))
    rows = torch.from_numpy(np.stack(rows))
    return rows[:, :-1], rows[:, 1:]


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_equal_a_plain_loop(tmp_path, shuffle):
    """Targets off by one, shards read in another order, the tail of a shard read or lost, over several epochs."""
    folder = make_shards(tmp_path, train=(161, 160, 16, 17, 500))  # 10, 9, none, 1 and 31 sequences of 16
    shards = [np.load(p) for p in sorted(folder.glob("*train*"))]
    loader = DataLoaderLite(folder, 4, 16, seed=11, shuffle=shuffle, ahead=3)
    assert len(loader.shards) == 51
    for batch in range(40):
        assert loader.position == 4 * batch
        x, y = loader.next_batch()
        due_x, due_y = by_hand(shards, 16, 11, shuffle, range(4 * batch, 4 * batch + 4))
        assert x.shape == y.shape == (4, 16) and x.dtype == y.dtype == torch.int64
        assert torch.equal(x, due_x) and torch.equal(y, due_y), batch
    loader.close()


@pytest.mark.parametrize(("W", "B"), [(1, 8), (1, 2), (2, 4), (4, 1), (8, 1)])
def test_a_step_is_the_same_for_every_world_size_and_micro_batch(tmp_path, W, B):
    """Ranks that read the same rows or leave some out: one step of 8 rows, at three steps."""
    folder = make_shards(tmp_path, train=(330,))
    shards = [np.load(p) for p in sorted(folder.glob("*train*"))]
    loaders = [DataLoaderLite(folder, B, 16, rank=r, world_size=W, seed=3) for r in range(W)]
    for step in range(3):
        rows = torch.cat([loader.next_batch()[0] for _ in range(8 // (W * B)) for loader in loaders])
        assert torch.equal(rows, by_hand(shards, 16, 3, True, range(8 * step, 8 * step + 8))[0])
        assert all(loader.position == 8 * (step + 1) for loader in loaders)
    for loader in loaders:
        loader.close()


def test_a_position_is_all_it_takes_to_resume(tmp_path):
    """A resumed loader that replays or skips what was read ahead, also after an epoch's end."""
    folder = make_shards(tmp_path, train=(400,))
    straight = DataLoaderLite(folder, 3, 16, ahead=4)
    batches = [straight.next_batch() for _ in range(25)]
    position = 0
    for i, (x, y) in enumerate(batches):
        if i % 4 == 0:  # a new loader, as after a kill
            loader = DataLoaderLite(folder, 3, 16, ahead=4, position=position)
        again_x, again_y = loader.next_batch()
        assert torch.equal(again_x, x) and torch.equal(again_y, y), i
        position = loader.position
        if i % 4 == 3:
            loader.close()
    straight.close()
    loader.close()


# --- formats ---------------------------------------------------------------------------------------------------------


def test_npy_llmc_and_nanogpt_hold_the_same_tokens(tmp_path):
    """A header read as tokens, or tokens as a header."""
    tokens = np.random.default_rng(0).integers(0, 50257, 1000, dtype=np.uint16)
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    for name, content in (("npy", None), ("llmc", header.tobytes()), ("nanogpt", b"")):
        (tmp_path / name).mkdir()
        if content is None:
            np.save(tmp_path / name / "fineweb_train_000001.npy", tokens)
        else:
            file = "train.bin" if name == "nanogpt" else "fineweb_train_000001.bin"
            (tmp_path / name / file).write_bytes(content + tokens.tobytes())
        read = Shards(find_shards(tmp_path / name, "train"), 16).read(range(62))
        assert np.array_equal(read[:, :-1].ravel(), tokens[:992]) and np.array_equal(read[:, -1], tokens[16:993:16])


@pytest.mark.parametrize("suffix", ["npy", "bin"])
def test_a_single_shard_keeps_its_last_tenth_for_validation(tmp_path, suffix):
    """Validation on tokens that are trained on; with validation data beside it, a tenth that is read by nobody."""
    tokens = np.arange(5000, dtype=np.uint16)
    file = tmp_path / f"some.{suffix}"
    np.save(file, tokens) if suffix == "npy" else file.write_bytes(tokens.tobytes())
    train, val = (Shards(find_shards(file, split), 10) for split in ("train", "val"))
    assert train.read([0])[0, 0] == 0 and train.read([len(train) - 1]).max() < 4500
    assert val.read([0])[0, 0] == 4500 and val.read([len(val) - 1]).max() == 4990
    whole = Shards(find_shards(file, "train", whole=True), 10)
    assert len(whole) == 499


def test_ids_beyond_the_vocabulary_are_told_when_read(tmp_path):
    """An id that indexes outside the embedding: a device-side assert, or padding trained in silence."""
    folder = make_shards(tmp_path, train=(2000,))
    file = folder / "toy_train_000001.npy"
    tokens = np.load(file)
    tokens[1600] = 50257  # the target of sequence 99 only, and the first input of sequence 100
    np.save(file, tokens)
    shards = Shards(find_shards(folder, "train"), 16)
    shards.read(range(99))
    for i in (99, 100):
        with pytest.raises(UserError, match=r"toy_train_000001\.npy.*50257.*50256"):
            shards.read([i])
    loader = DataLoaderLite(folder, 4, 16, shuffle=False)
    with pytest.raises(UserError, match="50257"):
        for _ in range(30):
            loader.next_batch()
    loader.close()


def test_a_shard_that_shrinks_is_told(tmp_path):
    """Zeros or another sequence's tokens in place of what is gone."""
    folder = make_shards(tmp_path, train=(2000,))
    shards = Shards(find_shards(folder, "train"), 16)
    os.truncate(folder / "toy_train_000001.npy", 2000)
    with pytest.raises(UserError, match="shorter"):
        shards.read([120])


# --- reading ahead ---------------------------------------------------------------------------------------------------


def test_slow_reads_overlap_and_run_ahead(tmp_path, monkeypatch):
    """Storage of 5 ms a read that stalls the device: reads one after the other, or issued when they are needed."""
    folder = make_shards(tmp_path, train=(40000,))
    gate, lock, running, most, started = threading.Event(), threading.Lock(), 0, 0, 0
    inner = Shards.read_at

    def slow(self, *args):
        nonlocal running, most, started
        with lock:
            running, started = running + 1, started + 1
            most = max(most, running)
        gate.wait(0.005)
        result = inner(self, *args)
        with lock:
            running -= 1
        return result

    monkeypatch.setattr(Shards, "read_at", slow)
    loader = DataLoaderLite(folder, 32, 16, ahead=4)
    batches = loader.batches(3)
    next(batches)
    for taken in (2, 3):  # with nobody asking, what is ahead gets read: one staged and 4 more of 32 rows
        next(batches)
        end = time.monotonic() + 4
        while started < (taken + 4) * 32 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)
        assert started == (taken + 4) * 32, "one micro-batch taken, one more issued: the lead is kept, does not grow"
    assert most >= 8, "several reads at a time"
    loader.close()


def test_the_next_batch_is_on_its_way_before_the_wait_of_an_update(tmp_path, monkeypatch):
    """A device that idles after every update until the next batch is read and sent."""
    loaders, ready = [], []
    stage, mean = DataLoaderLite._stage, Runtime.mean
    monkeypatch.setattr(DataLoaderLite, "_stage", lambda self: (loaders.append(self), stage(self))[1])
    # what `mean` takes has just been waited for
    monkeypatch.setattr(Runtime, "mean", lambda *args: (ready.append(loaders[-1]._staged is not None), mean(*args))[1])
    train_gpt2.main(tiny_flags(make_shards(tmp_path / "data"), tmp_path / "log", max_steps=3, val_every=0))
    assert ready == [True] * 3


def test_data_seconds_are_those_of_reads_that_are_late(tmp_path, monkeypatch):
    """A wait for the device, or for its queue of work, reported as one for the data."""
    on, data = {"max_steps": 4, "val_every": 0}, make_shards(tmp_path / "data")
    copy, read = DeviceCopies.__call__, Shards.read
    monkeypatch.setattr(DeviceCopies, "__call__", lambda *args: (time.sleep(0.05), copy(*args))[1])
    train_gpt2.main(tiny_flags(data, tmp_path / "device", **on))
    monkeypatch.setattr(Shards, "read", lambda *args: (time.sleep(0.2), read(*args))[1])
    train_gpt2.main(tiny_flags(data, tmp_path / "reads", **on))
    device, reads = ([row["data_seconds"] for row in metric_rows(tmp_path / name, "train")]
                     for name in ("device", "reads"))
    assert max(device[1:]) < 0.04 and max(reads) > 0.1


def test_batches_arrive_in_order_whatever_the_reads_take(tmp_path, monkeypatch):
    """A queue that hands out what is ready first."""
    folder, rng = make_shards(tmp_path, train=(5000,)), np.random.default_rng(0)
    inner, waits = Shards.read_at, iter(rng.random(10000) * 0.004)

    def uneven(self, *args):
        threading.Event().wait(next(waits))
        return inner(self, *args)

    monkeypatch.setattr(Shards, "read_at", uneven)
    shards = [np.load(p) for p in sorted(folder.glob("*train*"))]
    loader = DataLoaderLite(folder, 20, 16, seed=5, ahead=3)
    for batch in range(12):
        assert torch.equal(loader.next_batch()[0], by_hand(shards, 16, 5, True, range(20 * batch, 20 * batch + 20))[0])
    loader.close()


def test_without_positioned_reads_batches_are_the_same(tmp_path, monkeypatch):
    """Windows has no pread: two threads that move one handle's position under each other."""
    monkeypatch.delattr(os, "pread", raising=False)
    test_batches_equal_a_plain_loop(tmp_path, True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and relies on sparse files")
def test_memory_stays_flat_over_two_billion_tokens(tmp_path):
    """Memory or a start that grows with the data: an order table, mapped shards, a list of what was read."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 10**8
    for number in range(20):  # 4 GB that take no disk
        with open(tmp_path / f"sparse_train_{number:06d}.bin", "wb") as f:
            f.write(header.tobytes())
            f.truncate(1024 + 2 * 10**8)
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from train_gpt2 import DataLoaderLite
def resident():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmRSS"))
began = time.perf_counter()
loader = DataLoaderLite({str(tmp_path)!r}, 64, 1024, ahead=8)
loader.next_batch()
opening = time.perf_counter() - began
assert len(loader.shards) == 20 * 97656
for _ in range(20):
    loader.next_batch()
before = resident()
for _ in range(400):
    loader.next_batch()
loader.close()
print(resident() - before, opening)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, opening = map(float, done.stdout.split())
    assert grown < 24, "MiB more after 50 MB of tokens, read from all over 4 GB"
    assert opening < 1, "seconds until the first batch"


def test_too_little_data_is_told(tmp_path):
    """An empty epoch that divides by zero."""
    folder = make_shards(tmp_path, train=(16, 16))
    with pytest.raises(UserError, match="32 tokens.*16 . 1"):
        DataLoaderLite(folder, 2, 16)
    assert kind_of_data(folder) == "shards"
