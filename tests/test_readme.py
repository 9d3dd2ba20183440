"""README.md held to its word: every command of it is run here, or marked as needing a GPU or a network and parsed.

A command stands in a ```sh block, in the right column of a table, or, as a snippet, in a ```python block. Its mark,
`[GPU]` or `[network]`, stands in its comment, in a comment line right above it, or after it in the table. A command
without a mark is run in one copy of the project, in the README's order; `SHORTER` makes it short, nothing else is
needed for a new one.
"""

import argparse
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import make_shards, run_trainer

import bench
import train_gpt2
from harness.cli import with_underscores

README = (ROOT / "README.md").read_text(encoding="utf-8")
WITHOUT_BLOCKS = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
RUNNABLE = r"(?:[A-Z_]+=\S+ )*(?:python|torchrun|srun|sbatch|pip|conda|wandb|jupyter|tail|grep|watch|ssh|rsync|tmux)"

SHAPE = "--n_layer 1 --n_head 1 --n_embd 32"
LENGTH = ("--seq_len 32 --total_batch_size 256 --max_steps 4 --warmup_steps 1 --checkpoint_every 2 --val_tokens 1024 "
          "--sample_tokens 4 --num_samples 1 --hellaswag_path hellaswag_val.jsonl --no-compile")
SHORTER = [  # pattern of commands, parts of it replaced, flags put behind it; the first that fits holds
    (r"train_gpt2\.py --help", {}, ""),
    (r"train_gpt2\.py --resume", {"30000": "6", "model_05000": "model_00002"}, ""),
    (r"train_gpt2\.py .*--init_from", {}, LENGTH),  # the weights have a shape
    (r"train_gpt2\.py .*--epochs", {"--epochs 3": "--epochs 0.2"}, f"{SHAPE} {LENGTH.replace('--max_steps 4 ', '')}"),
    (r"train_gpt2\.py", {"nproc_per_node=8": "nproc_per_node=2"}, f"{SHAPE} {LENGTH}"),
    (r"bench\.py", {}, f"{SHAPE} --seq_len 32 --total_batch_size 64 --rungs fp32 --repeats 1 --steps 1 --device cpu"),
    (r"sample\.py", {"100": "8"}, ""),
    (r"sample\.py(?!.*max_new_tokens)", {}, "--max_new_tokens 8"),
    (r"curves\.py .*--against", {"reference/tiny.txt": "short_reference.txt"}, ""),  # of as short a run
    (r"tail -f", {"-f": "-n 3"}, ""),
    (r"TrainConfig\.preset", {"max_steps=100": "max_steps=2, n_layer=1, n_head=1, n_embd=32, seq_len=32, "
                              "total_batch_size=256, compile=False, val_tokens=64, sample_tokens=2"}, ""),
    (r"max_new_tokens=", {"max_new_tokens=100": "max_new_tokens=8"}, ""),
]
NEEDS = {  # what a mark must have a reason in, where the command is not of this project
    "GPU": r"--nproc_per_node=8|^sbatch |nvidia-smi",
    "network": r"^(pip|conda|ssh|rsync|jupyter|wandb)\b|\bpip install\b|\bssh\b",
}


class Command(NamedTuple):
    text: str
    mark: str | None  # "GPU", "network" or None
    kind: str  # "sh" or "python"


def mark_in(text):
    found = re.search(r"\[(GPU|network)\]", text)
    return found and found[1]


def commands_of(readme):
    """Every command of the README, in its order."""
    found, fence, above = [], None, None
    for line in readme.splitlines():
        if line.startswith("```"):
            fence, above = (line[3:] or "?") if fence is None else None, None
            if fence == "python":
                found.append(Command("", None, "python"))
        elif fence == "python":
            found[-1] = found[-1]._replace(text=f"{found[-1].text}{line}\n")
        elif fence == "sh":
            text, _, comment = line.partition(" # ") if not line.startswith("#") else ("", "", line)
            if text.strip():
                found.append(Command(text.strip(), mark_in(comment) or above, "sh"))
            above = mark_in(comment) if not text.strip() else None
        elif fence is None and line.startswith("|"):
            cell = re.split(r"(?<!\\)\|", line)[-2]
            for match in re.finditer(rf"`({RUNNABLE} [^`]+)`([^`]*)", cell):
                found.append(Command(match[1], mark_in(match[2]), "sh"))
    return list(dict.fromkeys(found))


COMMANDS = commands_of(README)
PLAIN = [c for c in COMMANDS if c.mark is None]
# What a user has of his own, and a trained model, are there; what is asked of the network is this project's to ask.
OURS_BY_NETWORK = [c for c in COMMANDS if c.mark == "network" and re.match(r"python \w+\.py", c.text)]


def shortened(command):
    for pattern, changes, flags in SHORTER:
        if re.search(pattern, command.text):
            text = command.text
            for old, new in changes.items():
                text = text.replace(old, new)
            return f"{text} {flags}".strip() if command.kind == "sh" else text
    return command.text


def name_of(command):
    return re.sub(r"\s+", " ", command.text)[:100]


# The world in which they run -----------------------------------------------------------------------------------
def write_words(path, count, seed):
    words = (ROOT / "input.txt").read_text(encoding="utf-8").split()[seed * 12000 :][:count]
    path.write_text(" ".join(words) + "\n", encoding="utf-8")
    return words


def write_nanogpt(path, shape, rows=50304):
    """A checkpoint as nanoGPT saves it, of random weights."""
    tensors = train_gpt2.GPT(train_gpt2.GPTConfig(**shape)).state_dict()
    tensors["transformer.wte.weight"] = torch.randn(rows, shape["n_embd"]) * 0.02
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    torch.save({"model": {f"_orig_mod.{name}": t for name, t in tensors.items()}, "optimizer": {}, "iter_num": 3,
                "model_args": {**shape, "vocab_size": rows, "bias": True, "dropout": 0.0},
                "best_val_loss": torch.tensor(4.2), "config": {}}, path)


def make_fineweb(world):
    make_shards(world / "edu_fineweb10B", train=(6000, 6000), val=(3000,), name="edufineweb", high=2000)


def make_world(world):
    """A clone of the project, and what the README supposes that its reader has; no FineWeb-Edu yet."""
    for pattern in ("*.py", "*.txt", "*.ipynb"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, world)
    for folder in ("docs", "reference"):
        shutil.copytree(ROOT / folder, world / folder)
    write_words(world / "my.txt", 12000, 0)  # its tenth is longer than a context of GPT-2
    write_words(world / "other.txt", 1000, 1)
    (world / "my_folder").mkdir()
    write_words(world / "my_folder" / "a.txt", 3000, 2)
    words = write_words(world / "my_folder" / "b.txt", 12000, 3)
    with open(world / "my.jsonl", "w", encoding="utf-8") as file:
        for i in range(0, len(words), 100):
            file.write(json.dumps({"text": " ".join(words[i : i + 100])}) + "\n")
    write_nanogpt(world / "nanogpt_ckpt.pt", {"block_size": 64, "n_layer": 1, "n_head": 1, "n_embd": 32})
    ids = np.random.default_rng(0).integers(0, 2000, 6000, dtype=np.uint16)
    for folder, header in (("nanogpt_data", b""), ("llmc_data", struct.pack("<256i", 20240520, 1, 6000, *[0] * 253))):
        (world / folder).mkdir()
        for split in ("train", "val"):
            name = f"{split}.bin" if not header else f"my_{split}_000000.bin"
            (world / folder / name).write_bytes(header + ids.tobytes())
    row = {"ind": 4, "activity_label": "Baking", "ctx_a": "A tray", "ctx_b": "", "ctx": "A tray", "split": "val",
           "split_type": "zeroshot", "source_id": "", "endings": ["is hot.", "is blue.", "sings.", "runs."], "label": 0}
    (world / "hellaswag_val.jsonl").write_text("".join(json.dumps({**row, "ind": i}) + "\n" for i in range(4)))
    (world / "short_reference.txt").write_text("tokens_per_step 256\n0 val 10.8 9.0\n")
    snippet = next(c for c in COMMANDS if c.kind == "python" and "TrainConfig.preset" in c.text)
    (world / "my_run.py").write_text(shortened(snippet))
    shutil.copytree(ROOT / "log", world / "log", ignore=lambda *_: set(os.listdir(ROOT / "log")))  # empty
    return world


def environment(world):
    """No network, however this machine is connected, and nothing that was downloaded before."""
    closed = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    return {**closed, "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HOME": str(world / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1", "WANDB_SILENT": "true",
            "NETRC": str(world / "netrc"), "WANDB_CONFIG_DIR": str(world / "wandb_config")}


def as_script(_, words, code):
    """In a fresh process: what `python WORDS` does there, with the modules of this clone, or `python -c CODE`."""
    here = os.getcwd()
    for file in os.listdir(here):
        if file.endswith(".py"):
            sys.modules.pop(file[:-3], None)
    sys.path[:] = [here, *(p for p in sys.path if p not in (str(ROOT), str(ROOT / "tests"), ""))]
    sys.stdin = open(os.devnull)  # noqa: SIM115 (the process's own)
    if code is not None:
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
        sys.exit(0)
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")
    sys.exit(0)


def execute(text, world, kind="sh", timeout=120):
    """Run a command of the README in the `world`: a CompletedProcess."""
    env = environment(world)
    if kind == "python":
        return run_trainer([], partial(as_script, words=None, code=text), world, env, timeout)
    words = shlex.split(text)
    while "=" in words[0]:
        name, value = words.pop(0).split("=", 1)
        env[name] = value
    if words[0] == "python" and words[1].endswith(".py"):
        return run_trainer([], partial(as_script, words=words[1:], code=None), world, env, timeout)
    if words[0] == "torchrun":
        words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    return subprocess.run(words, cwd=world, env={**os.environ, **env}, capture_output=True, text=True, timeout=timeout,
                          stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{command: how it went}: the plain ones in the README's order, the others beside them, without a network."""
    world = make_world(tmp_path_factory.mktemp("clone"))
    apart = tmp_path_factory.mktemp("offline") / "clone"
    shutil.copytree(world, apart)
    elsewhere = [c for c in COMMANDS if c.text.startswith(("torchrun --standalone", "python bench.py"))]  # slow ones
    done, lock = {}, threading.Lock()

    def run(command, where, text=None):
        began = time.monotonic()
        try:
            outcome = execute(text or shortened(command), where, command.kind)
        except (TimeoutError, subprocess.TimeoutExpired, OSError) as error:
            outcome = error
        with lock:
            done[command] = outcome
        print(f"{time.monotonic() - began:6.1f} s  {name_of(command)}", file=sys.stderr)  # for -s

    def in_order():
        after_pip = Command(COMMANDS[0].text.split(" && ")[-1], None, "sh")
        run(COMMANDS[0], world, shortened(after_pip))
        make_fineweb(world)
        for command in (c for c in PLAIN if c not in elsewhere):
            if command.text.startswith("python curves.py log_box"):
                shutil.copytree(world / "log", world / "log_box")  # as rsync does
            run(command, world)

    def beside():
        for command in OURS_BY_NETWORK:
            wandb = "--tracker wandb" in command.text  # asked for its server when all else is there
            run(command, apart, shortened(command) if wandb else command.text)
        make_fineweb(apart)
        for command in elsewhere:
            run(command, apart)

    with ThreadPoolExecutor(2) as pool:
        for task in [pool.submit(in_order), pool.submit(beside)]:
            task.result()
    return done, world


def told(outcome):
    if isinstance(outcome, Exception):
        return str(outcome)
    return f"status {outcome.returncode}\n{outcome.stdout[-2000:]}\n{outcome.stderr[-3000:]}"


# Tests ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", PLAIN, ids=name_of)
def test_command_runs(results, command):
    """Guards a command that does not do what it says any more, and one that needs a network without its mark."""
    outcome = results[0][command]
    assert getattr(outcome, "returncode", None) == 0, told(outcome)


def test_commands_leave_what_the_readme_says(results):
    """Guards runs that end well and did nothing."""
    _, world = results
    for path in ("log/log.txt", "log/metrics.jsonl", "log/config.json", "log/curves.png", "log/hf/model.safetensors",
                 "log/archive", "log_ft/best.pt", "my_shards/manifest.json", "my_model/config.json", "both.png",
                 "curves.png", "log_short/log.txt", "log_six/log.txt"):
        assert (world / path).exists(), path
    assert any((world / "log").glob("model_*.pt"))
    assert list((world / "log").rglob("offline-run-*")), "no run of Weights & Biases"


def test_first_command_trains_on_the_plays(results):
    """Guards what the line that sets up ends in, where there is no FineWeb-Edu yet."""
    outcome = results[0][COMMANDS[0]]
    assert getattr(outcome, "returncode", None) == 0, told(outcome)
    assert "preset tiny on input.txt" in outcome.stdout and "python fineweb.py --pretokenized" in outcome.stdout


def test_eight_gpus_as_two_ranks(results):
    """Guards the torchrun line: the same, with two ranks on the CPU for eight GPUs."""
    [outcome] = [o for c, o in results[0].items() if c.text.startswith("torchrun")]
    assert getattr(outcome, "returncode", None) == 0, told(outcome)
    assert "2 ranks" in outcome.stdout


@pytest.mark.parametrize("command", OURS_BY_NETWORK, ids=name_of)
def test_without_a_network_one_line_says_so(results, command):
    """Guards a stale `[network]`, and a traceback or a hang where there is no network."""
    outcome = results[0][command]
    assert getattr(outcome, "returncode", None) == 2, told(outcome)
    *before, last = outcome.stderr.strip().splitlines()
    assert ": error: " in last and re.search("could not be downloaded|cannot fetch|wandb login", last), outcome.stderr
    assert all("next try in" in line for line in before), outcome.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.mark], ids=name_of)
def test_marked_command_has_a_reason_and_parses(command):
    """Guards marks that hide a command from these tests, flags that are no more, and files that are not there."""
    assert command in OURS_BY_NETWORK or re.search(NEEDS[command.mark], command.text)
    parts = " ".join(";" if word == "&&" else shlex.quote(word) for word in shlex.split(command.text))
    for part in parts.split(" ; "):
        words = shlex.split(part)
        if words[0] == "torchrun":
            parser = importlib.import_module("torch.distributed.run").get_args_parser()
            parsed = parser.parse_args(words[1:])
            words = ["python", parsed.training_script, *parsed.training_script_args]
        if words[:2] == ["sbatch", "docs/train.sbatch"]:
            words = ["python", "train_gpt2.py", *words[2:]]
        if words[:2] == ["python", "train_gpt2.py"]:
            given = train_gpt2.make_parser().parse_args(map(with_underscores, words[2:]))
            train_gpt2.TrainConfig.from_preset(**{"name": "gpt2", **{("name" if k == "preset" else k): v
                                                                for k, v in vars(given).items()}})
        for word in words:
            if re.search(r"^[\w/]+\.(txt|yml|sbatch|ipynb|py)$", word) and not word.startswith(("my", "gpt2/")):
                assert (ROOT / word).exists(), word


def test_same_command_has_one_mark():
    """Guards a command that is marked in one place and bare in another."""
    texts = [c.text for c in COMMANDS]
    assert sorted(texts) == sorted(set(texts))


def test_commands_in_sentences_are_commands_of_blocks():
    """Guards commands that escape these tests in running text."""
    prose = "\n".join(line for line in WITHOUT_BLOCKS.splitlines() if not line.startswith("|"))
    known = {c.text for c in COMMANDS} | set((ROOT / "docs/train.sbatch").read_text().splitlines())
    for span in re.findall(r"`((?:srun )?python [^`]+)`", prose):
        assert any(re.search(rf"(^|\s){re.escape(span.removeprefix('srun '))}(\s|$)", text) for text in known), span


def test_new_command_is_run_unless_marked():
    """Guards the reading of the README itself: a command that it overlooks is tested by nobody."""
    page = ("```sh\n# [network] for pip\na.py && b\npython c.py --x 1     # [GPU] says\npython d.py # no\n```\n"
            "text `python e.py`\n| `python f.py` | `python g.py --h` [network] and `torchrun i.py` |\n"
            "```python\nj()\nk()\n```\n")
    assert commands_of(page) == [
        ("a.py && b", "network", "sh"), ("python c.py --x 1", "GPU", "sh"), ("python d.py", None, "sh"),
        ("python g.py --h", "network", "sh"), ("torchrun i.py", None, "sh"), ("j()\nk()\n", None, "python"),
    ]
    assert set(re.findall(r"^```(.*)$", README, re.MULTILINE)) == {"sh", "python", ""}
    assert len(COMMANDS) > 60 and len(PLAIN) > 35


def test_set_up_lines():
    """Guards the two lines that set up from nothing: others than the README's reader copy them."""
    setup = [c.text for c in COMMANDS if c.text.startswith("python -m venv")]
    start = "python -m venv .venv && . .venv/bin/activate && pip install -r {} -c constraints.txt && {}"
    assert setup == [start.format("requirements.txt", "python train_gpt2.py"),
                     start.format("requirements-dev.txt", "python -m pytest")]
    assert COMMANDS[0].text == setup[0] and COMMANDS[1].text == setup[1]


def test_flags_exist():
    """Guards flags in running text and tables that no program has."""
    known = set(importlib.import_module("torch.distributed.run").get_args_parser()._option_string_actions)
    known |= set(train_gpt2.make_parser()._option_string_actions)
    for file in ROOT.glob("*.py"):
        known |= set(re.findall(r"\"(--\w[\w-]*)", file.read_text(encoding="utf-8")))
    left = "\n".join(line if not line.startswith("|") else line.split("|")[-2] for line in WITHOUT_BLOCKS.splitlines())
    known |= {"--shutdown-timeout", "--signals-to-handle"}  # of newer torchruns
    assert set(re.findall(r"(?<![\w-])--\w[\w-]*", left)) <= known


def test_table_of_flags_has_the_groups_of_help():
    """Guards a group or a size that the table leaves out."""
    groups = [group.title for group in train_gpt2.make_parser()._action_groups][2:]  # after argparse's own two
    table = re.search(r"\| group \| what is in it \|\n\|.*\n((?:\|.*\n)+)", README)[1]
    assert [row.split("|")[1].strip() for row in table.splitlines()] == groups


def test_map_has_every_file_and_section():
    """Guards a map of the program that has lost a file or a section."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*.ipynb")]:
        assert re.search(rf"^\|.*`{re.escape(file.name)}`", README, re.MULTILINE), file.name
    source = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    sections = re.findall(r"^# -{90,}\n# (.+)\n# -{90,}$", source, re.MULTILINE)
    table = re.search(r"\| section \| in a line \|\n\|.*\n((?:\|.*\n)+)", README)[1]
    assert [row.split("|")[1].strip() for row in table.splitlines()] == sections


def test_memory_table_is_the_formula():
    """Guards figures that a change of the model or of bench.py has left behind."""
    rows = [r.split(" | ") for r in bench.memory_table(argparse.Namespace(seq_len=1024, model="gpt2"), {}).splitlines()]
    wanted = {row[0].strip("| "): [cell.strip(" |") for cell in row[-len(bench.CARDS_GB) :]] for row in rows[2:]}
    heads = " | ".join(f"{gb} GB" for gb in bench.CARDS_GB)
    table = re.search(rf"\| model \| {re.escape(heads)} \|\n\|.*\n((?:\|.*\n)+)", README)[1]
    written = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    assert {name.split()[0]: cells for name, *cells in written} == wanted


def test_defaults_that_are_named():
    """Guards numbers in the text that are settings of the program."""
    gpt2, finetune = (train_gpt2.TrainConfig.from_preset(name) for name in ("gpt2", "finetune"))
    assert f"{gpt2.max_steps:,} steps of {gpt2.total_batch_size:,} tokens" in re.sub(r"\s+", " ", README)
    assert f"Every {gpt2.val_every} steps come" in README
    assert gpt2.val_every == gpt2.hellaswag_every == gpt2.sample_every
    assert f"{finetune.max_steps:,} steps of 16 x {finetune.seq_len:,}" in re.sub(r"\s+", " ", README)
    assert finetune.total_batch_size == 16 * finetune.seq_len and finetune.max_lr == 1e-5 and finetune.dropout == 0.1
    assert gpt2.save_minutes == 10 and gpt2.keep_checkpoints == 2 and gpt2.checkpoint_every == 5000


def test_links_and_lines():
    """Guards links to nowhere, addresses of the outside, and lines too long to read in a terminal."""
    anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")
               for head in re.findall(r"^#+ (.+)$", README, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        file, _, anchor = target.partition("#")
        assert not file or (ROOT / file).exists(), target
        assert file or anchor in anchors, target
    assert "://" not in README
    for line in README.splitlines():
        assert len(line) <= 120 or line.startswith(("|", "python -m venv")), line
