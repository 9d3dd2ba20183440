"""GPT-2 weights in and out, as a plain config and plain tensors.

In: OpenAI's models by name, Hugging Face folders, this program's checkpoints and log folders, and the checkpoints of
nanoGPT and build-nanogpt. Out: a Hugging Face folder. Nothing that is read can run code: a torch file is loaded with
`weights_only=True`, after its checksums.

    python convert.py SOURCE OUT_DIR

"Our names" are GPT-2's own (`transformer.h.0.attn.c_attn.weight`, ...), with `nn.Linear`'s layout (out, in), no
`lm_head.weight`, and the vocabulary padded with zero rows. nanoGPT trains with the exact GELU where GPT-2 has the tanh
form: its weights load, and the logits differ a little from its own (1e-3 on random weights of the 124M's shape).
"""

if __name__ == "__main__":
    import sys
    sys.path.insert(0, __file__.removesuffix("convert.py"))  # python -P leaves it out
    from harness.cli import quiet_imports
    quiet_imports()

import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from harness import checkpoint, machine, tokenizer
from harness.cli import Parser, UserError, exit_status, say
from harness.files import atomic_file, read_json, refuse_lfs_pointer
from harness.tokenizer import Tokenizer

HUB_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB_OWNER = "openai-community/"
HUB_FILES = ("config.json", "model.safetensors")
FOLDER_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
WRITTEN = (*FOLDER_WEIGHTS, "config.json", "generation_config.json", "README.md", "tokenizer.json", "vocab.json",
           "merges.txt", "tokenizer_config.json")  # or deleted by `save`
SHAPE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # HF keeps them (in, out)
PROBE_TOKENS = 1024  # in `why_not_gpt2`: a few tokens would not show that attention has a window


# === In ===========================================================================================
class Source(NamedTuple):
    """What `read_source` finds."""

    config: dict
    tensors: dict
    path: Path  # the file or folder that was read
    checkpoint: dict | None = None  # the whole content, if it is a checkpoint of this program
    tokenizer: Tokenizer | None = None  # its own; None: GPT-2's


def read_source(source):
    """Any model this program knows, a `Source` for a `from_state_dict`; tensors are on the CPU.

    `source` is a name of `HUB_MODELS`, a Hugging Face folder, a log folder (its newest good checkpoint), or a
    checkpoint file: ours, nanoGPT's, build-nanogpt's, or a bare state dict. Of another program's model `config` has
    the keys `SHAPE` and the tensors have our names; it is checked to be GPT-2's. A checkpoint of ours may be of a
    model that is no longer GPT-2: both come as they are, and the class that takes them checks that they fit.
    """
    path, name = Path(source), str(source).removeprefix(HUB_OWNER)
    if name in HUB_MODELS and os.path.exists(path):
        say(f"{source} is read from {path.absolute()}; OpenAI's model of this name is {HUB_OWNER}{name}, in a folder "
            "without that path", sys.stderr)
    if path.name in FOLDER_WEIGHTS:  # its config is beside it
        path = path.parent
    if os.path.isdir(path):
        if any((path / name).is_file() for name in FOLDER_WEIGHTS):
            return _load_folder(path)
        if checkpoint.files(path):
            return _ours(*checkpoint.newest(path))
        raise UserError(
            f"the folder {path} contains no weights: a Hugging Face folder has {' or '.join(FOLDER_WEIGHTS[::2])}, "
            "a log folder model_*.pt or rolling_*.pt"
        )
    if os.path.isfile(path):
        return _load_file(path)
    if name in HUB_MODELS:
        return _load_folder(_download(name), from_openai=True)._replace(path=Path(name))
    raise UserError(f"there is no model {str(source)!r}: it is not a file or a folder, and the names are "
                    f"{', '.join(HUB_MODELS)}")


def tokenizer_of(source):
    """The `Tokenizer` of the model that `source` names, as in `load`; of a Hugging Face folder no weights are read."""
    if os.path.isdir(source) and any(Path(source, name).is_file() for name in FOLDER_WEIGHTS):
        return tokenizer.read(source) or tokenizer.gpt2_tokenizer()
    if not os.path.exists(source) and str(source).removeprefix(HUB_OWNER) in HUB_MODELS:
        return tokenizer.gpt2_tokenizer()
    return read_source(source).tokenizer or tokenizer.gpt2_tokenizer()


def check_trainable(config, source, seq_len, own=None):
    """Raise `UserError` unless the model read from `source` can be trained on rows of `seq_len` tokens of `own`'s."""
    tokenizer.fitting(own, config["vocab_size"], source)
    if seq_len > config["block_size"]:
        raise UserError(f"--seq_len {seq_len} is beyond the context of {source}, {config['block_size']}: lower it")


def _download(name):
    """The local folder of the hub's model `name`, downloaded into the hub's cache if it is not there."""
    import huggingface_hub as hub
    from huggingface_hub.errors import HTTPError

    repository = HUB_OWNER + name
    for cached_as in (repository, name):  # transformers may have cached it under its short name
        files = [hub.try_to_load_from_cache(cached_as, file) for file in HUB_FILES]
        if all(isinstance(file, str) for file in files):
            return Path(files[0]).parent
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, HUB_FILES[0]))  # fails at once, a download in half a minute
        return Path([hub.hf_hub_download(repository, file) for file in HUB_FILES][0]).parent
    except (OSError, HTTPError) as error:  # no network, offline mode, a full disk, a hub that fails
        pages = " and ".join(f"https://huggingface.co/{repository}/resolve/main/{file}" for file in HUB_FILES)
        raise UserError(
            f"{name} is not on this machine and could not be downloaded ({type(error).__name__}): on a machine with a "
            f"network download {pages} into one folder, and give that folder instead of {name}"
        ) from error


def _load_folder(folder, from_openai=False):
    """The `Source` of a Hugging Face folder: safetensors, sharded safetensors, or a torch file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    single, index, torch_file = (folder / name for name in FOLDER_WEIGHTS)
    declared = _huggingface_shape(folder / "config.json")
    if not single.is_file() and not index.is_file():
        tensors = checkpoint.read_pt(torch_file)
    else:
        files = [single] if single.is_file() else _shards(index)
        tensors = {}
        for file in files:
            refuse_lfs_pointer(file)
            try:
                tensors.update(load_file(file))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file} cannot be read as safetensors ({error}): copy or download it again") from error
    _check_foreign(tensors, folder)
    # subtle: safetensors maps the file into memory, and a model must not change with the file that it was read from
    tensors = {n: t.t().contiguous() if n.endswith(CONV1D) and t.ndim == 2 else t.clone() for n, t in tensors.items()}
    own = None if from_openai else tokenizer.read(folder)
    if own is None and declared["vocab_size"] == tokenizer.VOCAB_SIZE and not from_openai:
        say(f"{folder} has no tokenizer's files: GPT-2's are assumed", sys.stderr)
    config, tensors = _adopt(tensors, declared, folder, own)
    return Source(config, tensors, folder, tokenizer=own)


def _shards(index):
    """The files that a sharded model's `index` lists, beside it whatever folder it names."""
    weight_map = (read_json(index) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map: copy or download it again")
    return sorted({index.parent / Path(str(name)).name for name in weight_map.values()})


def _huggingface_shape(path):
    """The shape that the `config.json` at `path` declares; `UserError` if it is of another kind of model."""
    if (found := read_json(path)) is None:
        raise UserError(f"{path} is missing: copy or download it again")
    config = {"model_type": None} | found
    same = {
        "model_type": ["gpt2"],
        "activation_function": ["gelu_new", "gelu_pytorch_tanh"],  # one function under two names
        "n_inner": [None, 4 * config["n_embd"] if isinstance(config.get("n_embd"), int) else None],
        "layer_norm_epsilon": [1e-5],
        "scale_attn_weights": [True],
        "scale_attn_by_inverse_layer_idx": [False],
        "add_cross_attention": [False],
    }
    for key, allowed in same.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path} is not GPT-2's: its {key} is {config[key]!r:.50} and must be {allowed[0]!r}")
    names = dict(zip(SHAPE, ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")))
    if missing := [theirs for theirs in names.values() if theirs not in config]:
        raise UserError(f"{path} has no {', '.join(missing)}: copy or download it again")
    return {ours: config[theirs] for ours, theirs in names.items()}


def _load_file(path):
    """`read_source` of a checkpoint file: ours, nanoGPT's, build-nanogpt's or a bare state dict."""
    content = checkpoint.read_pt(path)
    if "format_version" in content:
        return _ours(path, checkpoint.check(content, path))
    declared = content.get("model_args", content.get("config", {}))  # nanoGPT's name; build-nanogpt's
    declared = vars(declared) if isinstance(declared, checkpoint.Inert) else declared
    tensors = content.get("model", content)
    if not isinstance(declared, dict) or not isinstance(tensors, dict):
        raise UserError(f"{path} is not a checkpoint known here: it contains {', '.join(map(repr, content)):.200}")
    _check_foreign(tensors, path)
    # wrappers leave their names in front: DistributedDataParallel `module.`, torch.compile `_orig_mod.`
    tensors = {re.sub(r"^module\.", "", n.replace("_orig_mod.", "")): t for n, t in tensors.items()}
    if not any(name.endswith(".bias") and not _is_mask(name) for name in tensors):  # nanoGPT with bias=False
        weights = [n for n in tensors if n.endswith(".weight") and (".h." in n or ".ln_f." in n)]
        tensors |= {n.removesuffix("weight") + "bias": torch.zeros(tensors[n].shape[:1]) for n in weights}
    return Source(*_adopt(tensors, declared, path), path)


def _ours(path, content):
    """The `Source` of a checkpoint of ours: any model's, so only sizes that no model has are refused."""
    for key in SHAPE:
        size = content["config"].get(key, 1)
        most = 1000 if key == "n_layer" else 2**24
        if type(size) is not int or not 1 <= size <= most:  # else building the model would never end
            raise UserError(f"{path} is damaged: the {key} of its model is {size!r:.50}")
    own = content["tokenizer"] and tokenizer.from_json(content["tokenizer"], path)
    if own:
        tokenizer.fitting(own, content["config"].get("vocab_size"), path)
    return Source(content["config"], content["model"], path, content, own)


def _check_foreign(tensors, where):
    """Raise `UserError` unless `tensors` are floating-point, except for masks."""
    checkpoint.check_tensors(tensors, where)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not _is_mask(name):
            raise UserError(f"{where}: tensor {name} ({tensor.dtype}) does not consist of floating-point numbers")


def _is_mask(name):
    """Whether `name` is that of the causal mask that older programs kept among the weights."""
    return name.endswith((".attn.bias", ".attn.masked_bias"))


def _adopt(tensors, declared, where, own=None):
    """`(config, tensors)` of checked tensors in `nn.Linear`'s layout: names made ours, head checked, vocabulary padded.

    The shape is read from the tensors; `declared`, what the source's config says about it, must agree. Only the config
    knows the number of heads: without it they are assumed to be 64 wide, as in all of GPT-2's sizes. Rows that pad the
    vocabulary beyond `own`, the tokenizer where it is known, are cut off.
    """
    tensors = {n if n.startswith(("transformer.", "lm_head.")) else f"transformer.{n}": t for n, t in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not _is_mask(name)}
    wte, wpe = (tensors.get(f"transformer.{name}.weight", torch.empty(0)) for name in ("wte", "wpe"))
    if wte.ndim != 2 or wpe.ndim != 2 or not wte.numel() or not wpe.numel():
        raise UserError(f"{where} is not GPT-2's: it has no matrices transformer.wte.weight and transformer.wpe.weight")
    head = tensors.pop("lm_head.weight", wte)
    if head is not wte and not torch.equal(head, wte):
        raise UserError(f"{where}: lm_head.weight differs from transformer.wte.weight, and GPT-2 ties the two")

    rows, n_embd = wte.shape
    layers = {name.split(".")[2] for name in tensors if name.startswith("transformer.h.")}
    measured = {"block_size": wpe.shape[0], "n_layer": len(layers), "n_embd": n_embd}
    for key, value in measured.items():
        if declared.get(key, value) != value:
            raise UserError(f"{where}: its config says {key} {declared[key]!r:.50}, its tensors say {value}")
    vocab_size = declared.get("vocab_size", rows)
    if type(vocab_size) is not int or not vocab_size <= rows < vocab_size + 128:
        raise UserError(f"{where}: its config says vocab_size {vocab_size!r:.50}, its wte has {rows} rows")
    if "n_head" not in declared:
        print(f"{where} does not give its number of heads: assuming {n_embd} / 64", file=sys.stderr, flush=True)
    n_head = declared.get("n_head", max(1, n_embd // 64))
    if type(n_head) is not int or not 1 <= n_head <= n_embd or n_embd % n_head:
        raise UserError(f"{where}: n_head {n_head!r:.50} does not divide n_embd {n_embd}")

    if vocab_size == 50304 and own is None:  # GPT-2's vocabulary as nanoGPT and build-nanogpt pad it
        vocab_size = tokenizer.VOCAB_SIZE
    if own and own.size <= vocab_size < own.size + 128:
        vocab_size = own.size
    if own:
        tokenizer.fitting(own, vocab_size, where)
    padding = -vocab_size % 128  # as in `gpt2_state`
    tensors["transformer.wte.weight"] = F.pad(wte[:vocab_size], (0, 0, 0, padding))
    return dict(measured, vocab_size=vocab_size, n_head=n_head), tensors


def check_shapes(tensors, wanted):
    """Raise `UserError`, naming the tensor, unless `tensors` has the names and shapes of the state dict `wanted`."""
    for name, due in wanted.items():
        if name not in tensors:
            raise UserError(f"tensor {name} of shape {tuple(due.shape)} is missing")
        if tensors[name].shape != due.shape:
            raise UserError(f"tensor {name} has shape {tuple(tensors[name].shape)} and must have {tuple(due.shape)}")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise UserError(f"tensor {unknown[0]} is unexpected")


# === What GPT-2 is ================================================================================
def gpt2_state(config):
    """The state dict of a GPT-2 of shape `config` (dict) under our names, its tensors on torch's device `meta`."""
    C, padded_vocab_size = config["n_embd"], config["vocab_size"] + -config["vocab_size"] % 128
    shapes = {"wte.weight": (padded_vocab_size, C), "wpe.weight": (config["block_size"], C)}
    for layer in range(config["n_layer"]):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{norm}.weight": (C,), f"h.{layer}.{norm}.bias": (C,)}
        linears = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
        for linear, (fan_out, fan_in) in linears.items():
            shapes |= {f"h.{layer}.{linear}.weight": (fan_out, fan_in), f"h.{layer}.{linear}.bias": (fan_out,)}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    return {f"transformer.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}


def gpt2_logits(config, tensors, idx):
    """Logits (B, T, vocab_size) that GPT-2 (Radford et al. 2019) computes from `tensors` for token ids `idx` (B, T)."""
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    w = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    x = w["wte.weight"][idx] + w["wpe.weight"][: idx.size(1)]
    for layer in range(config["n_layer"]):
        h = f"h.{layer}"
        q, k, v = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (config["n_head"], -1)).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(y.transpose(1, 2).flatten(2), f"{h}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), approximate="tanh"), f"{h}.mlp.c_proj")
    return F.linear(norm(x, "ln_f"), w["wte.weight"][: config["vocab_size"]])


@torch.no_grad()
def why_not_gpt2(model, tokens=PROBE_TOKENS):
    """Why a Hugging Face GPT-2 folder of a live `model` would be another model, in words; None if it is GPT-2.

    `model` is called as `GPT` is; its mode stays as it was. Names and shapes do not settle it: an MLP with another
    activation has GPT-2's. So what it makes of one row of random `tokens` is compared with `gpt2_logits`.
    """
    config, tensors = asdict(model.config), model.state_dict()
    if why_not := _why_not_by_shape(config, tensors):
        return why_not
    device = tensors["transformer.wte.weight"].device
    T = min(config["block_size"], tokens)
    idx = torch.randint(config["vocab_size"], (1, T), generator=torch.Generator().manual_seed(0)).to(device)
    with machine.plain_fp32(model):
        found, due = model(idx)[0], gpt2_logits(config, tensors, idx)
    if found.shape != due.shape:
        return f"its logits have shape {tuple(found.shape)} where GPT-2's have {tuple(due.shape)}"
    compared = torch.linspace(0, T - 1, min(T, 16), device=device).long()  # each of them has seen all before it
    # as log-probabilities, since a constant added to all logits of a token changes nothing
    found, due = (logits[:, compared].float().log_softmax(-1) for logits in (found, due))
    if torch.allclose(found, due, rtol=1e-4, atol=1e-4, equal_nan=True):
        return None
    return (f"its tensors have GPT-2's names and shapes, but GPT-2 computes other logits from them "
            f"(up to {(found - due).abs().max():.2g} away)")


def export(model, folder, weights=None, card=None, step=None):
    """`save` of a live model, with other `weights` if given.

    `UserError` if it is not GPT-2: transformers could not open it, or would compute something else.
    """
    if why_not := why_not_gpt2(model):
        raise UserError(f"this model is not GPT-2, so transformers could not open it: {why_not}")
    save(asdict(model.config), weights or model.state_dict(), folder, card, step, getattr(model, "tokenizer", None))


def _why_not_by_shape(config, tensors):
    """The part of `why_not_gpt2` that names and shapes settle."""
    if missing := [key for key in SHAPE if type(config.get(key)) is not int]:
        return f"its config has no {', '.join(missing)}"
    try:
        check_shapes(tensors, gpt2_state(config))
    except UserError as error:
        return str(error)
    return None


# === Out ==========================================================================================
def save(config, tensors, folder, card=None, step=None, own=None):
    """Write a GPT-2 of shape `config` (dict) with `tensors` (our names) as the Hugging Face folder `folder`.

    transformers' `AutoModelForCausalLM`, `AutoTokenizer` and `pipeline("text-generation", folder)` open it. The files
    of its tokenizer are those of `own`, or GPT-2's where the number of ids is. `card`, facts for `model_card`, and
    `step`, which `holds` reads back, say where it comes from. Other files in `folder` stay.
    `model.safetensors` is removed first and appears last, so that what a kill leaves is never taken for a model.
    Raises `OSError` where it cannot write.
    """
    from safetensors.torch import save as to_bytes

    folder = Path(folder)
    vocab_size = config["vocab_size"]
    weights = {name: t.detach().to("cpu", torch.float32) for name, t in tensors.items()}
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:vocab_size]
    weights = {n: t.t().contiguous() if n.endswith(CONV1D) else t.contiguous() for n, t in weights.items()}
    if own is None and vocab_size == tokenizer.VOCAB_SIZE:
        own = tokenizer.gpt2_tokenizer()
    end_of_text = own and own.end_of_text
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    files = {
        "config.json": _json({
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": config["block_size"],
            "n_ctx": config["block_size"],  # the same, for llama.cpp's converter
            **{name: config[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")},
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "initializer_range": 0.02,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.get("dropout", 0.0)),
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            **ends,
            **({} if step is None else {"training_step": step}),
        }),
        "generation_config.json": _json({**ends, "pad_token_id": end_of_text}),
        "README.md": model_card(config, count_parameters(config, tensors), step, card or {}).encode(
            errors="backslashreplace"),
    }
    tokenizer_config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": config["block_size"],
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        "add_prefix_space": False,
    }
    if own and own.json:
        files["tokenizer.json"] = own.json.encode()
        tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    elif own:
        release = tokenizer.release_files()
        files["vocab.json"] = release["encoder.json"]
        files["merges.txt"] = release["vocab.bpe"]
    if own:
        files["tokenizer_config.json"] = _json(tokenizer_config)
    model_file = folder / "model.safetensors"
    with atomic_file(model_file) as file:  # a full disk is found here, while an older export is still whole
        file.write(to_bytes(weights, metadata={"format": "pt"}))
        model_file.unlink(missing_ok=True)
        for name in ("tokenizer.json", "vocab.json", "merges.txt"):  # perhaps of another vocabulary
            if name not in files:
                (folder / name).unlink(missing_ok=True)
        for name, content in files.items():
            with atomic_file(folder / name) as small:
                small.write(content)


def holds(folder, tensors, step):
    """Whether `folder` is what `save` wrote of these tensors (our names) after `step` updates, by its weights."""
    try:
        if (read_json(Path(folder, "config.json")) or {}).get("training_step") != step:
            return False
        found = read_source(folder).tensors
    except UserError:
        return False
    return found.keys() == tensors.keys() and all(torch.equal(found[n], t.cpu().float()) for n, t in tensors.items())


def count_parameters(config, tensors):
    """How many numbers a model has, without the padding of the vocabulary."""
    padding = -config["vocab_size"] % 128
    return sum(tensor.numel() for tensor in tensors.values()) - padding * config["n_embd"]


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
---

# GPT-2, {parameters} parameters

- Architecture: GPT-2 with {n_layer} layers, {n_head} heads, width {n_embd}, a context of {block_size:,} tokens and a \
vocabulary of {vocab_size:,}
{facts}

## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""
CARD_FACTS = {  # what may be known about where a model comes from, and its line
    "init_from": "Fine-tuned from {}",
    "steps": "Trained for {:,} updates",
    "tokens": "Read {:,} tokens in training",
    "data": "Data: {}",
    "val_loss": "Validation loss: {:.4f} nats per token",
    "hellaswag": "HellaSwag: {:.4f} (acc_norm)",
    "command": "Command: `` {} ``",
}


def model_card(config, parameters, step, facts):
    """A model card, as Markdown, of what is known: the keys of `CARD_FACTS` in `facts`, and its `train_config`."""
    run = facts.get("train_config", {})
    batch, init_from = run.get("total_batch_size"), run.get("init_from", "scratch")
    known = {"init_from": None if init_from == "scratch" else init_from, "steps": step,
             "tokens": step and batch and step * batch, "data": run.get("data"), **facts}
    lines = [f"- {line.format(known[name])}" for name, line in CARD_FACTS.items()
             if known.get(name) is not None and known[name] == known[name]]  # not of nan
    lines = [" ".join(line.split()) for line in lines]  # a command or a path may contain line ends
    return CARD.format(parameters=_short(parameters), facts="\n".join(lines), **config)


def _short(parameters):
    """124439808 as `124.4M`; small numbers in full."""
    return f"{parameters / 1e6:.1f}M" if parameters >= 100_000 else f"{parameters:,}"


def _json(content):
    return (json.dumps(content, indent=2) + "\n").encode()


def main(argv=None):
    """`python convert.py SOURCE OUT_DIR`."""
    parser = Parser(description="Turn any GPT-2 checkpoint into a Hugging Face folder.")
    parser.add_argument("source", help=f"{', '.join(HUB_MODELS)}, a Hugging Face folder, a log folder or a checkpoint")
    parser.add_argument("out_dir", type=Path, help="the folder to write; it must not contain a model")
    args = parser.parse_args(argv)
    for name in WRITTEN:
        if (args.out_dir / name).exists():
            raise UserError(f"{args.out_dir} already contains a {name}: name another folder")
    config, tensors, path, content, own = read_source(args.source)
    why_not = _why_not_by_shape(config, tensors) or (content and content["not_gpt2"])
    if why_not:
        raise UserError(f"{path} cannot become a Hugging Face folder, because its model is not GPT-2: {why_not}")
    card = {name: content[name] for name in ("train_config", "val_loss")} if content else {}
    try:
        save(config, tensors, args.out_dir, card, content and content["step"], own)
    except OSError as error:
        raise UserError(f"{args.out_dir} cannot be written: {error.strerror or error}") from error
    print(f"wrote {args.out_dir}/ ({_short(count_parameters(config, tensors))} parameters, from {path})")


if __name__ == "__main__":
    sys.exit(exit_status(main))
