"""Token shards: which files of a folder they are, what is refused as no tokens, and data that changes under a run."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, make_shards

from harness import fingerprints
from harness.cli import UserError
from harness.files import sha256
from harness.fingerprints import BackgroundHashes, compare_fingerprints
from harness.shards import Shards, find_shards, kind_of_data, split_of

pytestmark = pytest.mark.quick


def names(folder, split, **kwargs):
    return [file.name for file, _, _ in find_shards(folder, split, **kwargs)]


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, 50257, count, dtype=np.uint16)


# --- which files are the shards of a split ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "split"), [
    ("edufineweb_train_000001.npy", "train"), ("edufineweb_val_000000.npy", "val"),
    ("train.bin", "train"), ("val.bin", "val"),
    ("tiny_shakespeare_train.bin", "train"), ("TinyStories_val.bin", "val"), ("fineweb_train_000001.bin", "train"),
    ("train_val_000000.npy", "val"), ("train_train_000001.npy", "train"),
    ("val_val_000000.npy", "val"), ("val_train_000001.npy", "train"),
    ("train_val_val_000000.npy", "val"), ("train_val_train_000001.npy", "train"),
    ("val_train_val_000000.npy", "val"), ("val_train_train_000001.npy", "train"),
    ("train-val_val_000000.npy", "val"), ("train/000001.npy", "train"), ("val/000000.npy", "val"),
    ("train/edu_val_000000.npy", "val"), ("train-00000-of-00010.npy", "train"), ("train1.bin", "train"),
    ("restrained_000001.npy", None), ("interval.bin", None), ("tokens.npy", None),
])
def test_the_last_of_the_two_words_decides_the_split(name, split):
    """Catches training on the validation shard, which `--data train.txt` did: it makes train_val_000000.npy."""
    assert split_of(name) == split


def test_subfolders_are_searched_and_hidden_files_are_not(tmp_path):
    """Catches "no shards" for data/train/*.npy, macOS's `._x.npy` taken for a shard, an archive that joins the data."""
    make_shards(tmp_path / "a" / "train", train=(100, 100), val=(), name="x")
    make_shards(tmp_path / "a" / "val", train=(), val=(50,), name="x")
    for folder in (".download", "lost+found"):  # the latter is closed to users, at the top of many a disk
        make_shards(tmp_path / "a" / folder, train=(70,))
    (tmp_path / "a" / "train" / "._x_train_000000.npy").write_bytes(b"\0\5\x16\7")
    (tmp_path / "a" / "train" / "._notes.txt").write_bytes(b"\0\5\x16\7")
    assert kind_of_data(tmp_path / "a") == "shards"
    assert names(tmp_path / "a", "train") == ["x_train_000000.npy", "x_train_000001.npy"]
    assert names(tmp_path / "a", "val") == ["x_val_000000.npy"]
    make_shards(tmp_path / "b")
    make_shards(tmp_path / "b" / "old", name="old")
    assert names(tmp_path / "b", "train") == ["toy_train_000001.npy"]
    (tmp_path / "c" / "d").mkdir(parents=True)
    (tmp_path / "c" / "d" / "some.txt").write_text("text")
    assert kind_of_data(tmp_path / "c") == "text"


def test_a_broken_link_is_not_passed_over(tmp_path):
    """Catches a shard that is silently left out of the data."""
    make_shards(tmp_path)
    (tmp_path / "toy_train_000002.npy").symlink_to(tmp_path / "gone.npy")
    with pytest.raises(UserError, match=r"toy_train_000002\.npy cannot be read \(No such file"):
        find_shards(tmp_path, "train")


def test_a_stray_array_in_a_folder_of_text_is_named(tmp_path):
    """Catches a folder of text taken for shards because of one .npy, which ended in "has no train shards"."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some text")
    np.save(tmp_path / "embedding.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"holds text \(.*a\.txt\) and shards \(.*embedding\.npy\)"):
        kind_of_data(tmp_path)
    (tmp_path / "embedding.npy").unlink()
    assert kind_of_data(tmp_path) == "text"
    for name in ("train.bin", "val.bin"):  # nanoGPT keeps input.txt beside its shards
        (tmp_path / name).write_bytes(tokens(500).tobytes())
    assert kind_of_data(tmp_path) == "shards"


# --- files that hold no tokens ---------------------------------------------------------------------------------------


def refused(file, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        find_shards(file, "train")
    return str(caught.value)


def test_character_level_data_is_refused(tmp_path):
    """Catches nanoGPT's shakespeare_char trained as GPT-2 ids: the loss falls nicely. meta.pkl is never unpickled."""
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    rng = np.random.default_rng(0)
    for largest in (65, 256, 5000):  # English, bytes, Chinese
        for split, count in (("train", 100_000), ("val", 100)):
            (tmp_path / f"{split}.bin").write_bytes(rng.integers(0, largest, count, dtype=np.uint16).tobytes())
            refused(tmp_path / f"{split}.bin", r"meta\.pkl.*character-level.*input\.txt")
    (tmp_path / "train.bin").write_bytes(tokens(1000).tobytes())  # GPT-2's own, whatever lies beside it
    assert find_shards(tmp_path / "train.bin", "train", whole=True)[0][2] == 1000
    np.save(tmp_path / "val.npy", rng.integers(0, 65, 100, dtype=np.uint16))
    refused(tmp_path / "val.npy", "character-level")
    (tmp_path / "below").mkdir()
    (tmp_path / "val.npy").rename(tmp_path / "below" / "val.npy")
    refused(tmp_path / "below" / "val.npy", "character-level")
    (tmp_path / "meta.pkl").unlink()
    (tmp_path / "val.bin").write_bytes(np.zeros(1000, np.uint16).tobytes())  # small ids alone are no reason
    assert find_shards(tmp_path / "val.bin", "train", whole=True)[0][2] == 1000


@pytest.mark.parametrize("dtype", ["<u4", "<i8"])
def test_headerless_files_of_wide_ids_are_refused(tmp_path, dtype):
    """Catches 32-bit ids read as pairs of 16-bit ones, every second of which is "!"."""
    file = tmp_path / "train.bin"
    for high in (50_257, 128_000):
        file.write_bytes(np.random.default_rng(0).integers(0, high, 1000).astype(dtype).tobytes())
        refused(file, "ids of 32 or 64 bits, not uint16: convert")


@pytest.mark.parametrize("suffix", ["npy", "bin"])
def test_pointers_and_text_are_named_for_what_they_are(tmp_path, suffix):
    """Catches a Git LFS pointer or a text trained on, two letters a token, all of them ids of GPT-2's."""
    file = tmp_path / f"x_train_000001.{suffix}"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "a" + "\nsize 200000128\n")
    refused(file, "Git LFS pointer.*git lfs pull")
    file.write_text("To be, or not to be – that is the question.\n" * 3000)
    refused(file, "plain text" if suffix == "bin" else "no .npy file")


def test_no_false_alarm_on_real_tokens(tmp_path):
    """Catches a check of contents that refuses good data: GPT-2's tokens of the bundled text, from many starts."""
    from harness import tokenizer

    ids = np.array(tokenizer.gpt2().encode_ordinary((ROOT / "input.txt").read_text(encoding="utf-8")), np.uint16)
    (tmp_path / "meta.pkl").write_bytes(b"")
    file = tmp_path / "train.bin"
    for start in range(0, len(ids) - 2000, 7001):
        file.write_bytes(ids[start:].tobytes())
        assert find_shards(file, "train", whole=True)[0][2] == len(ids) - start


def test_array_headers_and_dtypes(tmp_path):
    """Catches a .npy of header 3.0 taken for damaged, and a wrong dtype that leaves the user alone."""
    file, ids = tmp_path / "x_train_000001.npy", tokens(300)
    for version in ((1, 0), (2, 0), (3, 0)):
        with open(file, "wb") as opened:
            np.lib.format.write_array(opened, ids, version)
        assert np.array_equal(Shards(find_shards(tmp_path, "train"), 299).read([0])[0], ids)
    for wrong in (ids.astype(np.int32), ids.astype(">u2"), ids.reshape(2, 150), ids.astype(np.float32)):
        np.save(file, wrong)
        said = refused(tmp_path, "one-dimensional uint16: convert .*astype")
        assert file.name in said and (str(wrong.dtype) in said or str(wrong.shape) in said)


# --- data that changes under a run -----------------------------------------------------------------------------------


def overwrite(file, offset, data):
    """Write into a file in place, later than everything before (file systems count time in steps of some ms)."""
    time.sleep(0.02)
    with open(file, "r+b") as opened:
        opened.seek(offset)
        opened.write(data)


def test_a_shard_changed_in_place_ends_the_run(tmp_path):
    """Catches training on a file that somebody overwrites: same size, valid ids, no word."""
    make_shards(tmp_path)
    data = Shards(find_shards(tmp_path, "train"), 16)
    data.read(range(100))
    overwrite(tmp_path / "toy_train_000001.npy", 9000, bytes(2000))
    with pytest.raises(UserError, match=r"toy_train_000001\.npy changed while it was in use.*--resume"):
        data.read([3])
    assert not Shards(find_shards(tmp_path, "train"), 16).read([300]).any(), "a new run reads what is there now"


def test_a_shard_replaced_or_deleted_does_no_harm(tmp_path):
    """Catches a traceback for a shard that is deleted before its first read, and a mix of two data sets."""
    make_shards(tmp_path / "a", train=(500, 500))
    make_shards(tmp_path / "b", train=(500, 500), seed=1)
    expected = Shards(find_shards(tmp_path / "a", "train"), 16).read(range(60))
    data = Shards(find_shards(tmp_path / "a", "train"), 16)
    (tmp_path / "b" / "toy_train_000001.npy").replace(tmp_path / "a" / "toy_train_000001.npy")
    (tmp_path / "a" / "toy_train_000002.npy").unlink()
    assert np.array_equal(data.read(range(60)), expected)
    found = find_shards(tmp_path / "b", "train")
    (tmp_path / "b" / "toy_train_000002.npy").unlink()
    with pytest.raises(UserError, match=r"toy_train_000002\.npy cannot be read \(No such file"):
        Shards(found, 16)


def test_more_shards_than_a_process_may_open_by_default(tmp_path):
    """Catches "Too many open files" at the limit that systems start with, and a traceback where it cannot be raised."""
    pytest.importorskip("resource")
    make_shards(tmp_path, train=(170,) * 100, val=())
    code = f"""
import resource
from harness.shards import Shards, find_shards
for limits in ((64, 4096), (64, 64)):
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    data = Shards(find_shards({str(tmp_path)!r}, "train"), 16)
    assert len(data.read(range(1000))) == 1000
    data.close()
    print(limits)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "(64, 4096)\n", "the first limit is raised"
    assert "Too many open files): " in done.stderr and "ulimit -n" in done.stderr and "assert" not in done.stderr


# --- fingerprints ----------------------------------------------------------------------------------------------------


OLD = [["a_train_1.npy", 100, 5], ["a_train_2.npy", 90, 6]]
NEW = [[*OLD[0], "aa"], [*OLD[1], "bb"]]
RENAMED = [["my_train_1.npy", *NEW[0][1:]], ["my_train_2.npy", *NEW[1][1:]]]


@pytest.mark.parametrize(("saved", "now", "difference"), [
    (OLD, OLD, None), (OLD, NEW, None), (NEW, OLD, None), (NEW, NEW, None),
    (NEW, RENAMED, None), (NEW, [entry[:3] for entry in RENAMED], None),  # the hash comes later
    (NEW, [NEW[0], [*OLD[1], "cc"]], "a_train_2.npy has other contents"),
    (OLD, [OLD[0], ["a_train_2.npy", 90, 7]], "a_train_2.npy has other contents"),
    (OLD, [OLD[0], ["a_train_2.npy", 91, 6]], "a_train_2.npy has other contents"),
    (NEW, [RENAMED[0], [*RENAMED[1][:3], "cc"]], "a_train_2.npy is missing"),
    (NEW, RENAMED[:1], "a_train_2.npy is missing"), (OLD[:1], OLD, "a_train_2.npy is new"),
    (OLD, OLD[::-1], "the shards are in another order"), (NEW, RENAMED[::-1], "the shards are in another order"),
])
def test_fingerprints_are_compared_in_the_form_that_both_have(saved, now, difference):
    """Catches old checkpoints that no longer resume, a hash that is there and not looked at, a resume that is refused
    because a text, a folder or a shard was renamed, and a name that is trusted."""
    assert compare_fingerprints(saved, now) == difference


def hashes(folder, cache, seconds=30, **splits):
    """What `BackgroundHashes` finds, and how many files it had to read."""
    time.sleep(0.06)  # a file that has only just changed is not noted in the cache
    data = splits or {split: Shards(find_shards(folder, split), 16) for split in ("train", "val")}
    background = BackgroundHashes(data, cache)
    result, read = background.wait(seconds), len(background._unknown)
    background.close()
    return result, read


def test_the_hash_is_that_of_the_whole_file_and_kept(tmp_path):
    """Catches a change between the ends that passes --resume, and 20 GB hashed at every start."""
    folder, cache = make_shards(tmp_path / "data", train=(200_000, 300)), tmp_path / "cache"
    first, read = hashes(folder, cache)
    assert read == 3 and {split: [entry[0] for entry in entries] for split, entries in first.items()} == {
        "train": ["toy_train_000001.npy", "toy_train_000002.npy"], "val": ["toy_val_000000.npy"]}
    for entry in first["train"] + first["val"]:
        assert entry[3] == sha256(folder / entry[0])
    assert hashes(folder, cache) == (first, 0)
    file = folder / "toy_train_000001.npy"
    overwrite(file, 200_000, bytes(1000))
    changed, read = hashes(folder, cache)
    assert read == 1 and compare_fingerprints(first["train"], changed["train"]) == f"{file.name} has other contents"
    assert compare_fingerprints([entry[:3] for entry in first["train"]], changed["train"]) is None, "ends are the same"
    stat = file.stat()
    overwrite(file, 200_000, bytes([1, 0] * 500))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p` and `rsync -t` do
    assert hashes(folder, cache)[1] == 1


@pytest.mark.parametrize("contents", ["", "[1]", '{"x": 3}', '{"x": "', "[" * 100_000])
def test_a_damaged_or_read_only_cache_costs_only_time(tmp_path, contents):
    """Catches a run that ends because of a file that only saves it time."""
    folder = make_shards(tmp_path / "data")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "shard_hashes.json").write_text(contents)
    first, read = hashes(folder, cache)
    assert read == 2 and hashes(folder, cache) == (first, 0)
    known = json.loads((cache / "shard_hashes.json").read_text())
    (cache / "shard_hashes.json").write_text(json.dumps(dict.fromkeys(known, 7)))
    assert hashes(folder, cache) == (first, 2)
    (tmp_path / "file").write_text("")
    assert hashes(folder, tmp_path / "file") == (first, 2)


def test_a_split_that_is_not_open_keeps_its_fingerprint(tmp_path):
    """Catches validation data that may be exchanged after one resume that does not validate."""
    folder = make_shards(tmp_path / "data")
    saved = hashes(folder, tmp_path / "cache")[0]
    data = {"train": Shards(find_shards(folder, "train"), 16), "val": None}
    background = BackgroundHashes(data, tmp_path / "cache", saved)
    assert background.wait(20) == saved and background.for_checkpoint() == saved
    background.close()


def test_of_a_touched_shard_its_contents_decide(tmp_path):
    """Catches a run that ends because a shard was touched, and one that goes on with a changed shard."""
    folder = make_shards(tmp_path / "data")
    data = {"train": Shards(find_shards(folder, "train"), 16), "val": Shards(find_shards(folder, "val"), 16)}
    hashes(folder, tmp_path / "cache", **data)
    expected = data["train"].read(range(50))
    for split in ("train", "val"):
        os.utime(data[split].shard_files[0][0])
        data[split].read([3])
    assert np.array_equal(data["train"].read(range(50)), expected)
    overwrite(folder / "toy_train_000001.npy", 9000, bytes(2000))
    with pytest.raises(UserError, match=r"toy_train_000001\.npy changed while it was in use"):
        data["train"].read([3])


def test_hashing_runs_in_the_background_and_stops_at_once(tmp_path, monkeypatch):
    """Catches a start that waits for hashes, an exit that waits for them, and a partial hash that is kept."""
    make_shards(tmp_path / "data")
    gate, read_at = threading.Event(), Shards.read_at
    data = Shards(find_shards(tmp_path / "data", "train"), 16)

    def slow(self, *args):
        if threading.current_thread().name == "hashes":
            gate.wait(20)
        return read_at(self, *args)

    monkeypatch.setattr(Shards, "read_at", slow)
    monkeypatch.setattr(fingerprints, "HASH_CHUNK", 4096)
    background = BackgroundHashes({"train": data, "val": None}, tmp_path / "cache")
    assert background.wait(0) is None and background.wait(0.01) is None
    assert len(data.read([0])) == 1, "training goes on meanwhile"
    threading.Timer(0.1, gate.set).start()
    background.close()
    assert background.wait(0) is None and not (tmp_path / "cache").exists()
    background = BackgroundHashes({"train": data, "val": None}, tmp_path / "cache")
    file = tmp_path / "data" / "toy_train_000001.npy"
    assert background.wait(20)["train"][0][3] == background.wait(0)["train"][0][3] == sha256(file)
    background.close()


def test_a_resume_compares_the_whole_files(tmp_path, monkeypatch):
    """Catches tokens overwritten in the middle of a shard that pass --resume, or the resume after a short one."""
    folder = make_shards(tmp_path / "data", train=(200_000,))
    data = {"train": Shards(find_shards(folder, "train"), 16), "val": None}
    saved = hashes(folder, tmp_path / "cache", **data)[0]
    assert saved["val"] is None
    overwrite(folder / "toy_train_000001.npy", 200_000, bytes(1000))
    data = {"train": Shards(find_shards(folder, "train"), 16), "val": Shards(find_shards(folder, "val"), 16)}
    assert compare_fingerprints(saved["train"], data["train"].fingerprint()) is None, "the ends do not show it"
    with monkeypatch.context() as patch:
        patch.setattr(BackgroundHashes, "_fingerprints", lambda self: None if self._closing.wait() else {})
        early = BackgroundHashes(data, tmp_path / "cache", saved)
        stored = early.for_checkpoint()
        assert stored == {"train": saved["train"], "val": data["val"].fingerprint()}
        early.close()
        early = BackgroundHashes(data, tmp_path / "cache")  # a new run
        assert early.for_checkpoint() == {split: shards.fingerprint() for split, shards in data.items()}
        early.close()
    for before in (saved, stored):
        background = BackgroundHashes(data, tmp_path / "cache", before)
        with pytest.raises(UserError, match=r"train data is not what .* toy_train_000001\.npy has other contents"):
            background.wait(20)
        with pytest.raises(UserError, match="other contents"):
            background.for_checkpoint()
        background.close()
    old = {"train": [entry[:3] for entry in saved["train"]], "val": None}
    background = BackgroundHashes(data, tmp_path / "cache", old)  # a checkpoint of an older version has ends only
    assert background.wait(20) == background.for_checkpoint()
    background.close()


def test_a_file_that_changes_while_it_is_hashed_is_reported(tmp_path):
    """Catches a hash of half the old and half the new bytes, and an error that stays in its thread."""
    make_shards(tmp_path / "data")
    data = Shards(find_shards(tmp_path / "data", "train"), 16)
    overwrite(tmp_path / "data" / "toy_train_000001.npy", 9000, bytes(2))
    background = BackgroundHashes({"train": data}, tmp_path / "cache")
    with pytest.raises(UserError, match="changed while it was in use"):
        background.wait(20)
    with pytest.raises(UserError, match="changed while it was in use"):
        background.wait(0)
    background.close()
    assert not Path(tmp_path / "cache").exists()
