"""The command line: flags, presets and their precedence, every mistake a user can make, and a bug."""

import io
import json
import os
import pickle
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, TRAINER, error_line, make_shards, run_trainer, tiny_flags

import train_gpt2
from harness import cli, plan
from harness.cli import UserError, exit_status
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig

pytestmark = pytest.mark.quick


def parse(*argv):
    return cli.parse_flags(TrainConfig, PRESETS, argv)


# --- flags -----------------------------------------------------------------------------------------------------------


def test_every_field_is_a_flag_in_both_spellings():
    """A field without its flag, or a flag that argparse turns into another type than the field's; `--resume` before
    another flag swallowing that flag, or no longer meaning the newest."""
    values = {bool: None, int: "7", float: "0.5", str: "text"}
    for f in fields(TrainConfig):
        kind = cli.value_type(f)
        choices = cli.choices_of(f)
        text = choices[-1] if choices else values[kind]
        for flag in (f"--{f.name}", f"--{f.name.replace('_', '-')}"):
            given = parse(flag) if text is None else parse(flag, text)
            assert list(given) == [f.name] and type(given[f.name]) is kind
    assert parse("--no-allow-incomplete", "--no_allow_incomplete") == {"allow_incomplete": False}
    assert parse("--sample-prompt=--a-b=c") == {"sample_prompt": "--a-b=c"}, "hyphens of a value are its own"
    assert parse("--sample-prompt", "--well-known fact") == {"sample_prompt": "--well-known fact"}
    assert parse("--no-compile", "--no-shuffle") == {"compile": False, "shuffle": False}
    assert parse() == {}, "a flag that is not given must not look given"
    assert parse("--resume", "--max_steps", "5") == {"resume": "newest", "max_steps": 5}
    assert parse("--resume", "auto") == {"resume": "auto"}


def test_a_preset_has_numbers_for_a_vocabulary():
    """Catches the numbers that were tuned for 4,096 tokens on a model with GPT-2's 50,257, and the other way round."""
    wishes = {}, {"tokenizer": "gpt2"}, {"model": "gpt2"}
    tiny, gpt2, named = (TrainConfig.from_preset("tiny", **asked) for asked in wishes)
    assert (tiny.tokenizer, tiny.n_embd, tiny.seq_len, tiny.max_steps) == ("4096", 192, 64, 300)
    assert (gpt2.tokenizer, gpt2.n_embd, gpt2.seq_len, gpt2.max_steps) == ("gpt2", 256, 256, 75)
    assert (named.tokenizer, named.n_embd, named.seq_len, named.max_steps) == ("gpt2", 768, 256, 75)
    assert TrainConfig.from_preset("tiny", tokenizer="bytes").n_embd == 192
    assert TrainConfig.from_preset("tiny", tokenizer="gpt2", n_embd=64).n_embd == 64


FIELDS = ("max_lr", "min_lr", "n_layer", "n_embd", "optimizer", "schedule", "warmup_steps", "epochs", "max_steps")
BASES = {  # of FIELDS, where nothing more is asked for
    "default": (6e-4, 6e-5, 12, 768, "adamw", "cosine", 715, None, 19073),
    "preset": (8e-3, 8e-4, 4, 256, "muon", "cosine", 5, None, 75),  # tiny, with GPT-2's vocabulary
    # a run of --preset tiny --tokenizer gpt2 --max_lr 4e-3 --n_layer 2 --warmup_steps 3 --epochs 2, which were 40 steps
    "record": (4e-3, 4e-4, 2, 256, "muon", "cosine", 3, 2.0, 40),
}
WISHES = {  # what is asked for on top: what changes by it in each of BASES
    ("max_lr", 1e-3): ({"max_lr": 1e-3, "min_lr": 1e-4},) * 3,
    ("model", "gpt2"): ({}, *({"n_layer": 12, "n_embd": 768, "max_lr": 4.5e-3, "min_lr": 4.5e-4},) * 2),
    ("model", "gpt2-medium"): ({"n_layer": 24, "n_embd": 1024, "max_lr": 3e-4, "min_lr": 3e-5},
                               *({"n_layer": 24, "n_embd": 1024, "max_lr": 4.5e-3, "min_lr": 4.5e-4},) * 2),
    ("optimizer", "adamw"): ({}, {"optimizer": "adamw", "max_lr": 6e-4, "min_lr": 6e-5},
                             {"optimizer": "adamw", "max_lr": 6e-4, "min_lr": 6e-5, "warmup_steps": 5}),
    ("optimizer", "muon"): ({"optimizer": "muon", "max_lr": 4.5e-3, "min_lr": 0.0, "schedule": "wsd",
                             "warmup_steps": 0}, {}, {}),
    ("epochs", 3.0): ({"epochs": 3.0}, {"epochs": 3.0}, {"epochs": 3.0, "max_steps": 75}),  # until the data is known
    ("max_steps", 50): ({"max_steps": 50, "warmup_steps": 5}, {"max_steps": 50}, {"epochs": None, "max_steps": 50}),
    ("warmup_steps", 7): ({"warmup_steps": 7},) * 3,
}
FIXED = {("model", "gpt2"), ("model", "gpt2-medium"), ("optimizer", "adamw")}  # on a resume


@pytest.mark.parametrize("wish", [None, *WISHES], ids=str)
def test_a_wish_has_one_meaning_wherever_it_is_asked(wish, tmp_path):
    """Catches a wish that is lost or means another thing in a preset, --config, a resume, Python or `replace`."""
    now = {wish[0]: wish[1]} if wish else {}
    changes = WISHES[wish] if wish else ({},) * 3
    default, preset, record = (dict(zip(FIELDS, base)) | change for base, change in zip(BASES.values(), changes))

    def check(cfg, due):
        near = {name: pytest.approx(v, rel=1e-12) if isinstance(v, float) else v for name, v in due.items()}
        assert {name: getattr(cfg, name) for name in FIELDS} == near

    check(TrainConfig(**now), default)
    check(replace(TrainConfig(), **now), default)
    tiny = TrainConfig(preset="tiny", tokenizer="gpt2", **now)
    check(tiny, preset)
    words = [str(word) for name, value in now.items() for word in (f"--{name}", value)]
    others = (TrainConfig.from_preset("tiny", tokenizer="gpt2", **now),
              replace(TrainConfig.from_preset("tiny", tokenizer="gpt2"), **now),
              replace(TrainConfig(**now), preset="tiny", tokenizer="gpt2"),
              cli.parse_args(TrainConfig, PRESETS, ["--preset", "tiny", "--tokenizer", "gpt2", *words], 0, ""))
    for other in others:
        assert other == tiny and other.asked == tiny.asked

    run = TrainConfig(preset="tiny", tokenizer="gpt2", max_lr=4e-3, n_layer=2, warmup_steps=3, epochs=2.0)
    values = asdict(plan.settle(run, max_steps=40, sample_prompt="First words"))
    for asked in (run.asked, None):  # None: of f510d01, which did not record it
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"config": values} | ({"asked": asked} if asked else {})))
        again = TrainConfig(config=str(path), **now)
        check(again, record)
        assert replace(TrainConfig(config=str(path)), **now) == again and again.sample_prompt == "First words"
        saved = {"train_config": values | {"asked": asked}, "step": 9, "world_size": 1, "micro_batch_size": 8}
        cfg = TrainConfig(resume="newest", log_dir=str(tmp_path / "log"), **now)
        if wish in FIXED:
            with pytest.raises(UserError, match="contradicts"):
                plan.resume_config(cfg, saved, tmp_path / "model.pt", 1)
        else:
            check(plan.resume_config(cfg, saved, tmp_path / "model.pt", 1), record)


def test_what_is_asked_in_python_is_known(tmp_path):
    """Catches a value that equals the default and is lost when `auto` takes a preset; a `replace` that is undone."""
    (tmp_path / "my.txt").write_text("text")
    for cfg in (TrainConfig(data=str(tmp_path / "my.txt"), seq_len=1024),
                replace(TrainConfig(data=str(tmp_path / "my.txt")), seq_len=1024)):
        found, _ = plan.resolve_preset(cfg, 1)
        assert (found.preset, found.seq_len, found.n_layer, found.total_batch_size) == ("tiny", 1024, 4, 1024)
        assert pickle.loads(pickle.dumps(found)).asked == found.asked == {**cfg.asked, "preset": "tiny"}
    medium = replace(TrainConfig.from_preset("tiny", max_lr=1e-3, n_layer=6), model="gpt2-medium")
    assert (medium.n_layer, medium.n_embd, medium.max_lr) == (6, 1024, 1e-3), "as flags: both were asked for"
    longer = replace(replace(medium, epochs=2.0), max_steps=7)
    assert (longer.epochs, longer.max_steps) == (None, 7)
    assert replace(medium, max_lr=None).max_lr == 4.5e-3, "None asks for nothing"
    with pytest.raises(UserError, match="--epochs 2.0 and --max_steps 7 both"):
        replace(medium, epochs=2.0, max_steps=7)


def test_a_default_that_is_edited_is_the_default(monkeypatch):
    """Catches a number at the top of the file that is overruled by a recipe, or that overrules a preset."""
    for name, value in {"min_lr": 1e-5, "n_layer": 6, "max_steps": 500, "optimizer": "muon"}.items():
        monkeypatch.setattr(TrainConfig.__dataclass_fields__[name], "default", value)
        monkeypatch.setattr(TrainConfig, name, value)
    cfg, tiny = TrainConfig(), TrainConfig(preset="tiny")
    assert (cfg.min_lr, cfg.n_layer, cfg.n_head, cfg.max_steps, cfg.max_lr) == (1e-5, 6, 12, 500, 4.5e-3)
    assert (tiny.min_lr, tiny.n_layer, tiny.max_steps) == (0.0, 4, 300)


def test_defaults_follow_the_model_and_the_optimizer():
    """A bigger model trained at the small one's rate; Muon at AdamW's rate, some seven times too low; a preset's Muon
    rate given to AdamW, or the other way round."""
    assert [TrainConfig(model=m).max_lr for m in train_gpt2.MODELS] == [6e-4, 3e-4, 2.5e-4, 2e-4]
    assert TrainConfig(max_lr=1e-2, min_lr=0.0).min_lr == 0.0
    assert TrainConfig(model="gpt2-xl", n_layer=2).n_layer == 2
    muon, adamw, tiny = TrainConfig(optimizer="muon"), TrainConfig(), TrainConfig.from_preset("tiny")
    names = ("max_lr", "min_lr", "warmup_steps", "schedule", "decay_fraction", "weight_decay")
    assert [getattr(muon, name) for name in names] == [4.5e-3, 0.0, 0, "wsd", 0.8, 0.28]
    assert [getattr(adamw, name) for name in names] == [6e-4, pytest.approx(6e-5), 715, "cosine", 0.2, 0.1]
    assert TrainConfig(optimizer="muon", max_lr=1e-2).min_lr == 0.0
    assert (tiny.optimizer, tiny.max_lr, tiny.schedule) == ("muon", 8e-3, "cosine")
    other = TrainConfig.from_preset("tiny", optimizer="adamw")
    assert (other.max_lr, other.min_lr, other.warmup_steps) == (6e-4, pytest.approx(6e-5), 10)
    tuned = TrainConfig.from_preset("finetune", optimizer="adamw")
    assert tuned.max_lr == TrainConfig.from_preset("finetune").max_lr == 1e-5, "the optimizer it had anyway"
    assert TrainConfig.from_preset("finetune", optimizer="muon").max_lr == 1e-5, "one rate suits both"
    assert TrainConfig.from_preset("finetune", model="gpt2-medium").max_lr == 1e-5, "it has no shape to replace"


@pytest.mark.parametrize("world_size", [1, 8])
def test_auto_preset_follows_the_data(tmp_path, monkeypatch, world_size):
    """`--preset auto` that trains a toy where the shards are, or the 124M model on a text, or says nothing."""
    def resolved(**given):
        cfg, notes = plan.resolve_preset(TrainConfig(**given), world_size)
        return cfg.preset, cfg.n_layer, " ".join(notes)

    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text("text")
    layers = PRESETS["tiny"]["n_layer"]
    preset, n_layer, said = resolved()
    assert (preset, n_layer) == ("tiny", layers) and "not there" in said and "fineweb.py" in said
    assert ("WARNING" in said) == (world_size > 1)
    assert resolved(data="input.txt", n_layer=3)[:2] == ("tiny", 3)
    folder = make_shards(tmp_path / "edu_fineweb10B")
    assert resolved()[:2] == ("gpt2", 12)
    manifest = {"format_version": 1, "source": "x", "name": "x", "revision": None, "shard_size": 100, "complete": False,
                "files": {f"{i}.npy": {"tokens": 9, "sha256": "0"} for i in range(37)}, "expected_shards": 100}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    preset, n_layer, said = resolved()
    assert (preset, n_layer) == ("tiny", layers) and "37 of 100 shards are there" in said
    assert resolved(allow_incomplete=True)[:2] == ("gpt2", 12)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "complete": True}))
    assert resolved()[:2] == ("gpt2", 12)
    assert resolved(data=str(folder))[:2] == ("tiny", layers), "few tokens: see test_plan.py"


def test_help_shows_all_flags_in_groups(capsys, monkeypatch):
    """A `%` or a default that breaks --help, a group lost."""
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit) as left:
        train_gpt2.main(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    groups = [f.metadata["group"] for f in fields(TrainConfig) if f.metadata["group"]]
    assert groups == ["run", "data", "model", "batch and length", "optimizer", "evaluation", "checkpoints", "machine",
                      "tracking"]
    at = [text.index(f"\n{group}:\n") for group in groups]
    assert at == sorted(at)
    text = " ".join(text.split())
    assert all(f"--{f.name}" in text for f in fields(TrainConfig))
    assert "[524288; tiny 1024; finetune 16384]" in text and "[0.95]" in text


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with good data, bad data of every kind, a pretrained model, and a log folder with an old run."""
    root = tmp_path_factory.mktemp("world")
    make_shards(root / "good")

    make_shards(root / "short_val", val=(10,))
    np.save(make_shards(root / "high_val") / "toy_val_000000.npy", np.full(2000, 65535, np.uint16))
    (root / "v2").mkdir()
    header = np.array([20240520, 2, 9000] + [0] * 253, "<i4")
    (root / "v2" / "a_train_1.bin").write_bytes(header.tobytes() + bytes(18000))
    (root / "empty").mkdir()
    make_shards(root / "only_train", val=())
    make_shards(root / "incomplete")
    (root / "incomplete" / "manifest.json").write_text(json.dumps({
        "format_version": 1, "source": "x", "name": "x", "revision": None, "shard_size": 100, "complete": False,
        "files": {"a_train_000001.npy": {"tokens": 9, "sha256": "0"}}, "expected_shards": 100}))
    (root / "empty.txt").write_text("")
    (root / "short.txt").write_text("To be, or not to be")
    (root / "latin.txt").write_bytes("Café, ".encode("latin-1") * 1000)
    (root / "image.png").write_bytes(b"\x89PNG")
    (root / "bad.jsonl").write_text('{"ctx": "no other key"}\n')
    GPT(GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8)).save_pretrained(root / "pretrained")
    (root / "log").mkdir()
    (root / "log" / "log.txt").write_text("0 val 10.9000\n")
    (root / "log" / "model_00009.pt").write_bytes(b"precious")
    return root


MISTAKES = {  # name: (changes to a good run, what the line must hold: the value, and the limit or the fix)
    "no data": ({"data": "{w}/nowhere"}, ["nowhere", "fineweb.py"]),
    "no validation data": ({"val_data": "{w}/nowhere"}, ["--val_data", "nowhere"]),
    "empty folder": ({"data": "{w}/empty"}, ["empty", ".npy"]),
    "data of an unknown kind": ({"data": "{w}/image.png"}, ["image.png", ".txt"]),
    "empty text": ({"data": "{w}/empty.txt"}, ["empty.txt"]),
    "short text": ({"data": "{w}/short.txt"}, ["too"]),
    "text that is not UTF-8": ({"data": "{w}/latin.txt"}, ["latin.txt", "UTF-8"]),
    "short validation shard": ({"data": "{w}/short_val"}, ["toy_val_000000.npy", "10 tokens"]),
    "validation ids beyond the vocabulary": ({"data": "{w}/high_val"}, ["65535", "50256", "toy_val_000000.npy"]),
    "llm.c of another version": ({"data": "{w}/v2"}, ["version 2", "version 1"]),
    "no validation split": ({"data": "{w}/only_train"}, ["val", "--val_data"]),
    "incomplete shards": ({"data": "{w}/incomplete"}, ["1 of 100", "--allow_incomplete"]),
    "gpt2 without its shards": ({"data": None}, ["edu_fineweb10B", "fineweb.py"]),
    "batch that is no multiple": ({"total_batch_size": 100}, ["100", "16", "96 or 112"]),
    "batch below one row": ({"total_batch_size": 8}, ["8", "take 16"]),
    "micro-batch that does not divide": ({"micro_batch_size": 3}, ["3", "8 rows", "2 or 4"]),
    "micro-batch beyond the batch": ({"micro_batch_size": 64}, ["64", "8 rows", "4 or 8"]),
    "heads that do not divide": ({"n_embd": 33}, ["33", "n_head 2", "1"]),
    "context beyond a pretrained one": ({"init_from": "{w}/pretrained", "seq_len": 32}, ["32", "16", "seq_len"]),
    "no such pretrained model": ({"init_from": "gpt5"}, ["gpt5", "gpt2"]),
    "pretrained file that is none": ({"init_from": "{w}/image.png"}, ["image.png"]),
    "negative steps": ({"max_steps": -1}, ["-1", "at least 1"]),
    "dropout of one": ({"dropout": 1.0}, ["1.0", "at most"]),
    "rate that is no number": ({"max_lr": "nan"}, ["nan", "finite"]),
    "minimum above the maximum": ({"min_lr": 1.0}, ["1", "0.001"]),
    "seed beyond 63 bits": ({"seed": 2**64}, [str(2**64), "64 bits"]),
    "word for a number": ({"n_layer": "two"}, ["two", "int"]),
    "abbreviated flag": ({"max_step": 5}, ["--max_step", "did you mean --max_steps", "--help"]),
    "another program's flag": ({"lr": 1e-3}, ["--lr", "--max_lr"]),
    "unknown preset": ({"preset": "huge"}, ["huge", "tiny"]),
    "unknown model": ({"model": "gpt3"}, ["gpt3", "gpt2-xl"]),
    "device that is not there": ({"device": "mps" if sys.platform != "darwin" else "cuda"}, ["--device auto"]),
    "benchmark that is not there": ({"hellaswag_every": 1, "hellaswag_path": "{w}/nowhere.jsonl"}, ["nowhere.jsonl"]),
    "benchmark of other rows": ({"hellaswag_every": 1, "hellaswag_path": "{w}/bad.jsonl"}, ["bad.jsonl"]),
    "log folder that is a file": ({"log_dir": "{w}/empty.txt"}, ["empty.txt", "--log_dir"]),
    "log folder below a file": ({"log_dir": "{w}/empty.txt/log"}, ["empty.txt", "--log_dir"]),
    "tracker that nobody knows": ({"tracker": "mlflow"}, ["mlflow", "trackio"]),
    "cache folder that is a file": ({"cache_dir": "{w}/empty.txt"}, ["--cache_dir", "empty.txt", "give another"]),
    "cache folder below a file": ({"cache_dir": "{w}/empty.txt/below"}, ["--cache_dir", "cannot be used"]),
    "nothing to resume": ({"resume": "newest", "log_dir": "{w}/fresh"}, ["fresh", "resume"]),
    "resume from nowhere": ({"resume": "{w}/nowhere.pt"}, ["nowhere.pt"]),
    "resume from one gone": ({"resume": "{w}/log/model_00003.pt"}, ["model_00003.pt", "give one of", "_00009.pt"]),
    "resume from a damaged folder": ({"resume": "{w}/log"}, ["log", "1 checkpoint"]),
    "resume from a text": ({"resume": "{w}/short.txt"}, ["short.txt", "not a checkpoint"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_loses_nothing(name, world, capsys, monkeypatch):
    """A mistake that ends in a traceback, is passed over in silence, or costs the run that the folder held."""
    monkeypatch.chdir(world / "empty")
    changes, words = MISTAKES[name]
    changes = {k: v.format(w=world) if isinstance(v, str) else v for k, v in changes.items()}
    before = {p: p.read_bytes() for p in (world / "log").rglob("*") if p.is_file() and p.name != ".lock"}
    late = name == "validation ids beyond the vocabulary"  # seen when they are read
    argv = tiny_flags(world / "good", world / ("late" if late else "log"), **{"cache_dir": world / "cache", **changes})
    assert exit_status(train_gpt2.main, argv) == 2
    err = capsys.readouterr().err.strip().splitlines()
    line = err[-1]
    assert "error: " in line and (len(err) == 1 or name == "resume from a damaged folder"), err
    for word in words:
        assert any(part.replace("\\", "") in line for part in word.split("|")), (word, line)
    assert {p: p.read_bytes() for p in (world / "log").rglob("*") if p.is_file() and p.name != ".lock"} == before
    assert not (world / "empty").exists() or not any((world / "empty").iterdir())
    assert not list((world / "cache").glob(".*")), "nothing half-made stays there"


def test_values_are_checked_from_python_too():
    """A notebook's config that is wrong and found out an hour later, or silently turned into something else."""
    for wrong in ({"n_layer": 2.0}, {"n_layer": True}, {"data": Path("x")}, {"compile": 1}, {"max_lr": "1e-3"},
                  {"no_such_field": 1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            TrainConfig.from_preset("tiny", **wrong)
    with pytest.raises(AttributeError):
        TrainConfig().seed = 3


@pytest.mark.parametrize(("changes", "warned"), [
    ({}, []), ({"warmup_steps": 10}, ["--warmup_steps 10"]), ({"max_steps": 5000}, ["71 times", "--epochs"]),
])
def test_a_length_that_is_hardly_intended_is_reported(world, changes, warned):
    """A rate that never gets up, or a text that is read a thousand times, found out only from the curves."""
    argv = tiny_flags(world / "good", world / "log", **changes)
    cfg = TrainConfig(**parse(*map(str, argv)))
    notes = plan.make_plan(cfg, 1, ROOT / "input.txt", None).notes
    warnings = " ".join(note for note in notes if "WARNING" in note)
    assert ("WARNING" in warnings) == bool(warned) and all(words in warnings for words in warned)


def test_the_bundled_text_is_found_from_any_folder(tmp_path, monkeypatch):
    """The default command, called from elsewhere, that misses a file nobody named; or one named that is replaced."""
    monkeypatch.chdir(tmp_path)
    cfg = TrainConfig.from_preset("auto", cache_dir=str(tmp_path / "cache"))
    planned = plan.make_plan(cfg, 1, ROOT / "input.txt", None)
    assert planned.cfg.data == str(ROOT / "input.txt")
    with pytest.raises(UserError, match="--data input.txt is not there"):
        cfg = TrainConfig.from_preset("tiny", data="input.txt")
        plan.make_plan(cfg, 1, ROOT / "input.txt", None)


# --- real processes --------------------------------------------------------------------------------------------------


def test_the_real_command_exits_2_with_one_line(tmp_path):
    """A mistake that `main` maps well, and the script as it is started does not."""
    done = subprocess.run([sys.executable, TRAINER, "--n_layer", "0"], capture_output=True, text=True, cwd=tmp_path)
    assert error_line(done) == "train_gpt2.py: error: --n_layer 0: it must be at least 1"
    assert not any(tmp_path.iterdir())


def _break_step(trainer):
    trainer.train_step = lambda *args: 1 / 0


def test_a_bug_stays_a_traceback(tmp_path):
    """A bug of the program dressed up as the user's mistake, or swallowed."""
    make_shards(tmp_path / "data")
    done = run_trainer(tiny_flags(tmp_path / "data", tmp_path / "log"), before=_break_step)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_importing_does_nothing(tmp_path):
    """A download, a read of argv, a CUDA query, a line printed or a heavy package loaded by a mere import."""
    code = f"""
import socket, sys
def refused(*a, **k): raise OSError("network at import")
socket.socket.connect = socket.getaddrinfo = refused
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["x", "--no-such-flag"]
import train_gpt2
heavy = {{"transformers", "datasets", "pyarrow", "matplotlib", "huggingface_hub", "wandb"}} & set(sys.modules)
assert not heavy, heavy
for name in {sorted(p.stem for p in ROOT.glob("*.py"))!r}:
    __import__(name)
import torch
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert not torch.are_deterministic_algorithms_enabled()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not any(tmp_path.iterdir())


def test_an_error_is_one_line_whatever_it_quotes(monkeypatch):
    """A path with a line break in it that breaks the one line in two."""
    error = UserError("a path\nwith\r\nline breaks")
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)

    def fail():
        raise error

    assert exit_status(fail) == 2 and stream.getvalue().count("\n") == 1


def test_compiled_kernels_are_kept_in_the_cache_folder(tmp_path):
    """Catches the second start against compiling anew (torch's own folder is lost when /tmp is emptied), one dtype's
    run against the graphs of another's, which torch 2.11 and 2.12 take for its own."""
    code = ("import os, torch; from harness.runtime import Runtime\n"
            "for dtype in ('float32', 'bfloat16'):\n"
            "    Runtime().choose('cpu', dtype, compile=True, deterministic=True)\n"
            "    print(torch.compiler.config.cache_key_tag)\n"
            "from torch._inductor.runtime.cache_dir_utils import cache_dir; print(cache_dir())\n"
            "import torch._inductor.config; print(torch._inductor.config.deterministic, torch.__version__)")
    env = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    env["XDG_CACHE_HOME"] = str(tmp_path)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    *tags, folder, deterministic, version = result.stdout.split()
    assert tags == ["float32", "bfloat16"] and deterministic == "True"
    assert folder == str(tmp_path / "train_gpt2" / "inductor" / f"torch{version.split('+')[0]}-float32")
