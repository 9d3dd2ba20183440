"""Weights in and out, against transformers and other programs' files; models that are no longer GPT-2."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT
from test_checkpoint import content, same
from test_fineweb import Hub
from torch.nn import functional as F

import convert
from harness import tokenizer
from harness.cli import UserError
from train_gpt2 import GPT, MLP, GPTConfig

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 548118077\n"
SMALL = GPTConfig(block_size=8, vocab_size=65, n_layer=2, n_head=2, n_embd=8)


def noisy(model, scale=0.1, seed=0):
    """`model` with every parameter, biases and gains too, moved by N(0, `scale`), so that none can be left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * scale)
        if isinstance(model, GPT):
            model.transformer.wte.weight[model.config.vocab_size :] = 0.0  # padding
    return model.eval()


def checkpoint(shape=SMALL, **changes):
    """The content of a checkpoint of ours."""
    return content(**{"model": noisy(GPT(shape)).state_dict(), "config": asdict(shape), **changes})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`(folder, model)`: a small GPT-2 of full vocabulary, written by `save_pretrained`."""
    folder = tmp_path_factory.mktemp("exported")
    model = noisy(GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32)))
    model.save_pretrained(folder)
    return folder, model


# transformers --------------------------------------------------------------------------------------------------
SHAPES = {"gpt2": (12, 12), "gpt2-medium": (2, 16), "gpt2-large": (2, 20), "gpt2-xl": (2, 25)}  # layers, heads


def write_huggingface(model, folder, layout):
    """Write transformers' `model` in one of the `layout`s that are about in the world."""
    model.save_pretrained(folder, max_shard_size="20MB" if layout == "sharded" else "5GB")
    if layout != "bare":
        return
    tensors = {name.removeprefix("transformer."): t for name, t in model.transformer.state_dict().items()}
    context = model.config.n_positions
    for layer in range(model.config.n_layer):  # the hub's own files carry the causal mask, and no head
        tensors[f"h.{layer}.attn.bias"] = torch.ones(context, context).tril().view(1, 1, context, context)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    (folder / "model.safetensors").unlink()
    if model.config.n_head == 16:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        from safetensors.torch import save_file

        save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(("name", "layout"), [
    ("gpt2", "prefixed"), ("gpt2", "bare"), ("gpt2-medium", "bare"), ("gpt2-large", "sharded"), ("gpt2-xl", "bare"),
])
def test_logits_and_greedy_tokens_are_those_of_transformers(name, layout, tmp_path):
    """Catches a weight that is not transposed, a layout not known, a padded row exported, cache and crop off by one.

    The four numbers of heads at an eighth or so of their width; 64 tokens run over the context of 72 by their end.
    """
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    from sample import stream

    n_layer, n_head = SHAPES[name]
    torch.manual_seed(1)
    config = GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=8 * n_head, n_positions=72)
    theirs = noisy(GPT2LMHeadModel(config), 0.05)
    write_huggingface(theirs, tmp_path / "in", layout)
    assert (layout == "sharded") == (tmp_path / "in" / "model.safetensors.index.json").exists()

    ours = GPT.from_pretrained(tmp_path / "in").eval()
    ours.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(50257, (2, 72))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids)[0] - expected).abs().max() < 1e-4
        assert (again(ids).logits - expected).abs().max() < 1e-4
    assert again.transformer.wte.weight.shape == (50257, 8 * n_head)
    assert again.lm_head.weight is again.transformer.wte.weight

    prompt = ids[:1, :8]
    greedy = again.generate(prompt, do_sample=False, max_new_tokens=64, min_new_tokens=64,
                            attention_mask=torch.ones_like(prompt), eos_token_id=None, pad_token_id=0)
    assert len(set(greedy[0].tolist())) > 10  # else the tokens would say little
    assert torch.equal(greedy, ours.generate(prompt, 64, temperature=0))
    assert torch.equal(greedy[:, 8:], torch.cat(list(stream(ours, prompt, 64, temperature=0)), dim=1))


def test_exported_folder_opens_as_tokenizer_and_pipeline(exported):
    """Catches tokenizer and generation files that transformers does not take, and bf16 or dropout left in a config."""
    from transformers import AutoTokenizer, pipeline

    folder, model = exported
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "vocab.json", "merges.txt",
        "tokenizer_config.json", "README.md",
    }
    theirs, ours = AutoTokenizer.from_pretrained(folder), tokenizer.gpt2()
    for text in ("Hello  world, it's 2024\n\n\tnaïve 日本 🙂 of the", "a<|endoftext|>b", ""):
        assert theirs.encode(text) == ours.encode(text, allowed_special="all")
        assert theirs.decode(theirs.encode(text)) == text
    assert theirs.eos_token_id == 50256 and len(theirs) == 50257 and theirs.model_max_length == 64
    speaker = pipeline("text-generation", str(folder))
    assert speaker.model.dtype == torch.float32 and speaker.model.config.eos_token_id == 50256
    text = speaker("Hello there", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    ids = torch.tensor([ours.encode("Hello there")])
    assert text == ours.decode(model.generate(ids, 5, temperature=0)[0].tolist())


def test_round_trip_keeps_every_bit(exported, tmp_path):
    """Catches a tensor rounded or swapped between export and import, and an import that shares the file's pages."""
    folder, model = exported
    model.save_pretrained(tmp_path)
    back = GPT.from_pretrained(tmp_path)
    assert same(dict(back.state_dict()), dict(model.state_dict()))
    size = (tmp_path / "model.safetensors").stat().st_size
    (tmp_path / "model.safetensors").write_bytes(bytes(size))  # in place: what a copy over it would do
    assert same(dict(back.state_dict()), dict(model.state_dict()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_export_is_no_model(exported, tmp_path):
    """Catches a folder that looks whole and is not: the process is killed at each rename, over an older export too."""
    model = exported[1]
    for older in (False, True):
        for survived in range(8):
            folder = tmp_path / f"{older}{survived}"
            if older:
                noisy(GPT(model.config), seed=9).save_pretrained(folder)
            if not (child := os.fork()):
                replace, calls = os.replace, []

                def kill_later(*args, replace=replace, calls=calls, survived=survived):
                    if len(calls) == survived:
                        os._exit(9)
                    calls.append(replace(*args))

                os.replace = kill_later
                model.save_pretrained(folder)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status == (9 if survived < 7 else 0)
            if status == 0:
                assert same(dict(GPT.from_pretrained(folder).state_dict()), dict(model.state_dict()))
            else:
                with pytest.raises(UserError, match="contains no weights"):
                    convert.read_source(folder)


def test_full_disk_keeps_the_older_export(exported, tmp_path, monkeypatch):
    """Catches an older model deleted before it is known that the new one can be written."""
    import contextlib

    folder, model = exported
    noisy(GPT(model.config), seed=9).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    @contextlib.contextmanager
    def full(path, mode="wb"):
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr(convert, "atomic_file", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# other programs' checkpoints -----------------------------------------------------------------------------------


def as_ours(tensors):
    """The weights of a foreign state dict as a model has them here: no head, missing biases 0, no trained padding."""
    own = GPT(GPTConfig(block_size=8, n_layer=2, n_head=2, n_embd=8)).state_dict()
    ours = {name: tensors.get(name, torch.zeros_like(tensor)) for name, tensor in own.items()}
    return {**ours, "transformer.wte.weight": F.pad(tensors["transformer.wte.weight"][:50257], (0, 0, 0, 47))}


def foreign(rows, bias=True, n_embd=8, seed=3):
    """A state dict as nanoGPT and its kin save it: tied head under two names, trained padding."""
    config = GPTConfig(block_size=8, vocab_size=rows, n_layer=2, n_head=2, n_embd=n_embd)
    tensors = {name: t for name, t in noisy(GPT(config), seed=seed).state_dict().items() if bias or "bias" not in name}
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:rows].clone()
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    return tensors


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_checkpoint(prefix, bias, tmp_path):
    """Catches prefixes left on, missing biases, and nanoGPT's trained 47 rows taken for tokens."""
    plain = foreign(50304, bias)
    args = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 8, "bias": bias, "vocab_size": 50304, "dropout": 0.1}
    tensors = {prefix + name: t for name, t in plain.items()}
    torch.save({"model": tensors, "optimizer": {}, "model_args": args, "iter_num": 3,
                "best_val_loss": torch.tensor(4.2), "config": {"n_head": 12}}, tmp_path / "ckpt.pt")
    model = GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert model.config == GPTConfig(block_size=8, vocab_size=50257, n_layer=2, n_head=2, n_embd=8)
    assert same(dict(model.state_dict()), as_ours(plain))


def test_build_nanogpt_checkpoint(tmp_path, monkeypatch):
    """Catches a refusal of the config object that build-nanogpt pickles, and a class of the file's being used."""
    class GPTConfig:
        def __setstate__(self, state):
            raise AssertionError("the file's own class was used")

    GPTConfig.__module__, GPTConfig.__qualname__ = "__main__", "GPTConfig"
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig, raising=False)
    config, tensors = GPTConfig(), foreign(50257)
    vars(config).update(block_size=8, vocab_size=50257, n_layer=2, n_head=2, n_embd=8)
    torch.save({"model": tensors, "config": config, "step": 19072, "val_loss": 3.05}, tmp_path / "model_19072.pt")
    model = GPT.from_pretrained(tmp_path / "model_19072.pt")
    assert asdict(model.config) == {**vars(config), "dropout": 0.0}
    assert same(dict(model.state_dict()), as_ours(tensors))


def test_bare_state_dict_takes_heads_of_64(tmp_path, capsys):
    """Catches a number of heads that is assumed without a word."""
    torch.save(foreign(65, n_embd=128), tmp_path / "weights.pt")
    assert convert.read_source(tmp_path / "weights.pt").config["n_head"] == 2
    assert "128 / 64" in capsys.readouterr().err


def test_command_turns_a_checkpoint_into_a_folder(tmp_path):
    """Catches the command itself, its refusal to write over a model, and an import of the trainer."""
    torch.save(checkpoint(), tmp_path / "model_00005.pt")

    def command(*args):
        code = "import sys, convert; from harness.cli import exit_status; s = exit_status(convert.main); " \
               "assert 'train_gpt2' not in sys.modules; sys.exit(s)"
        return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, capture_output=True, text=True)

    done = command(tmp_path, tmp_path / "out put")
    assert done.returncode == 0, done.stderr
    parameters = GPT(SMALL).num_parameters()
    assert done.stdout == f"wrote {tmp_path / 'out put'}/ ({parameters:,} parameters, from " \
                          f"{tmp_path / 'model_00005.pt'})\n"
    config, tensors, *_ = convert.read_source(tmp_path / "out put")
    assert config == {k: v for k, v in asdict(SMALL).items() if k != "dropout"}
    assert same(dict(tensors), dict(checkpoint()["model"]))
    assert not (tmp_path / "out put" / "vocab.json").exists()  # 65 ids are not GPT-2's
    refused = command(tmp_path, tmp_path / "out put")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "already contains a model.safetensors" in refused.stderr


# checkpoints of ours -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("change", "named"), [
    ({"config": {**asdict(SMALL), "n_layer": 10**9}}, "n_layer of its model is 1000000000"),
    ({"config": {**asdict(SMALL), "n_embd": 2**32}}, "n_embd of its model is 4294967296"),
    ({"config": {**asdict(SMALL), "n_layer": 3}}, "h.2.ln_1.weight"),
    ({"config": {**asdict(SMALL), "n_head": 3}}, "n_head 3"),
    ({"config": {**asdict(SMALL), "vocab_size": 193}}, "wte.weight has shape .128, 8. and must have .256, 8."),
    ({"config": {**asdict(SMALL), "rope_base": 10**4}}, "rope_base"),
])
def test_wrong_content_is_named(change, named, tmp_path):
    """Catches a checkpoint whose parts do not fit reaching the trainer or the allocator."""
    torch.save(checkpoint(**change), tmp_path / "model_00005.pt")
    with pytest.raises(UserError, match=named) as error:
        GPT.from_pretrained(tmp_path / "model_00005.pt")
    assert "model_00005.pt" in str(error.value)


def test_a_checkpoint_of_another_model_comes_as_it_is(tmp_path):
    """Catches the project's own checkpoint being refused after rotary embeddings or SwiGLU were put in."""
    tensors = {name: t for name, t in checkpoint()["model"].items() if "wpe" not in name}
    tensors |= {"transformer.h.0.mlp.gate.weight": torch.ones(3, 3), "transformer.window": torch.arange(3)}
    config = {**asdict(SMALL), "rope_base": 10**9}
    torch.save(checkpoint(config=config, model=tensors), tmp_path / "rolling_00005.pt")
    for source in (tmp_path, tmp_path / "rolling_00005.pt"):
        found = convert.read_source(source)
        assert found[0] == config and same(found[1], tensors)


# is it still GPT-2? --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [
    SMALL, GPTConfig(block_size=2000, vocab_size=130, n_layer=1, n_head=1, n_embd=4),
    GPTConfig(block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1),
])
def test_gpt2_is_recognized(shape):
    """Catches a list of names or shapes that is not the model's, untrained and trained weights, logits that are nan."""
    model = GPT(shape).eval()
    wanted = {name: t.shape for name, t in convert.gpt2_state(asdict(shape)).items()}
    assert wanted == {name: t.shape for name, t in model.state_dict().items()}
    assert convert.why_not_gpt2(model) is None and convert.why_not_gpt2(noisy(model, 1.0)) is None
    model.transformer.ln_f.bias.data[0] = torch.nan
    assert convert.why_not_gpt2(model) is None


def relu_squared(self, x):
    return self.dropout(self.c_proj(F.relu(self.c_fc(x)).square()))


def softcap(self, hidden, inner=GPT.logits):
    return 2 * torch.tanh(inner(self, hidden) / 2)


def shifted(self, hidden, inner=GPT.logits):
    return inner(self, hidden) + hidden.mean(-1, keepdim=True)


def padded(self, hidden):
    return F.linear(hidden, self.transformer.wte.weight)


def windowed(self, idx, pos=None, mask=None, cache=None, inner=GPT.hidden):
    i = torch.arange(idx.size(1))
    near = (i[:, None] >= i) & (i[:, None] - i < 100)
    return inner(self, idx, pos, near if mask is None else mask, cache)


@pytest.mark.parametrize(("owner", "name", "changed", "why"), [
    (MLP, "forward", relu_squared, "GPT-2 computes other logits"), (GPT, "logits", softcap, "other logits"),
    (GPT, "hidden", windowed, "other logits"), (GPT, "logits", padded, "shape .1, 128, 384. where GPT-2's have"),
    (GPT, "logits", shifted, None),  # the softmax is the same
])
def test_a_model_with_gpt2s_names_and_shapes_is_told_from_it(owner, name, changed, why, monkeypatch):
    """Catches an export that transformers opens and computes something else from: names and shapes are GPT-2's."""
    monkeypatch.setattr(owner, name, changed)
    model = GPT(GPTConfig(block_size=128, vocab_size=300, n_layer=2, n_head=2, n_embd=16)).eval()
    for trained in (model, noisy(model)):
        found = convert.why_not_gpt2(trained)
        assert (found is None) == (why is None)
        assert re.search(why or "", found or "")


TENSORS = checkpoint()["model"]


@pytest.mark.parametrize(("change", "why"), [
    ({"not_gpt2": "GPT-2 computes other logits from them"}, "GPT-2 computes other logits"),
    ({"model": {n: t for n, t in TENSORS.items() if "wpe" not in n}}, r"wpe.weight of shape \(8, 8\) is missing"),
    ({"model": {**TENSORS, "transformer.h.1.mlp.c_fc.weight": torch.ones(24, 8)}}, r"\(24, 8\) and must have .32, 8"),
    ({"model": {**TENSORS, "transformer.gate": torch.ones(1)}}, "tensor transformer.gate is unexpected"),
    ({"config": {}}, "its config has no block_size"),
    ({"config": {n: v for n, v in asdict(SMALL).items() if n != "n_head"}}, "its config has no n_head"),
])
def test_command_refuses_what_is_not_gpt2(change, why, tmp_path):
    """Catches a Hugging Face folder of another model made from a checkpoint, and a reason that explains nothing."""
    torch.save(checkpoint(**change), tmp_path / "model_00005.pt")
    with pytest.raises(UserError, match=f"model_00005.pt cannot become a Hugging Face folder.*{why}"):
        convert.main([str(tmp_path), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# step and model card -------------------------------------------------------------------------------------------
def test_an_export_carries_its_step_and_its_card(exported, tmp_path):
    """Catches an older export taken for the one that is due, and facts that are made up where they are not known."""
    from transformers import AutoModelForCausalLM

    model = exported[1]
    def holds(step, folder=tmp_path, tensors=None):
        return convert.holds(folder, tensors or model.state_dict(), step)

    assert not holds(19073) and holds(None, exported[0]) and not holds(19073, exported[0])
    card = {"data": "edu_fineweb10B", "val_loss": 3.28114, "hellaswag": 0.3049, "tokens": 2 * 10**9, "init_from": None,
            "command": "python train_gpt2.py\n --data x|y"}
    convert.save(asdict(model.config), model.state_dict(), tmp_path, card, 19073)
    assert holds(19073) and not holds(5) and not holds(19073, tensors=noisy(GPT(model.config), seed=9).state_dict())
    text = (tmp_path / "README.md").read_text()
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert "library_name: transformers" in head and "pipeline_tag: text-generation" in head
    for line in ("# GPT-2, 1.6M parameters", "- Architecture: GPT-2 with 2 layers, 2 heads, width 32, a context of 64 "
                 "tokens and a vocabulary of 50,257", "- Trained for 19,073 updates", "- Data: edu_fineweb10B",
                 "- Read 2,000,000,000 tokens in training", "- Validation loss: 3.2811 nats per token",
                 "- HellaSwag: 0.3049 (acc_norm)", "- Command: `` python train_gpt2.py --data x|y ``"):
        assert f"\n{line}\n" in body
    assert "None" not in text and "Fine-tuned" not in text
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path)  # an unknown key in config.json does no harm
    assert torch.equal(reopened.transformer.wpe.weight, model.transformer.wpe.weight)
    assert GPT.from_pretrained(tmp_path).config == model.config
    (tmp_path / "model.safetensors").unlink()  # what a kill leaves
    assert not holds(19073)


def test_card_of_a_converted_checkpoint(tmp_path, capsys):
    """Catches a card that says nothing of a run whose checkpoint says it, and a written README that is replaced."""
    run = {"total_batch_size": 512, "data": "my.txt", "init_from": "gpt2"}
    torch.save(checkpoint(train_config=run, val_loss=3.25), tmp_path / "model_00005.pt")
    convert.main([str(tmp_path), str(tmp_path / "out")])
    text = (tmp_path / "out" / "README.md").read_text()
    for line in ("Fine-tuned from gpt2", "5 updates", "2,560 tokens", "my.txt", "3.2500"):
        assert line in text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["training_step"] == 5
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(UserError, match="mine already contains a README.md"):
        convert.main([str(tmp_path), str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"


# vocabularies --------------------------------------------------------------------------------------------------
def in_words(folder, words):
    """Give a Hugging Face folder a vocabulary of 50,257 ids in which " the" and " a" are swapped, say; as two files."""
    release = tokenizer.release_files()
    vocabulary = json.loads(release["encoder.json"])
    for one, other in words:
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_bytes(release["vocab.bpe"])


def test_a_folders_own_vocabulary_is_taken_whatever_its_size(exported, tmp_path, monkeypatch):
    """Catches a model of 50,257 tokens that are not OpenAI's, encoded with OpenAI's and exported with them."""
    from transformers import AutoTokenizer

    shutil.copytree(exported[0], tmp_path / "in")
    assert GPT.from_pretrained(tmp_path / "in").tokenizer is tokenizer.gpt2_tokenizer()
    in_words(tmp_path / "in", [("Ġthe", "Ġa"), ("Ġbell", "Ġof")])
    model = GPT.from_pretrained(tmp_path / "in")
    ids = model.tokenizer.encode("under the bell").tolist()
    assert model.tokenizer != tokenizer.gpt2_tokenizer() and ids == [4625, 257, 286]
    convert.main([str(tmp_path / "in"), str(tmp_path / "out")])
    for folder in (tmp_path / "in", tmp_path / "out"):
        assert AutoTokenizer.from_pretrained(folder).encode("under the bell") == ids
        assert convert.tokenizer_of(folder) == model.tokenizer
    torch.save(checkpoint(train_config={}, tokenizer=model.tokenizer.json, config=asdict(model.config),
                          model=model.state_dict()), tmp_path / "model_00005.pt")
    assert GPT.from_checkpoint(tmp_path / "model_00005.pt").tokenizer == model.tokenizer


def test_vocabularies_that_do_not_fit_are_refused(exported, tmp_path, capsys):
    """Catches ids that the model does not have or the tokenizer does not, rows that pad a vocabulary taken for
    tokens, and a vocabulary that is assumed without a word."""
    own = tokenizer.learn((), 257)
    model = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=1, n_embd=8))
    convert.save(asdict(model.config), model.state_dict(), tmp_path)
    assert GPT.from_pretrained(tmp_path).tokenizer is None  # it can be looked at, but no text encoded
    with pytest.raises(UserError, match="vocabulary of 300 tokens.*GPT-2's vocabulary of 50,257"):
        tokenizer.of(GPT.from_pretrained(tmp_path))
    (tmp_path / "tokenizer.json").write_text(own.json, encoding="utf-8")
    padded = GPT.from_pretrained(tmp_path)
    assert (padded.config.vocab_size, padded.tokenizer) == (257, own)
    (tmp_path / "tokenizer.json").write_text(tokenizer.learn(["ab" * 9, "cd" * 9] * 99, 290).json, encoding="utf-8")
    convert.save({**asdict(model.config), "vocab_size": 257}, model.state_dict(), tmp_path / "few")
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "few")
    with pytest.raises(UserError, match="few has a vocabulary of 257 tokens, .* vocabulary of 2[67]. tokens"):
        GPT.from_pretrained(tmp_path / "few")
    capsys.readouterr()
    shutil.copytree(exported[0], tmp_path / "bare", ignore=shutil.ignore_patterns("vocab.json", "merges.txt"))
    assert tokenizer.of(GPT.from_pretrained(tmp_path / "bare")) is tokenizer.gpt2_tokenizer()
    assert "no tokenizer's files: GPT-2's are assumed" in capsys.readouterr().err


def test_a_folder_that_hides_a_name_of_the_hub_is_named(exported, tmp_path, monkeypatch, capsys):
    """Catches a folder `gpt2` of one's own taken for OpenAI's model."""
    shutil.copytree(exported[0], tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert GPT.from_pretrained("gpt2").config == exported[1].config
    error = capsys.readouterr().err
    assert f"gpt2 is read from {tmp_path / 'gpt2'}" in error and "openai-community/gpt2" in error
    GPT.from_pretrained("./gpt2/../gpt2")
    assert capsys.readouterr().err == ""


# what users get wrong ------------------------------------------------------------------------------------------
def test_bad_sources_are_reported(tmp_path):
    """Catches a traceback, or another model, for a source that is not there or not a model."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("hello")
    for source, reported in (
        ("gpt3", "gpt2, gpt2-medium, gpt2-large, gpt2-xl"), (tmp_path / "empty", "contains no weights"),
        (tmp_path / "text.pt", "not a zip"), (tmp_path / "gone.pt", "not a file or a folder"),
    ):
        with pytest.raises(UserError, match=reported) as error:
            GPT.from_pretrained(source)
        assert str(source) in str(error.value)


def edit_json(name, **changes):
    def edit(folder):
        content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        content = {key: value for key, value in {**content, **changes}.items() if value != "absent"}
        (folder / name).write_text(json.dumps(content))
    return edit


def edit_tensors(change):
    def edit(folder):
        from safetensors.torch import load_file, save_file

        tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return edit


def sharded(**index):
    def edit(folder):
        (folder / "model.safetensors").unlink()
        edit_json("model.safetensors.index.json", **index)(folder)
    return edit


@pytest.mark.parametrize(("edit", "reported"), [
    (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 99), "model.safetensors cannot be read"),
    (lambda folder: (folder / "model.safetensors").write_text(LFS), "model.safetensors is a Git LFS pointer"),
    (lambda folder: (folder / "config.json").write_text(LFS), "config.json is a Git LFS pointer"),
    (lambda folder: os.truncate(folder / "model.safetensors", 9999), "model.safetensors cannot be read"),
    (edit_json("config.json", model_type="llama"), "model_type is 'llama'"),
    (edit_json("config.json", model_type="absent"), "model_type is None"),
    (edit_json("config.json", activation_function="relu"), "activation_function is 'relu'"),
    (edit_json("config.json", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
    (edit_json("config.json", n_layer="absent", n_head="absent"), "has no n_layer, n_head"),
    (edit_json("config.json", n_layer=10**12), "n_layer 1000000000000, its tensors say 2"),
    (edit_json("config.json", n_head="2"), "n_head '2'"),
    (edit_json("config.json", vocab_size=50000), "vocab_size 50000, its wte has 50257 rows"),
    (sharded(), "no weight_map"),
    (sharded(weight_map={"a": "../../secret"}), "/secret cannot be read as safetensors"),
    (sharded(weight_map={"a": "model-00001-of-00002.safetensors"}), "model-00001-of-00002.safetensors cannot be read"),
    (edit_tensors(lambda t: t.pop("transformer.h.1.mlp.c_fc.bias")), "transformer.h.1.mlp.c_fc.bias .* is missing"),
    (edit_tensors(lambda t: t.pop("transformer.wpe.weight")), "has no matrices .*wpe.weight"),
    (edit_tensors(lambda t: t.update({"transformer.h.0.mlp.c_fc.bias": torch.ones(3)})), "c_fc.bias has shape .3,."),
    (edit_tensors(lambda t: t.update({"score.weight": torch.ones(3)})), "score.weight is unexpected"),
    (edit_tensors(lambda t: t.update({"lm_head.weight": torch.ones(50257, 32)})), "lm_head.weight differs"),
    (edit_tensors(lambda t: t.update({"transformer.ln_f.bias": torch.ones(32).char()})), "ln_f.bias .torch.int8"),
])
def test_bad_folders_are_reported(edit, reported, exported, tmp_path):
    """Catches folders of other models, or of parts of one, being loaded as something they are not."""
    for path in exported[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit(tmp_path)
    with pytest.raises(UserError, match=reported):
        GPT.from_pretrained(tmp_path)


# the hub -------------------------------------------------------------------------------------------------------
def test_download_from_the_hub_then_from_its_cache_then_without_a_network(exported, tmp_path):
    """Catches the hub's protocol and cache being used wrongly; a name must work offline once it has been fetched."""
    folder, model = exported
    server = Hub()
    server.commit, server.home = "main", str(tmp_path / "home")
    server.files = {"/openai-community/gpt2": {path.name: path.read_bytes() for path in folder.iterdir()}}
    code = (
        "import sys, convert\nfrom harness.cli import UserError\nfor name in sys.argv[1:]:\n"
        "    try: print(convert.read_source(name).tensors['transformer.wte.weight'].double().sum().item())\n"
        "    except UserError as e: print('error:', e)\n"
    )

    def load(*names):
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and k[:3] != "HF_"}
        environment |= server.environment | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-c", code, *names]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    try:
        expected = str(model.transformer.wte.weight.double().sum().item())
        assert load("gpt2") == [expected]
        assert ("model.safetensors", 0) in server.fetched
    finally:
        server.shutdown()
        server.server_close()
    cached, again, error = load("gpt2", "openai-community/gpt2", "gpt2-xl")
    assert cached == again == expected
    assert error.startswith("error: gpt2-xl is not on this machine")
    assert "gpt2-xl/resolve/main/model.safetensors" in error
