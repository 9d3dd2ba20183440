"""What was asked for, or lies there already, is heard or refused: flags beside other flags, files of the user's, texts
and weights that are not what their name says. Each case was once silent."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import ROOT, make_shards, metric_rows, tiny_flags

import convert
import curves
import fineweb
import sample
import train_gpt2
from harness import folders, tokenizer
from harness.cli import UserError
from harness.runlog import diverged
from harness.text import prepare_text

PLAY = (ROOT / "input.txt").read_text(encoding="utf-8")
STORY = "".join(f"The {i}th day was as long as the {i * 7 % 100}th, and nobody said so.\n" for i in range(400))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with shards and a run of 4 updates on them; `init_from` of the others."""
    home = tmp_path_factory.mktemp("home")
    make_shards(home / "data", train=(9000, 7000))
    train_gpt2.main(flags(home, "run"))
    return home


def flags(home, name, **changes):
    return tiny_flags(home / "data", home / name, **{"max_steps": 4, "val_every": 2, "checkpoint_every": 2, **changes})


def run(home, name, capsys, **changes):
    """The output of a run."""
    train_gpt2.main(flags(home, name, **changes))
    return capsys.readouterr().out


def resumed(home, name, capsys, *argv):
    train_gpt2.main(["--resume", "--log_dir", str(home / name), *map(str, argv)])
    return capsys.readouterr().out


# --- files of the user's ----------------------------------------------------------------------------------------------


def test_fineweb_leaves_the_users_files(tmp_path):
    """Catches a tokenizer.json in --out that is replaced or deleted, and hidden files taken for our own left-overs."""
    (tmp_path / "a.txt").write_text(STORY)
    own = tokenizer.learn([STORY], 300).json
    for argv in (["--tokenizer", "out/tokenizer.json"], ["--train_tokenizer", "300"], []):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        (out / "tokenizer.json").write_text(own)
        argv = [str(tmp_path / word) if word.startswith("out") else word for word in argv]
        with pytest.raises(UserError, match="holds tokenizer.json, but no manifest"):
            fineweb.main(["--source", str(tmp_path / "a.txt"), "--out", str(out), "--shard_size", "500", *argv])
        assert (out / "tokenizer.json").read_text() == own
    (out / "tokenizer.json").unlink()
    kept = [out / ".notes.20251130.tmp", tmp_path / "cache" / ".backup.making"]
    gone = [out / ".manifest.json.0123abcd.tmp", out / ".a_train_000001.npy.0123abcd.tmp"]
    kept[1].mkdir(parents=True)
    for file in (kept[0], *gone):
        file.write_text("mine")
    fineweb.main(["--source", str(tmp_path / "a.txt"), "--out", str(out), "--shard_size", "500"])
    prepare_text(tmp_path / "a.txt", tmp_path / "cache")
    assert all(path.exists() for path in kept) and not any(path.exists() for path in gone)


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "generation_config.json", "tokenizer_config.json"])
def test_convert_replaces_nothing(name, home, tmp_path):
    """Catches files of a tokenizer that are deleted or replaced where a model is written."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"already contains a {name}"):
        convert.main([str(home / "run"), str(tmp_path)])


def test_a_checkout_and_a_hub_cache_are_nobodys_log(home, tmp_path):
    """Catches `--log_dir .` beside folders called code/ and hf/, which went to the archive."""
    for name, file in (("a", "code/train_gpt2.py"), ("b", "hf/hub/weights.bin"), ("c", "code/.git/HEAD")):
        (tmp_path / name / file).parent.mkdir(parents=True)
        (tmp_path / name / file).write_text("mine")
        with pytest.raises(UserError, match="which no run of this program wrote"):
            train_gpt2.main(flags(home, tmp_path / name))
        assert (tmp_path / name / file).read_text() == "mine"


def test_a_folder_for_both_is_refused(home):
    """Catches a traceback of the lock where --cache_dir and --log_dir are one folder."""
    with pytest.raises(UserError, match="--cache_dir and --log_dir are both"):
        train_gpt2.main(flags(home, "one", cache_dir=home / "one"))


# --- texts ------------------------------------------------------------------------------------------------------------


def test_validation_data_of_a_hub_folder_is_its_validation_split(tmp_path):
    """Catches a run that validates on the train files of the folder that --val_data names."""
    for split, words in (("train", "seen"), ("validation", "held out"), ("test", "later")):
        (tmp_path / f"{split}-00000-of-00001.txt").write_text(words)
    texts, notes = folders.find_texts(tmp_path, ("validation", "val", "test"))
    assert [text.name for text in texts] == ["validation-00000-of-00001.txt"] and "split validation of" in notes[0]
    assert [text.name for text in folders.find_texts(tmp_path)[0]] == ["train-00000-of-00001.txt"]
    (tmp_path / "validation-00000-of-00001.txt").rename(tmp_path / "unseen-00000-of-00001.txt")
    (tmp_path / "test-00000-of-00001.txt").unlink()
    assert [text.name for text in folders.find_texts(tmp_path, ("validation", "val"))[0]] == [
        "unseen-00000-of-00001.txt"]
    with pytest.raises(UserError, match="--split test chooses among the files of a folder"):
        folders.find_texts(texts[0], "test")


def test_a_text_that_is_there_twice(home, tmp_path, capsys):
    """Catches documents in both splits: the same file given twice, validation text inside the training text."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text(PLAY[:20_000])
    (corpus / "held.txt").write_text(PLAY[20_000:30_000])
    with pytest.raises(UserError, match="is given twice"):
        fineweb.main(["--source", str(corpus), str(corpus / "a.txt"), "--out", str(tmp_path / "out")])
    for data, val, overlaps in ((corpus, corpus / "held.txt", True), (corpus / "a.txt", corpus / "a.txt", True),
                                (corpus / "a.txt", corpus / "held.txt", False)):
        text = run(home, "twice", capsys, data=data, val_data=val, cache_dir=tmp_path / "cache")
        assert ("the validation loss says nothing about new text" in text) == overlaps


def test_a_column_of_the_training_data_alone(home, tmp_path, capsys):
    """Catches --text_column refused for the sake of a --val_data that is plain text."""
    rows = [json.dumps({"body": line, "id": "x"}) for line in STORY.splitlines()]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "b.txt").write_text(STORY)
    assert "done:" in run(home, "column", capsys, data=tmp_path / "a.jsonl", val_data=tmp_path / "b.txt",
                          text_column="body", cache_dir=tmp_path / "cache")


def test_a_lost_shard_is_noticed(home, tmp_path):
    """Catches a run on what is left of a folder whose manifest calls it complete."""
    (tmp_path / "a.txt").write_text(STORY)
    fineweb.main(["--source", str(tmp_path / "a.txt"), "--out", str(tmp_path / "s"), "--shard_size", "1000"])
    lost = sorted((tmp_path / "s").glob("*_train_*"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name} is missing or torn.*--allow_incomplete"):
        train_gpt2.main(flags(home, "lost", data=tmp_path / "s"))
    train_gpt2.main([*flags(home, "lost", data=tmp_path / "s"), "--allow_incomplete"])
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    del manifest["files"][lost.name]
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest))
    next((tmp_path / "s").glob("*_val_*")).unlink()
    train_gpt2.main(flags(home, "lost", data=tmp_path / "s", val_data=home / "data"))  # the lost one is not read


def test_why_a_table_gives_no_text(home, tmp_path):
    """Catches "give a longer text" for pairs without completions, and two line numbers for one broken line."""
    for row, why in (({"prompt": "a", "completion": None}, "0 tokens and 9 rows without text"),
                     ('{"text": "a\tb"}', "line 1: Invalid control character at column 12")):
        (tmp_path / "a.jsonl").write_text("\n".join([row if isinstance(row, str) else json.dumps(row)] * 9))
        with pytest.raises(UserError, match=why):
            train_gpt2.main(flags(home, "table", data=tmp_path / "a.jsonl", cache_dir=tmp_path / "cache"))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_a_shape_or_vocabulary_beside_weights(home):
    """Catches --n_layer and the like that --init_from silently overrules, in a run and in an evaluation."""
    source = str(home / "run")
    for changes in ({"n_layer": 5}, {"n_embd": 64}, {"n_layer": None, "n_embd": None, "n_head": None,
                                                      "model": "gpt2-medium"}):
        with pytest.raises(UserError, match=f"--{list(changes)[-1]} .*contradicts .*: leave it out"):
            train_gpt2.main(flags(home, "tuned", **{"init_from": source, **changes}))
    for argv in (["--n_layer", "7"], ["--tokenizer", "bytes"]):
        with pytest.raises(UserError, match=f"{argv[0]} {argv[1]} contradicts .*leave it out"):
            train_gpt2.main(["--eval_only", "--init_from", source, *argv])


def test_an_evaluation_is_of_the_log_folder(home, monkeypatch, capsys):
    """Catches `--eval_only --log_dir LOG` that scores random weights."""
    train_gpt2.main(["--eval_only", "--log_dir", str(home / "run")])
    assert f"{metric_rows(home / 'run', 'val')[-1]['loss']:.4f}" in capsys.readouterr().out
    with pytest.raises(UserError, match="name a model with --init_from"):
        train_gpt2.main(["--eval_only", "--log_dir", str(home / "nothing")])


def test_weights_in_the_folder_of_the_run_itself(home):
    """Catches a fine-tuning command that, given twice, fine-tunes what it has fine-tuned."""
    shape = dict.fromkeys(("n_layer", "n_head", "n_embd"))
    for source in (home / "run", home / "run" / "hf", home / "run" / "model_00002.pt"):
        with pytest.raises(UserError, match="lies in --log_dir"):
            train_gpt2.main(flags(home, "run", init_from=source, **shape))
    train_gpt2.main(flags(home, "", init_from=home / "run", cache_dir=home / "cache", **shape))  # below, and it stays
    assert (home / "run" / "hf").exists()


def test_a_fine_tuned_model_that_only_got_worse_is_called_so(home, capsys):
    """Catches hf/ of a worse model than the one it began from, beside "best validation loss"."""
    text = run(home, "worse", capsys, init_from=home / "run", n_layer=None, n_head=None, n_embd=None, max_lr=0.5,
               min_lr=0.5)
    assert "no validation was better than that of the weights it began from; hf/ is the last model" in text
    first = metric_rows(home / "worse", "start")[0]
    assert len(first["weights_sha256"]) == 64  # by which --versus knows what it began from


def test_the_best_is_of_the_text_that_validates_now(home, capsys):
    """Catches best.pt that is never written again, since a resume validates on more tokens, whose loss is higher."""
    weights = {"init_from": home / "run", "n_layer": None, "n_head": None, "n_embd": None, "val_tokens": 64}
    run(home, "best", capsys, **weights)
    resumed(home, "best", capsys, "--val_tokens", 1600, "--max_steps", 8)
    now = [row["loss"] for row in metric_rows(home / "best", "val") if row["step"] > 4]
    assert torch.load(home / "best" / "best.pt", weights_only=True)["val_loss"] == min(now)


def test_a_loss_that_is_not_finite_is_not_shared(home, tmp_path, capsys):
    """Catches "share:" without a word for a model that computes nan, and a model card that says nan."""
    text = run(home, "nan", capsys, max_lr=1e20, min_lr=1e19, warmup_steps=0, optimizer="adamw")
    assert "is a Hugging Face folder (of a run whose loss is not finite)" in text and "\nmore:" not in text
    assert "nan" not in convert.model_card({"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "vocab_size": 9},
                                           100, 4, {"val_loss": math.nan})


def test_weights_of_other_text_do_not_diverge():
    """Catches a fine-tuning run that is called diverging since it begins above the loss of a guess, and falls."""
    assert diverged([11.68, 11.67, 11.66, 11.65, 11.64], math.inf, 4096) is None
    assert diverged([11.68, 11.9, 12.9, 13.4, 14.0, 14.8], math.inf, 4096) and diverged([9.0] * 30, 7.9, 4096)


# --- flags ------------------------------------------------------------------------------------------------------------


def test_a_resume_may_leave_validation_out(home, capsys):
    """Catches a traceback after the last update of a resume with --val_every 0, and a loss of another step."""
    run(home, "no_val", capsys)
    text = resumed(home, "no_val", capsys, "--max_steps", 6, "--val_every", 0)
    assert "done: 6 steps" in text and "bits per byte" not in text.partition("done:")[2]


def test_a_run_of_minutes_can_be_made_longer(home, capsys):
    """Catches the command that such a run suggests, refused for a --minutes that nobody gave."""
    text = run(home, "timed", capsys, max_steps=None, minutes=0.01)
    steps = int(text.rpartition("--max_steps ")[2].split()[0])
    assert f"done: {steps} steps" in resumed(home, "timed", capsys, "--max_steps", steps)


def test_a_requeued_command_with_its_tokenizer_goes_on(home, tmp_path, capsys):
    """Catches --tokenizer refused by its name on a resume, and another file of the same name accepted."""
    (tmp_path / "a.txt").write_text(STORY)
    fineweb.main(["--source", str(tmp_path / "a.txt"), "--out", str(tmp_path / "s"), "--shard_size", "2000",
                  "--train_tokenizer", "300"])
    own = tmp_path / "own.json"
    own.write_bytes((tmp_path / "s" / "tokenizer.json").read_bytes())
    for name, choice in (("number", "300"), ("file", own)):
        again = flags(home, name, data=tmp_path / "s", tokenizer=choice)
        train_gpt2.main([*again, "--resume", "auto"])
        train_gpt2.main([*again, "--resume", "auto"])
        assert "done: 4 steps" in capsys.readouterr().out
    own.write_text(tokenizer.learn([STORY[::-1]], 290).json)
    with pytest.raises(UserError, match="contradicts"):
        train_gpt2.main([*again, "--resume", "auto"])


def test_flags_that_change_nothing_are_named(home, capsys):
    """Catches a file of HellaSwag, a prompt or a decay that is given and never used."""
    text = run(home, "unused", capsys, hellaswag_path="nowhere.jsonl", decay_fraction=0.5, num_samples=2)
    for flag, why in (("hellaswag_path", "hellaswag_every is 0"), ("decay_fraction", "schedule is cosine"),
                      ("num_samples", "sample_every is 0")):
        assert f"note: --{flag} changes nothing, since --{why}" in text


def test_a_path_without_its_flag(home):
    """Catches `sample.py log` answered without the flag that takes it."""
    for main, flag in ((sample.main, "--model"), (train_gpt2.main, "--data")):
        with pytest.raises(UserError, match=f"did you mean {flag} {home}"):
            main([str(home)])


def test_the_callers_random_numbers_stay(home, capsys):
    """Catches dropout's seeds left in the generator of a notebook that calls train()."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(home, "guest", capsys, dropout=0.1)
    assert torch.equal(torch.rand(3), expected)


# --- runs compared ----------------------------------------------------------------------------------------------------


def test_runs_are_compared_by_contents(home, capsys):
    """Catches runs on other data under the same name, or of other code, taken for runs that differ in their seeds."""
    (known,), _ = curves._runs([home / "run"])
    assert known.settings()["data"].startswith("of SHA-256") and known.log["config"]["code_sha256"]
    run(home, "same", capsys)
    data = home / "data"
    data.rename(home / "first")
    make_shards(data, train=(9000, 7000), seed=1)
    run(home, "other", capsys)
    (again, other), _ = curves._runs([home / "same", home / "other"])
    assert not curves.differences([known.settings(), again.settings()])
    assert set(curves.differences([known.settings(), other.settings()])) == {"data", "val_data"}
    other.log["config"]["code_sha256"] = "0" * 64
    assert "code" in curves.differences([known.settings(), other.settings()])

    wide = make_shards(home / "wide", train=(100_000,))
    run(home, "wide_before", capsys, data=wide)
    tokens = np.load(wide / "toy_train_000001.npy")
    tokens[50_000] ^= 1  # between the ends
    np.save(wide / "toy_train_000001.npy", tokens)
    run(home, "wide_after", capsys, data=wide)
    pair, _ = curves._runs([home / "wide_before", home / "wide_after"])
    assert set(curves.differences([of_run.settings() for of_run in pair])) == {"data"}


def test_a_model_in_log_is_sampled_whatever_its_form(home, tmp_path, monkeypatch, capsys):
    """Catches "there is no model in log/" where log/ is a Hugging Face folder."""
    convert.main([str(home / "run"), str(tmp_path / "log")])
    monkeypatch.chdir(tmp_path)
    assert sample.main(["--prompt", "x", "--max_new_tokens", "1", "--device", "cpu"]) == 0
