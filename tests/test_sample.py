"""Sampling: the tokens of `GPT.generate` from cached keys and values, precision, characters as they come, prompts of
all kinds, the command."""

import io
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_hellaswag import bfloat16, shifted

import sample
import train_gpt2
from harness import tokenizer
from harness.cli import UserError, exit_status
from train_gpt2 import GPT, GPTConfig


def small_model(**changes):
    model = GPT(GPTConfig(**{"block_size": 24, "vocab_size": 300, "n_layer": 2, "n_head": 2, "n_embd": 32, **changes}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a small GPT-2 of full vocabulary."""
    path = tmp_path_factory.mktemp("model")
    small_model(vocab_size=tokenizer.VOCAB_SIZE).save_pretrained(path)
    return path


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 5, "temperature": 0.7}, {"top_p": 0.9}])
@pytest.mark.parametrize("length", [1, 7, 23, 24, 25, 40])
def test_tokens_are_those_of_generate(length, options):
    """Catches keys of the wrong place or row, a wrong position, other draws; up to, at and beyond the context; and a
    sampling that changes the draws of whoever calls it."""
    model, state = small_model(), torch.get_rng_state()
    idx = torch.randint(300, (3, length), generator=torch.Generator().manual_seed(length))

    def generator():
        return torch.Generator().manual_seed(3)

    expected = model.generate(idx, 30, generator=generator(), **options)[:, length:]
    tokens = list(sample.stream(model, idx, 30, generator=generator(), **options))
    assert [tuple(token.shape) for token in tokens] == [(3, 1)] * 30
    assert torch.equal(torch.cat(tokens, dim=1), expected) and torch.equal(torch.get_rng_state(), state)


def test_a_token_costs_one_token_within_the_context(monkeypatch):
    """Catches a cache that is filled and not used, and work beyond the last position's logits."""
    model, fed, scored = small_model(), [], []
    hidden, logits, head, heads = model.hidden, model.logits, model.centered_head, []
    monkeypatch.setattr(model, "hidden", lambda idx, **kw: (fed.append(idx.size(1)), hidden(idx, **kw))[1])
    monkeypatch.setattr(model, "logits", lambda h, w: (scored.append(len(h.flatten(0, -2))), logits(h, w))[1])
    monkeypatch.setattr(model, "centered_head", lambda: (heads.append(1), head())[1])
    list(sample.stream(model, torch.zeros(1, 10, dtype=torch.long), 20))
    assert fed == [10] + [1] * 14 + [24] * 5 and scored == [1] * 20
    assert heads == [1]  # it costs as much as several tokens of the 124M model


def logits_along(monkeypatch, holder, tokens, work):
    """The logits (len(tokens), B, V) that `work()` draws from when `holder.pick_token` returns `tokens` one by one."""
    seen, following = [], iter(tokens)

    def scripted(logits, *options):
        seen.append(logits)
        return next(following)

    with monkeypatch.context() as patch:
        patch.setattr(holder, "pick_token", scripted)
        work()
    return torch.stack(seen)


def test_logits_are_those_of_generate_in_bfloat16(monkeypatch):
    """Catches cached path that rounds elsewhere than the plain one under autocast: both near float32, up to and beyond
    the context; keys and values are kept in autocast's dtype."""
    model = shifted(small_model(), 100)
    idx = torch.randint(300, (3, 7), generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(300, (25, 3, 1), generator=torch.Generator().manual_seed(2))

    def generated():
        return logits_along(monkeypatch, train_gpt2, tokens, lambda: model.generate(idx, len(tokens)))

    exact = generated()
    with bfloat16():
        plain = generated()
        ours = logits_along(monkeypatch, sample, tokens, lambda: list(sample.stream(model, idx, len(tokens))))
        cache = sample.LayerCache(8)
        with torch.no_grad():
            model.hidden(idx, cache=[cache, sample.LayerCache(8)])
    assert exact.std() > 0.3
    for logits in (plain, ours):
        assert (logits.float() - exact).abs().mean() < 0.01 and (logits.float() - exact).abs().max() < 0.1
    assert torch.equal(ours[-7:], plain[-7:])  # beyond the context both do the same
    assert cache.keys.dtype == cache.values.dtype == torch.bfloat16


def test_characters_come_whole():
    """Catches a character of several tokens shown as replacement marks, and one that the end cuts off left out."""
    written = "a ü 日本語 🙂🙃 z"
    ids = tokenizer.gpt2().encode(written)
    assert len(ids) > len(written) - 2  # else no character was split
    text, pieces = sample.Text(tokenizer.gpt2_tokenizer()), []
    for id in ids:
        text.feed(id)
        pieces.append(text.take())
    assert "".join(pieces) == written and not any("\ufffd" in piece for piece in pieces)
    text.feed(tokenizer.gpt2().encode("🙂")[0])
    assert text.take() == "" and not text.done
    text.feed(tokenizer.END_OF_TEXT)
    assert text.take() == "\ufffd" and text.done
    text.feed(ids[0])
    assert text.take() == ""


def test_samples_stop_at_the_end_of_their_text_and_come_in_order(monkeypatch):
    """Catches text after <|endoftext|>, samples mixed up, and a first sample that is shown only when all are done."""
    encoding, end = tokenizer.gpt2(), tokenizer.END_OF_TEXT
    rows = [encoding.encode(" one two"), encoding.encode(" un deux trois")]
    steps = max(map(len, rows)) + 1
    rows = [(row + [end] + [999] * steps)[:steps] for row in rows]
    log = []

    def scripted(model, idx, **options):
        assert idx.tolist() == [[5, 6], [5, 6]] and options == {"max_new_tokens": 9}
        for step in range(steps + 5):  # the last ones are never asked for
            log.append(step)
            yield torch.tensor([[row[step]] for row in rows])

    monkeypatch.setattr(sample, "stream", scripted)
    sample.write_samples(small_model(vocab_size=50257), [5, 6], 2, log.append, echo="P", max_new_tokens=9)
    shown = "".join(x for x in log if isinstance(x, str))
    assert shown == "--- 1 of 2 ---\nP one two\n--- 2 of 2 ---\nP un deux trois\n"
    assert log.index(" one") < log.index(1) and log.count(steps) == 0


def test_prompts(tmp_path, monkeypatch, capsys):
    """Catches empty prompts, prompts beyond the context, files and standard input, and the newline an editor adds."""
    def encode(text):
        return sample.encode_prompt(text, tokenizer.gpt2_tokenizer(), 8)

    assert encode("") == [tokenizer.END_OF_TEXT]
    assert encode("Hello world") == [15496, 995]
    assert encode("<|endoftext|>Hello") == [tokenizer.END_OF_TEXT, 15496]
    assert capsys.readouterr().err == ""
    assert encode(" a" * 20) == [257] * 8
    assert "20 tokens: the last 8" in capsys.readouterr().err

    (tmp_path / "p q.txt").write_bytes("zwölf\n\n".encode())
    assert sample.read_prompt(f"@{tmp_path / 'p q.txt'}") == "zwölf\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert sample.read_prompt("-") == "from a pipe"
    assert sample.read_prompt("user@host") == "user@host"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufefffrom Windows"))
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbffrom Windows")
    assert sample.read_prompt("-") == sample.read_prompt(f"@{tmp_path / 'mark.txt'}") == "from Windows"
    with pytest.raises(UserError, match="gone.txt"):
        sample.read_prompt("@gone.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8 at byte 3"):
        sample.read_prompt(f"@{tmp_path / 'latin.txt'}")


def test_conversation_answers_each_line_and_outlives_a_stopped_answer(monkeypatch, capsys):
    """Catches Ctrl-C in an answer that ends the program, Ctrl-D that ends it in a traceback, and prompts added up."""
    asked = []

    def answer(prompt):
        asked.append(prompt)
        if prompt == "stop me":
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", io.StringIO("one\nstop me\n\nlast"))
    sample.converse(answer)
    assert asked == ["one", "stop me", "", "last"]


def test_command_streams_the_tokens_of_generate(folder, capsys, monkeypatch):
    """Catches the way from flags to text: echo, draws, number of tokens, and the same text for the same seed."""
    argv = ["--model", str(folder), "--max_new_tokens", "12", "--dtype", "float32", "--device", "cpu", "--seed", "7"]
    pieces = []
    monkeypatch.setattr(sample, "print", lambda *a, **kw: pieces.append((a, kw)), raising=False)
    assert sample.main([*argv, "--prompt", "Hello there", "--top_k", "40", "--top_p", "0.9"]) == 0
    shown = [a[0] for a, kw in pieces if "file" not in kw]
    assert all(kw == {"end": "", "flush": True} for a, kw in pieces if "file" not in kw)
    assert len([piece for piece in shown if piece]) > 6  # as they come, not at the end
    idx = torch.tensor([tokenizer.gpt2().encode("Hello there")])
    expected = GPT.from_pretrained(folder).eval().generate(
        idx, 12, top_k=40, top_p=0.9, generator=torch.Generator().manual_seed(7))
    ids = expected[0].tolist()
    assert tokenizer.END_OF_TEXT not in ids
    assert "".join(shown) == tokenizer.gpt2().decode(ids) + "\n"


def test_command_in_a_pipe(folder):
    """Catches the script itself: prompts by the line on standard input, an ASCII terminal, a reader that leaves."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}

    def command(*args, **options):
        line = [sys.executable, ROOT / "sample.py", "--model", folder, "--max_new_tokens", "9", *args]
        return subprocess.run([*map(str, line)], capture_output=True, env=environment, **options)

    done = command(input="zwölf 🙂\n\n".encode() + b"\xff\n")
    assert done.returncode == 0 and done.stdout.count(b"\n") >= 4, done.stderr
    shell = f"'{sys.executable}' '{ROOT / 'sample.py'}' --model '{folder}' --prompt x --max_new_tokens 90 | head -c 10"
    if sys.platform != "win32":
        done = subprocess.run(["bash", "-c", shell + "; exit ${PIPESTATUS[0]}"], capture_output=True)
        assert done.returncode == 141, done.stderr  # 128 + SIGPIPE, as of other programs
        assert len(done.stdout) == 10 and b"Traceback" not in done.stderr and b"Exception" not in done.stderr


def test_a_model_that_computes_nan_is_named(folder, tmp_path, capsys):
    """Catches a traceback for a run that has diverged, and token 0 drawn again and again."""
    model = GPT.from_pretrained(folder)
    model.transformer.wpe.weight.data[3] = math.nan
    model.save_pretrained(tmp_path)
    for temperature in ("0", "1"):
        assert exit_status(sample.main, ["--model", str(tmp_path), "--prompt", "x", "--temperature", temperature]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "logits that are not finite" in error and str(tmp_path) in error


@pytest.mark.parametrize(("flags", "complaint"), [
    (["--temperature", "-1"], "--temperature -1.0"), (["--temperature", "nan"], "--temperature nan"),
    (["--temperature", "1e-40"], "--temperature 1e-40"), (["--temperature", "1e40"], "--temperature 1e+40"),
    (["--top_p", "0"], "--top_p 0.0"), (["--top_p", "1.5"], "--top_p 1.5"), (["--top_k", "-1"], "--top_k -1"),
    (["--num_samples", "0"], "--num_samples 0"), (["--max_new_tokens", "0"], "--max_new_tokens 0"),
    (["--seed", "-3"], "--seed -3"), (["--prompt", "@gone.txt"], "gone.txt"), (["--model", "gpt9"], "gpt9"),
    (["--start", "Once"], "did you mean --prompt"),
])
def test_bad_flags_are_reported(flags, complaint, folder, capsys):
    """Catches a traceback, or silence, for a value that means nothing, and no hint at nanoGPT's names of flags."""
    assert exit_status(sample.main, ["--model", str(folder), "--prompt", "x", *flags]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


@pytest.mark.parametrize("temperature", ["0", "0.001", "1000"])
def test_temperatures_at_the_limits_draw(temperature, folder):
    """Catches logits divided by a temperature that overflow to nan."""
    assert sample.main(["--model", str(folder), "--prompt", "x", "--max_new_tokens", "3", "--temperature", temperature,
                        "--device", "cpu"]) == 0


def test_without_standard_input_it_ends(folder):
    """Catches a traceback of `sample.py <&-`, which has nothing to ask for prompts."""
    command = f"exec {sys.executable} sample.py --model {folder} --device cpu <&-"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr


@pytest.mark.parametrize("vocab_size", [65, 32_000, 50_258])
def test_other_vocabularies_are_reported(vocab_size, tmp_path, capsys):
    """Catches ids of another vocabulary shown as GPT-2's words, or the first id beyond them as a traceback."""
    small_model(vocab_size=vocab_size).save_pretrained(tmp_path)
    assert exit_status(sample.main, ["--model", str(tmp_path), "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert f"vocabulary of {vocab_size:,}" in error and error.count("\n") == 1


def test_before_any_training_it_says_what_to_run(tmp_path, monkeypatch, capsys):
    """Catches a newcomer's `python sample.py` answered with the names of weight files."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert exit_status(sample.main, ["--prompt", "x"]) == 2
        error = capsys.readouterr().err
        assert "run `python train_gpt2.py` first" in error and error.count("\n") == 1
        (tmp_path / "log").mkdir(exist_ok=True)
