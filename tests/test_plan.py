"""What a run is going to do: small shards, prompts from the data, a run repeated from its record, evaluation alone."""

import itertools
import json
import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, log_rows, make_shards, metric_rows, tiny_flags

import train_gpt2
from harness import cli, plan, tokenizer
from harness.cli import UserError
from harness.shards import find_shards
from train_gpt2 import GPT, GPTConfig, TrainConfig


@pytest.fixture(scope="module")
def run_a(tmp_path_factory):
    """A folder with `data` and `log_a`, a run of 4 steps on it."""
    root = tmp_path_factory.mktemp("plan")
    make_shards(root / "data")
    train_gpt2.main(tiny_flags(root / "data", root / "log_a", max_steps=4, max_lr=2e-3, seed=5, seq_len=32))
    return root


def main(*argv):
    return train_gpt2.main([str(word) for word in argv])


# --- defaults by the data --------------------------------------------------------------------------------------------


def test_small_shards_get_the_tiny_preset(tmp_path):
    """Catches half a year of the 124M model on a few million tokens, which `--data my_shards` used to start."""
    def resolved(**given):
        cfg, notes = plan.resolve_preset(TrainConfig(**given), 1)
        return cfg.preset, " ".join(notes)

    folder = make_shards(tmp_path / "few", train=(2_000_000, 1_200_000), val=(60_000_000,))
    preset, said = resolved(data=str(folder))
    assert preset == "tiny" and "3,200,000 tokens" in said and "--preset gpt2" in said
    assert resolved(data=str(folder / "toy_train_000001.npy"))[0] == "tiny"
    for name in ("a_train_1.npy", "a_train_2.npy"):
        np.lib.format.open_memmap(tmp_path / name, "w+", np.uint16, (25_000_000,)).flush()  # sparse
    preset, said = resolved(data=str(tmp_path))
    assert preset == "gpt2" and "--preset" not in said
    assert plan.resolve_preset(TrainConfig.from_preset("gpt2", data=str(folder)), 1)[0].n_layer == 12


@pytest.mark.parametrize(("text", "words"), [
    ("<|endoftext|>Once upon a time there was a cat, and more", "Once upon a time there was"),
    ("<|endoftext|>\n\nCRAKE:\nWho is there?\n", "CRAKE:\n"),
    ("<|endoftext|>One.<|endoftext|>Two.", "One."),
    ("iddle of a word\nRosalind:\nWell, this is the forest.\n", "Rosalind:\n"),
    (" no line ends here at all, nowhere", "no line ends here at all,"),
    ("<|endoftext|>" + "猫" * 100, "猫" * 80),
    ("<|endoftext|>  \n ", ""),
])
def test_samples_begin_with_the_first_words_of_the_validation_split(text, words, tmp_path):
    """Catches samples of my own text that begin with a character of the bundled plays."""
    ids = tokenizer.gpt2().encode(text, allowed_special="all")
    np.save(tmp_path / "a_val_0.npy", np.array(ids, np.uint16))
    (part,) = find_shards(tmp_path, "val")
    assert plan.first_words(part, tokenizer.gpt2_tokenizer()) == words


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_shard_without_a_sequence_stops_nothing(tmp_path, tokens):
    """Catches a division by zero where the first shard, torn or made so, has no input and target."""
    folder = make_shards(tmp_path / "data", train=(tokens, 9000), val=(tokens, 2000))
    main(*tiny_flags(folder, tmp_path / "log", preset="tiny", max_steps=1, sample_every=1, num_samples=1))
    assert (tmp_path / "log" / "model_00001.pt").exists()


def test_the_prompt_of_each_preset(run_a, capsys):
    """Catches GPT-2's customary prompt in the gpt2 run, the data's words elsewhere, and a prompt that was given."""
    assert TrainConfig.from_preset("gpt2").sample_prompt == "Hello, I'm a language model,"
    assert TrainConfig.from_preset("tiny").sample_prompt is TrainConfig.from_preset("finetune").sample_prompt is None
    lines = "".join(f"Line {i} of mine is here.\n" for i in range(300))
    (run_a / "my.txt").write_text(lines)
    for given, begins in (({}, "Line 2"), ({"sample_prompt": "Given"}, "Given")):  # of 300 lines, the last tenth
        argv = tiny_flags(run_a / "my.txt", run_a / "log_mine", preset="tiny", max_steps=1, sample_every=1,
                          num_samples=1, sample_tokens=2, **given)
        main(*argv)
        (text,) = metric_rows(run_a / "log_mine", "sample")[-1]["texts"]
        assert text.startswith(begins)


# --- a run repeated from its record ----------------------------------------------------------------------------------


def test_config_repeats_a_run(run_a):
    """Catches `--config`: the same losses to the last digit, and the old run's folder left alone."""
    before = {p: p.read_bytes() for p in (run_a / "log_a").rglob("*") if p.is_file()}
    main("--config", run_a / "log_a" / "config.json", "--log_dir", run_a / "log_b")
    assert log_rows(run_a / "log_b") == log_rows(run_a / "log_a")
    assert {p: p.read_bytes() for p in (run_a / "log_a").rglob("*") if p.is_file()} == before
    changes = ["--max_steps", 6, "--max_lr", 1e-3]
    main("--config", run_a / "log_a" / "config.json", "--log_dir", run_a / "log_c", *changes)
    config = json.loads((run_a / "log_c" / "config.json").read_text())["config"]
    assert (config["max_steps"], config["max_lr"], config["seed"], config["seq_len"]) == (6, 1e-3, 5, 32)
    assert config["min_lr"] == pytest.approx(1e-4), "it follows --max_lr, as it did in the run"


def test_what_config_takes_and_refuses(run_a, tmp_path):
    """Catches a log folder, a resume or an evaluation that is repeated unasked, and two answers to one question."""
    path = run_a / "log_a" / "config.json"
    record = json.loads(path.read_text())
    record["config"] |= {"log_dir": "elsewhere", "resume": "newest", "eval_only": True, "profile": 3, "epochs": 2.0,
                         "of_another_version": 1, "sample_prompt": "Old words"}
    other = tmp_path / "config.json"
    other.write_text(json.dumps(record))
    cfg = TrainConfig.from_preset(config=str(other))
    assert (cfg.log_dir, cfg.resume, cfg.eval_only, cfg.profile, cfg.epochs) == ("log", None, False, 0, 2.0)
    assert (cfg.sample_prompt, cfg.seed, cfg.config) == ("Old words", 5, str(other))
    cfg = TrainConfig.from_preset(config=str(other), data="new.txt", max_steps=7)
    assert (cfg.sample_prompt, cfg.epochs, cfg.max_steps) == (None, None, 7)
    cfg = TrainConfig.from_preset(config=str(other), optimizer="muon")
    assert (cfg.max_lr, cfg.schedule, cfg.weight_decay) == (4.5e-3, "wsd", 0.28)
    for argv in (["--preset", "tiny"], ["--resume"]):
        with pytest.raises(UserError, match=f"{argv[0]} .*leave one out"):
            main("--config", other, *argv)
    with pytest.raises(UserError, match="both set the length"):
        main("--config", other, "--epochs", 1, "--max_steps", 5)
    for text in ("", "[]", "{}", '{"config": 3}', '{"config": {"n_layer": "two"}}'):
        other.write_text(text)
        with pytest.raises(UserError, match="--config .*config.json"):
            main("--config", other)
    with pytest.raises(UserError, match="--config .*nowhere.*No such file"):
        main("--config", tmp_path / "nowhere")


def test_a_config_in_python_takes_flags_too(run_a, monkeypatch, capsys):
    """Catches the README's my_run.py: `python my_run.py --resume` used to start anew without a word."""
    script = run_a / "my_run.py"
    recipe = [*map(str, tiny_flags(run_a / "data", run_a / "log_e", max_steps=2))]
    script.write_text("import sys\n\nimport train_gpt2\n\n"
                      f"RUN = {recipe!r}\n\n"
                      'if __name__ == "__main__":\n'
                      "    sys.exit(train_gpt2.exit_status(train_gpt2.main, RUN + sys.argv[1:]))\n")
    for flags, said in (([], "2 steps of 128"), (["--resume"], "nothing left to train"),
                        (["--resume", "--max_steps", "3"], "done: 3 steps")):
        monkeypatch.setattr("sys.argv", [str(script), *flags])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(script), run_name="__main__")
        assert left.value.code == 0 and said in capsys.readouterr().out
    assert not (run_a / "log_e" / "archive").exists()


# --- length ----------------------------------------------------------------------------------------------------------


def planned(**given):
    given = {"cache_dir": str(Path(given["data"]).parent / "cache"), "val_every": 0, "hellaswag_every": 0, **given}
    return plan.make_plan(TrainConfig(**given), 1, None, train_gpt2.TrainState)


@pytest.mark.parametrize("given, steps, warmup", [
    ({"max_steps": 100}, 100, 10),
    ({"max_tokens": 25_600.4}, 200, 20),  # 128 a step
    ({"epochs": 2.0}, 140, 14),  # of 8,960 tokens in sequences of 16
    ({"epochs": 2.0, "warmup_steps": 3}, 140, 3),
    ({"epochs": 1e-6}, 1, 0),
    ({"max_tokens": 2e6, "optimizer": "muon"}, 15_625, 0),
    ({"max_tokens": 2e6}, 15_625, 715),
])
def test_a_length_in_any_unit_sets_the_steps_and_the_warm_up(run_a, given, steps, warmup):
    """Catches a unit that is off by a factor, and AdamW's warm-up of 715 steps in a run that has not so many."""
    cfg = planned(preset="gpt2", data=str(run_a / "data"), seq_len=16, total_batch_size=128, n_embd=12, **given).cfg
    assert (cfg.max_steps, cfg.warmup_steps) == (steps, warmup)


def test_two_lengths_are_refused_and_a_later_one_replaces_an_earlier():
    """Catches one of two lengths that wins in silence."""
    names = {"max_steps": 5, "epochs": 2.0, "max_tokens": 1e6, "minutes": 3.0}
    for one, other in itertools.combinations(names, 2):
        with pytest.raises(UserError, match=f"(?=.*--{one} {names[one]})(?=.*--{other} {names[other]})"):
            TrainConfig(**{one: names[one], other: names[other]})
        changed = replace(TrainConfig(**{one: names[one]}), **{other: names[other]})
        assert changed.asked == {other: names[other]}


def test_a_text_without_a_length_is_read_twice(tmp_path):
    """Catches 75 steps of one's own text, however long it is; and another length of the bundled one."""
    (tmp_path / "my.txt").write_text("A line of mine.\n" * 6000)
    (tmp_path / "long.txt").write_text("A line of mine.\n" * 250_000)
    mine = planned(data=str(tmp_path / "my.txt"))
    assert mine.cfg.max_steps == round(2 * plan.tokens_in(mine.train_files, 64) / 1024) > 20
    (said,) = [note for note in mine.notes if "none of --epochs" in note]
    assert f"{mine.cfg.max_steps} steps" in said and "--max_steps" in said and "1,000" in said
    assert planned(data=str(tmp_path / "long.txt"), preset="tiny").cfg.max_steps == 1000
    assert planned(data=str(tmp_path / "my.txt"), max_steps=7).cfg.max_steps == 7
    bundled = (ROOT / "input.txt").read_bytes()
    for data, steps in ((bundled, 300), (bundled[:-1] + b"!", 346)):  # by its contents, wherever it lies
        (tmp_path / "input.txt").write_bytes(data)
        assert planned(data=str(tmp_path / "input.txt"), preset="tiny").cfg.max_steps == steps


def test_minutes_are_a_number_of_steps_like_any_other(run_a, monkeypatch, capsys):
    """Catches a timing that changes the model, and a run by the clock that a resume or --config would end elsewhere."""
    monkeypatch.setattr(train_gpt2, "steps_in", lambda *args, inner=train_gpt2.steps_in: (6, inner(*args)[1]))
    clock = itertools.count()
    monkeypatch.setattr("harness.ranks.Ranks.clock", lambda self: float(next(clock)))
    flags = {"max_steps": None, "dropout": 0.1, "val_every": 3, "warmup_steps": None}
    main(*tiny_flags(run_a / "data", run_a / "log_m", minutes=0.5, **flags))
    said = capsys.readouterr().out
    # a clock that ticks a second a look: ten passes in 1 s, two micro-steps, a validation in 1 s at steps 0, 3, ... end
    assert "0.5 minutes are enough for 52 steps: 0.2 s each, a validation 1 s" in said and "6 steps of 128" in said
    main(*tiny_flags(run_a / "data", run_a / "log_s", **flags | {"max_steps": 6}))
    assert log_rows(run_a / "log_m") == log_rows(run_a / "log_s")
    config = json.loads((run_a / "log_m" / "config.json").read_text())["config"]
    assert (config["max_steps"], config["minutes"]) == (6, 0.5)
    monkeypatch.setattr(train_gpt2, "steps_in", None)  # never again
    main("--resume", "--log_dir", run_a / "log_m", "--minutes", 0.5)
    assert "nothing left to train" in capsys.readouterr().out
    main("--config", run_a / "log_m" / "config.json", "--log_dir", run_a / "log_n")
    assert log_rows(run_a / "log_m") == log_rows(run_a / "log_n")
    with pytest.raises(UserError, match="--minutes 2.0 contradicts .*0.5"):
        main("--resume", "--log_dir", run_a / "log_m", "--minutes", 2)


# --- what a resume changes -------------------------------------------------------------------------------------------


def test_what_a_resume_changes_is_said_and_kept(run_a, capsys):
    """Catches a config.json that has the last values of a run as if they had been there from its start."""
    folder = run_a / "log_h"
    shutil.copytree(run_a / "log_a", folder)
    main("--resume", "--log_dir", folder, "--max_steps", 6, "--max_lr", 1e-3)
    said = capsys.readouterr().out
    for words in ("--max_lr 0.002 to 0.001", "--min_lr 0.0002 to 0.0001", "--max_steps 4 to 6", "at step 4"):
        assert words in said
    main("--resume", "--log_dir", folder, "--max_steps", 6, "--schedule", "wsd", "--max_steps", 7)
    changes = [{"step": 4, "max_steps": [4, 6], "max_lr": [2e-3, 1e-3], "min_lr": [2e-4, 1e-4]},
               {"step": 6, "max_steps": [6, 7], "schedule": ["cosine", "wsd"]}]
    for change in changes:
        for name, values in change.items():
            change[name] = pytest.approx(values) if name.endswith("lr") else values
    assert json.loads((folder / "config.json").read_text())["changes"] == changes
    rows = [{k: v for k, v in row.items() if k != "kind"} for row in metric_rows(folder, "config")]
    assert rows == changes
    capsys.readouterr()
    main("--resume", "--log_dir", folder)
    assert "changed" not in capsys.readouterr().out and len(metric_rows(folder, "config")) == 2
    main("--resume", folder / "model_00004.pt", "--log_dir", folder)  # back to before both
    assert json.loads((folder / "config.json").read_text())["changes"] == metric_rows(folder, "config") == []
    main("--resume", "--log_dir", folder, "--max_steps", 5)
    capsys.readouterr()
    main("--config", folder / "config.json", "--log_dir", run_a / "log_i", "--max_steps", 2)
    assert "that run changed --max_steps 4 to 5 at step 4" in capsys.readouterr().out
    assert json.loads((run_a / "log_i" / "config.json").read_text())["changes"] == []


def test_a_length_below_what_is_done_is_refused(run_a):
    """Catches `--resume --epochs` that calls a run done which has fewer steps than it made."""
    before = {p: p.read_bytes() for p in (run_a / "log_a").rglob("*") if p.is_file()}
    for name, value in (("max_steps", 3), ("epochs", 0.04), ("max_tokens", 300.0)):
        with pytest.raises(UserError, match=f"--{name} {value} ends at step .*has 4 updates already"):
            main("--resume", "--log_dir", run_a / "log_a", f"--{name}", value)
    assert {p: p.read_bytes() for p in (run_a / "log_a").rglob("*") if p.is_file()} == before


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """Catches `--log_dir=~/x`, which a shell leaves as it is, as a folder named ~ in the working folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in sorted(plan.PATHS - {"config", "resume"}):
        assert getattr(TrainConfig(**{name: "~/x"}), name) == str(tmp_path / "x")
    (tmp_path / "config.json").write_text(json.dumps({"config": {"data": "~/y", "sample_prompt": "~/z"}}))
    cfg = cli.parse_args(TrainConfig, train_gpt2.PRESETS, ["--config=~/config.json", "--log_dir=~/x"], 0, "")
    parser = cli.Parser()
    for name in ("--out", "--prompt"):  # of any command
        parser.add_argument(name)
    assert vars(parser.parse_args(["--out=~/x", "--prompt=~/x"])) == {"out": str(tmp_path / "x"), "prompt": "~/x"}
    assert (cfg.data, cfg.log_dir, cfg.sample_prompt) == (str(tmp_path / "y"), str(tmp_path / "x"), "~/z")


# --- evaluation alone ------------------------------------------------------------------------------------------------


def validation_loss(*argv):
    cfg = cli.parse_args(TrainConfig, train_gpt2.PRESETS, [str(word) for word in argv], 0, "")
    history = train_gpt2.train(cfg)
    (loss,) = history["val"][1]
    return loss


def test_eval_only_takes_the_models_context_and_data(run_a, monkeypatch, capsys):
    """Catches `--eval_only --init_from log_a` on other data, or at another context, than the model was trained with."""
    monkeypatch.chdir(run_a)
    due = float(log_rows(run_a / "log_a")[-1][2])
    device = ["--device", "cpu", "--dtype", "float32"]
    for source in ("log_a", "log_a/model_00004.pt"):
        loss = validation_loss("--eval_only", "--init_from", source)
        assert loss == pytest.approx(due, abs=1e-4)
    out = capsys.readouterr().out
    assert "log_a/model_00004.pt, after 4 updates" in out and "validation on 160 tokens" in out
    assert re.search(r"step     4 \| validation loss: \d+\.\d+ \(\d+\.\d{4} bits per byte\)", out)
    make_shards(run_a / "others", high=100)
    other = validation_loss("--eval_only", "--init_from", "log_a", "--data", "others")
    assert abs(other - due) > 1e-3
    with pytest.raises(UserError, match="--seq_len 64 is beyond the context of log_a.*, 32"):
        validation_loss("--eval_only", "--init_from", "log_a", "--seq_len", 64)
    GPT(GPTConfig(block_size=20, n_layer=1, n_head=1, n_embd=8)).save_pretrained(run_a / "folder")
    validation_loss("--eval_only", "--init_from", "folder", "--data", "others", "--no-compile",
                    "--hellaswag_every", 0, *device)
    assert "validation on 1,980 tokens, the whole split" in capsys.readouterr().out  # rows of 20
    assert not Path("log").exists()
