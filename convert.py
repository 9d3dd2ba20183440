"""GPT-2 weights in and out, as a plain config and plain tensors.

In: OpenAI's models by name, Hugging Face folders, this program's checkpoints and log folders, and the checkpoints of
nanoGPT and build-nanogpt. Out: a Hugging Face folder. Nothing that is read can run code: a torch file is loaded with
`weights_only=True`, after its checksums.

    python convert.py SOURCE OUT_DIR

"Our names" are GPT-2's own (`transformer.h.0.attn.c_attn.weight`, ...), with `nn.Linear`'s layout (out, in), no
`lm_head.weight`, and the vocabulary padded with zero rows. nanoGPT trains with the exact GELU where GPT-2 has the tanh
form: its weights load, and the logits differ a little from its own (1e-3 on random weights of the 124M's shape).
"""

import json
import os
import re
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from harness import tokenizer
from harness.checkpoint import (
    _check_checkpoint,
    _check_tensors,
    _Inert,
    _is_buffer,
    checkpoint_files,
    newest_checkpoint,
    read_pt,
)
from harness.cli import Parser, UserError, exit_status
from harness.files import atomic_file

HUB_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB_FILES = ("config.json", "model.safetensors")
FOLDER_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
SHAPE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # kept (in, out) by HF
# ---------------------------------------------------------------------------------------------------------------
# In
# ---------------------------------------------------------------------------------------------------------------
def load(source):
    """`(config, tensors)` of any model this program knows, ready for `GPT.from_state_dict`.

    `source` is a name of `HUB_MODELS`, a Hugging Face folder, a log folder (its newest good checkpoint), or a
    checkpoint file: ours, nanoGPT's, build-nanogpt's, or a bare state dict. `config` is a dict of block_size,
    vocab_size, n_layer, n_head and n_embd; `tensors` are on the CPU, under our names.
    """
    path = Path(source)
    if path.name in FOLDER_WEIGHTS:  # its config is beside it
        path = path.parent
    if os.path.isdir(path):
        if any((path / name).is_file() for name in FOLDER_WEIGHTS):
            return _load_folder(path)
        if checkpoint_files(path):
            file, checkpoint = newest_checkpoint(path)
            return _adopt(checkpoint["model"], checkpoint["config"], file)
        raise UserError(
            f"the folder {path} holds no weights: a Hugging Face folder has {' or '.join(FOLDER_WEIGHTS[::2])}, "
            "a log folder model_*.pt or rolling_*.pt"
        )
    if os.path.isfile(path):
        return _load_file(path)
    if str(source) in HUB_MODELS:
        return _load_folder(_download(str(source)))
    raise UserError(f"no model {str(source)!r}: it is no file and no folder, and the names are {', '.join(HUB_MODELS)}")


def _download(name):
    """The local folder of the hub's model `name`: from the hub's cache, else downloaded into it."""
    from huggingface_hub import (
        errors,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    repository = f"openai-community/{name}"
    for cached_as in (repository, name):  # transformers may have cached it under its short name
        files = [try_to_load_from_cache(cached_as, file) for file in HUB_FILES]
        if all(isinstance(file, str) for file in files):
            return Path(files[0]).parent
    try:
        get_hf_file_metadata(hf_hub_url(repository, HUB_FILES[0]))  # the download would try for half a minute
        return Path([hf_hub_download(repository, file) for file in HUB_FILES][0]).parent
    except (OSError, errors.HTTPError) as error:  # no network, offline mode, a full disk, a hub that fails
        pages = " and ".join(f"https://huggingface.co/{repository}/resolve/main/{file}" for file in HUB_FILES)
        raise UserError(
            f"{name} is not on this machine and could not be downloaded ({type(error).__name__}): where there is a "
            f"network, download {pages} into one folder, and give that folder here in place of {name}"
        ) from error


def _load_folder(folder):
    """`load` of a Hugging Face folder: safetensors, sharded safetensors, or a torch file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    single, index, torch_file = (folder / name for name in FOLDER_WEIGHTS)
    declared = _huggingface_shape(folder / "config.json")
    if not single.is_file() and not index.is_file():
        tensors = read_pt(torch_file)
    else:
        files = [single] if single.is_file() else _shards(index)
        tensors = {}
        for file in files:
            try:
                tensors.update(load_file(file))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file} cannot be read as safetensors ({error}): copy or download it again") from error
    _check_tensors(tensors, folder)
    # cloned: safetensors maps the file, and a model must not change, or crash, with the file it was read from
    tensors = {n: t.t().contiguous() if n.endswith(CONV1D) and t.ndim == 2 else t.clone() for n, t in tensors.items()}
    return _adopt(tensors, declared, folder)


def _shards(index):
    """The files that a sharded model's `index` lists, all of them beside it."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map: copy or download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index} names the file {name!r}: its files must be beside it")
    return sorted({index.parent / name for name in weight_map.values()})


def _huggingface_shape(path):
    """The shape that the `config.json` at `path` declares; `UserError` where it is of another kind of model."""
    config = {"model_type": None} | _read_json(path)
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
        raise UserError(f"{path} lacks {', '.join(missing)}: copy or download it again")
    return {ours: config[theirs] for ours, theirs in names.items()}


def _read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as JSON ({reason}): copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} where a JSON object is needed: copy it again")
    return content


def _load_file(path):
    """`load` of a checkpoint file: ours, nanoGPT's, build-nanogpt's or a bare state dict."""
    content = read_pt(path)
    if "format_version" in content:
        content = _check_checkpoint(content, path)
        return _adopt(content["model"], content["config"], path)
    declared = content.get("model_args", content.get("config", {}))  # nanoGPT's name; build-nanogpt's
    declared = vars(declared) if isinstance(declared, _Inert) else declared
    tensors = content.get("model", content)
    if not isinstance(declared, dict) or not isinstance(tensors, dict):
        raise UserError(f"{path} is no checkpoint known here: it holds {', '.join(map(repr, content)):.200}")
    _check_tensors(tensors, path)
    # wrappers leave their names in front: DistributedDataParallel `module.`, torch.compile `_orig_mod.`
    tensors = {re.sub(r"^module\.", "", n.replace("_orig_mod.", "")): t for n, t in tensors.items()}
    if not any(name.endswith(".bias") and not _is_buffer(name) for name in tensors):  # nanoGPT with bias=False
        weights = [n for n in tensors if n.endswith(".weight") and (".h." in n or ".ln_f." in n)]
        tensors |= {n.removesuffix("weight") + "bias": torch.zeros(tensors[n].shape[:1]) for n in weights}
    return _adopt(tensors, declared, path)


def _adopt(tensors, declared, where):
    """`(config, tensors)` of checked tensors in `nn.Linear`'s layout: names made ours, head checked, vocabulary padded.

    The shape is read from the tensors; `declared`, what the source's config says of it, must agree. It alone knows
    the number of heads: without it they are taken to be 64 wide, as in all of GPT-2's sizes.
    """
    tensors = {n if n.startswith(("transformer.", "lm_head.")) else f"transformer.{n}": t for n, t in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not _is_buffer(name)}
    wte, wpe = (tensors.get(f"transformer.{name}.weight", torch.empty(0)) for name in ("wte", "wpe"))
    if wte.ndim != 2 or wpe.ndim != 2 or not wte.numel() or not wpe.numel():
        raise UserError(f"{where} is not GPT-2's: the matrices transformer.wte.weight and .wpe.weight are not there")
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
        print(f"{where} does not say its number of heads: taken to be {n_embd} / 64", file=sys.stderr, flush=True)
    n_head = declared.get("n_head", max(1, n_embd // 64))
    if type(n_head) is not int or not 1 <= n_head <= n_embd or n_embd % n_head:
        raise UserError(f"{where}: n_head {n_head!r:.50} does not divide n_embd {n_embd}")

    if vocab_size == 50304:  # GPT-2's vocabulary as nanoGPT and build-nanogpt pad it
        vocab_size = tokenizer.VOCAB_SIZE
    padding = -vocab_size % 128  # as `GPTConfig.padded_vocab_size` has it, which `GPT.from_state_dict` checks
    tensors["transformer.wte.weight"] = F.pad(wte[:vocab_size], (0, 0, 0, padding))
    return dict(measured, vocab_size=vocab_size, n_head=n_head), tensors


def check_shapes(tensors, wanted):
    """Raise `UserError`, naming the tensor, unless `tensors` has the names and shapes of the state dict `wanted`."""
    for name, due in wanted.items():
        if name not in tensors:
            raise UserError(f"tensor {name} of shape {tuple(due.shape)} is missing: is it another model's file?")
        if tensors[name].shape != due.shape:
            raise UserError(f"tensor {name} has shape {tuple(tensors[name].shape)}, due is {tuple(due.shape)}")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise UserError(f"tensor {unknown[0]} belongs to no part of this model: is it another one's?")


# ---------------------------------------------------------------------------------------------------------------
# Out
# ---------------------------------------------------------------------------------------------------------------
def save(config, tensors, folder):
    """Write a model of shape `config` (dict) with `tensors` (our names) as the Hugging Face folder `folder`.

    transformers' `AutoModelForCausalLM`, `AutoTokenizer` and `pipeline("text-generation", folder)` open it. Tokenizer
    files come with GPT-2's vocabulary only. Other files in `folder` stay. `model.safetensors` goes first and comes
    last, so that what a kill leaves is never taken for a model. Raises `OSError` where it cannot write.
    """
    from safetensors.torch import save as to_bytes

    folder = Path(folder)
    vocab_size = config["vocab_size"]
    weights = {name: t.detach().to("cpu", torch.float32) for name, t in tensors.items()}
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:vocab_size]
    weights = {n: t.t().contiguous() if n.endswith(CONV1D) else t.contiguous() for n, t in weights.items()}
    end_of_text = tokenizer.END_OF_TEXT if vocab_size == tokenizer.VOCAB_SIZE else None
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    dropout = config.get("dropout", 0.0)
    files = {
        "config.json": _json({
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": config["block_size"],
            "vocab_size": vocab_size,
            "n_layer": config["n_layer"],
            "n_head": config["n_head"],
            "n_embd": config["n_embd"],
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "initializer_range": 0.02,
            "attn_pdrop": dropout,
            "embd_pdrop": dropout,
            "resid_pdrop": dropout,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            **ends,
        }),
        "generation_config.json": _json({**ends, "pad_token_id": end_of_text}),
    }
    if end_of_text is not None:
        release = tokenizer.release_files()
        files["vocab.json"] = release["encoder.json"]
        files["merges.txt"] = release["vocab.bpe"]
        files["tokenizer_config.json"] = _json({
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": config["block_size"],
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
            "add_prefix_space": False,
        })
    model_file = folder / "model.safetensors"
    with atomic_file(model_file) as file:  # a full disk is found here, while an older export is still whole
        file.write(to_bytes(weights, metadata={"format": "pt"}))
        model_file.unlink(missing_ok=True)
        for name, content in files.items():
            with atomic_file(folder / name) as small:
                small.write(content)


def _json(content):
    return (json.dumps(content, indent=2) + "\n").encode()


def main(argv=None):
    """`python convert.py SOURCE OUT_DIR`."""
    from train_gpt2 import GPT

    parser = Parser(description="Turn any GPT-2 checkpoint into a Hugging Face folder.")
    parser.add_argument("source", help=f"{', '.join(HUB_MODELS)}, a Hugging Face folder, a log folder or a checkpoint")
    parser.add_argument("out_dir", type=Path, help="the folder to write; it may not hold a model yet")
    args = parser.parse_args(argv)
    if held := [name for name in FOLDER_WEIGHTS if (args.out_dir / name).exists()]:
        raise UserError(f"{args.out_dir} already holds a model ({held[0]}): name another folder")
    model = GPT.from_pretrained(args.source)
    try:
        model.save_pretrained(args.out_dir)
    except OSError as error:
        raise UserError(f"{args.out_dir} cannot be written: {error.strerror or error}") from error
    print(f"{args.out_dir}: {model.num_parameters():,} parameters of {args.source}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
