"""README.md and docs/*.md: every command of them is run here, or is marked with the reason why not.

A command stands in a ```sh block, in the right column of a table, or, as a snippet, in a ```python block. Its mark
stands in its comment, in a comment line right above it, or after it in the table: `[GPU]` and `[network]` are parsed,
`[untested]` is a command of another program that was never run. A command without a mark is run in one copy of the
project, in the order of the pages; `SHORTER` makes it short, nothing else is needed for a new one. Of training
commands that differ in values alone the first is run and the others are parsed.
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
import tomllib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from typing import NamedTuple

import memory_formula
import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import make_shards, run_trainer, write_questions
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import train_gpt2
from harness.cli import Parser, add_flags, parse_flags

PAGES = {page: (ROOT / page).read_text(encoding="utf-8")
         for page in ("README.md", "docs/architecture.md", "docs/coming-from.md", "docs/cluster.md", "docs/faq.md")}
README = PAGES["README.md"]
WITHOUT_BLOCKS = re.sub(r"^```.*?^```$", "", "\n".join(PAGES.values()), flags=re.MULTILINE | re.DOTALL)
PROGRAMS = "python|torchrun|srun|sbatch|pip|uv|conda|wandb|jupyter|lm_eval|vllm|tail|grep|watch|ssh|rsync|tmux"
RUNNABLE = rf"(?:[A-Z_]+=\S+ )*(?:{PROGRAMS})"
MARKS = ("untested", "GPU", "network")  # the first that a comment has counts

SHAPE = "--n_layer 1 --n_head 1 --n_embd 32"
LENGTH = ("--seq_len 32 --total_batch_size 256 --max_steps 4 --warmup_steps 1 --checkpoint_every 2 --val_tokens 1024 "
          "--sample_tokens 4 --num_samples 1 --hellaswag_path hellaswag_val.jsonl --no-compile")
SHORTER = [  # pattern of commands, parts of it replaced, flags put behind it; the first that fits counts
    (r"train_gpt2\.py --resume", {"30000": "6", "model_05000": "model_00002"}, ""),
    (r"train_gpt2\.py .*--profile", {"--profile 3": "--profile 1"}, f"{SHAPE} {LENGTH}"),
    (r"train_gpt2\.py .*--init_from", {}, LENGTH),  # the weights have a shape
    (r"train_gpt2\.py .*--epochs", {"--epochs 3": "--epochs 0.2"}, f"{SHAPE} {LENGTH.replace('--max_steps 4 ', '')}"),
    (r"train_gpt2\.py", {"nproc_per_node=8": "nproc_per_node=2"}, f"{SHAPE} {LENGTH}"),
    (r"bench\.py", {}, f"{SHAPE} --seq_len 32 --total_batch_size 64 --rungs fp32 --repeats 1 --steps 1 --device cpu"),
    (r"sample\.py", {"100": "8"}, ""),
    (r"sample\.py(?!.*max_new_tokens)", {}, "--max_new_tokens 8"),
    (r"tail -f", {"-f": "-n 3"}, ""),
    (r"TrainConfig\.from_preset", {"max_steps=100": "max_steps=2, n_layer=1, n_head=1, n_embd=32, seq_len=32, "
                                   "total_batch_size=256, compile=False, val_tokens=64, sample_tokens=2"}, ""),
    (r"max_new_tokens=", {"max_new_tokens=50": "max_new_tokens=8"}, ""),
]
NEEDS = {  # what a mark must have a reason in, where the command is not of this project
    "GPU": r"--nproc_per_node=8|^sbatch |nvidia-smi",
    "network": r"^(pip|uv|conda|ssh|rsync|jupyter|wandb|lm_eval)\b|\bpip install\b|\bssh\b",
    "untested": r"^(?!python \w+\.py).|convert_hf_to_gguf",
}


class Command(NamedTuple):
    text: str
    mark: str | None  # one of MARKS
    kind: str  # "sh" or "python"


def mark_in(text):
    return next((mark for mark in MARKS if f"[{mark}]" in text), None)


def commands_of(page):
    """Every command of a page, in its order."""
    found, fence, above = [], None, None
    for line in page.splitlines():
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


def repeated(commands):
    """Those that start the trainer with the flags of one before, of other values."""
    first, found = {}, []
    for command in commands:
        flags = frozenset(word for word in command.text.split() if word.startswith("--"))
        key = command.mark, flags
        if command.text.startswith("python train_gpt2.py --") and first.setdefault(key, command) != command:
            found.append(command)
    return found


COMMANDS = list(dict.fromkeys(command for page in PAGES.values() for command in commands_of(page)))
REPEATED = repeated(COMMANDS)
PLAIN = [c for c in COMMANDS if c.mark is None and c not in REPEATED]
# The world has what a user owns, and a trained model; the network is what this project asks for by itself.
OURS_BY_NETWORK = [c for c in COMMANDS if c.mark == "network" and re.match(r"python \w+\.py", c.text)
                   and c not in REPEATED]


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


def missing_package(command):
    """The tracker that a command asks for, where its package, which no requirement names, is not installed."""
    tracker = re.search(r"--tracker (\w+)", command.text)
    return tracker and tracker[1] != "none" and not find_spec(tracker[1]) and tracker[1]


# The world in which they run -----------------------------------------------------------------------------------
def write_words(path, count, seed):
    words = (ROOT / "input.txt").read_text(encoding="utf-8").split()[seed * 12000 :][:count]
    path.write_text(" ".join(words) + "\n", encoding="utf-8")
    return words


def write_nanogpt(path, shape, rows=50304):
    """A checkpoint with random weights, as nanoGPT saves it."""
    tensors = train_gpt2.GPT(train_gpt2.GPTConfig(**shape)).state_dict()
    tensors["transformer.wte.weight"] = torch.randn(rows, shape["n_embd"]) * 0.02
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    torch.save({"model": {f"_orig_mod.{name}": t for name, t in tensors.items()}, "optimizer": {}, "iter_num": 3,
                "model_args": {**shape, "vocab_size": rows, "bias": True, "dropout": 0.0},
                "best_val_loss": torch.tensor(4.2), "config": {}}, path)


def make_fineweb(world):
    make_shards(world / "edu_fineweb10B", train=(6000, 6000), val=(3000,), name="edufineweb", high=2000)


def make_world(world):
    """A clone of the project, and what the pages suppose that their reader has; no FineWeb-Edu yet."""
    for pattern in ("*.py", "*.txt", "*.ipynb"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, world)
    for folder in ("docs", "reference", "harness"):
        shutil.copytree(ROOT / folder, world / folder, ignore=shutil.ignore_patterns("__pycache__"))
    vocabulary = re.search("^tokenizer .*$", (ROOT / "reference" / "tiny.txt").read_text(), re.MULTILINE)[0]
    reference = f"data bundled input.txt\ntokens_per_step 256\n{vocabulary}\n4 val 8.3 9.0\n"  # of as short a run
    (world / "reference" / "tiny.txt").write_text(reference)
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
    write_questions(world / "hellaswag_val.jsonl", 4)
    snippet = next(c for c in COMMANDS if c.kind == "python" and "TrainConfig.from_preset" in c.text)
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
    ours = {"harness", *(file[:-3] for file in os.listdir(here) if file.endswith(".py"))}
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]
    sys.path[:] = [here, *(p for p in sys.path if p not in (str(ROOT), str(ROOT / "tests"), ""))]
    sys.stdin = open(os.devnull)  # noqa: SIM115 (the process's own)
    if code is not None:
        exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})
        sys.exit(0)
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")
    sys.exit(0)


def execute(text, world, kind="sh", timeout=120):
    """Run a command in the folder `world`: a CompletedProcess."""
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
    """({command: its result}, folder): the plain ones in the order of the pages, the others in a folder of their own,
    without a network."""
    world = make_world(tmp_path_factory.mktemp("clone"))
    apart = tmp_path_factory.mktemp("offline") / "clone"
    shutil.copytree(world, apart)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(64, n_layer=1, n_head=1, n_embd=32))
    model.save_pretrained(apart / "log")  # a command that has its model misses nothing but the network
    elsewhere = [c for c in COMMANDS if c.text.startswith(("torchrun --standalone", "python bench.py"))]  # slow ones
    done, lock = {}, threading.Lock()

    def run(command, where, text=None):
        began, text = time.monotonic(), text or shortened(command)
        if where == apart and "train_gpt2.py" in text and "--log_dir" not in text:
            text += " --log_dir log_apart"  # log/ holds a model of theirs, which a run does not touch
        try:
            outcome = execute(text, where, command.kind)
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
            tracker = "--tracker" in command.text  # it is started when everything else has been found
            run(command, apart, shortened(command) if tracker else command.text)
            if command.text == "python convert.py gpt2 gpt2_weights":
                model.save_pretrained(apart / "gpt2_weights")  # as it does where there is a network
        make_fineweb(apart)
        for command in elsewhere:
            run(command, apart)

    with ThreadPoolExecutor(2) as pool:
        for task in [pool.submit(in_order), pool.submit(beside)]:
            task.result()
    return done, world


def describe(outcome):
    if isinstance(outcome, Exception):
        return str(outcome)
    return f"status {outcome.returncode}\n{outcome.stdout[-2000:]}\n{outcome.stderr[-3000:]}"


# Tests ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", PLAIN, ids=name_of)
def test_command_runs(results, command):
    """Catches a command that does not do what it says any more, and one that needs a network without its mark."""
    outcome, package = results[0][command], missing_package(command)
    assert getattr(outcome, "returncode", None) == (2 if package else 0), describe(outcome)
    if package:
        assert f"pip install {package}" in outcome.stderr


def test_commands_leave_what_the_pages_say(results):
    """Catches runs that end with status 0 and did nothing, or another thing than the page says."""
    done, world = results
    said = done[COMMANDS[0]].stdout  # where there is no FineWeb-Edu yet
    assert "preset tiny on input.txt" in said and "python fineweb.py --pretokenized" in said
    [torchrun] = [outcome for command, outcome in done.items() if command.text.startswith("torchrun")]
    assert "2 ranks" in torchrun.stdout, "on the CPU, for eight GPUs"
    for path in ("log/log.txt", "log/metrics.jsonl", "log/config.json", "log/curves.png", "log/hf/model.safetensors",
                 "log/archive", "log_ft/best.pt", "my_shards/manifest.json", "my_model/config.json", "both.png",
                 "curves.png", "log_short/log.txt", "log_six/log.txt"):
        assert (world / path).exists(), path
    assert any((world / "log").glob("model_*.pt"))
    plain = "\n".join(c.text for c in PLAIN)
    for flag, path in (("--profile", "log_profile/trace.json"), ("--config", "log_again/log.txt")):
        assert flag not in plain or (world / path).exists(), path
    if find_spec("wandb"):
        assert list((world / "log").rglob("offline-run-*")), "no run of Weights & Biases"


def test_output_of_the_first_command_is_of_its_preset():
    """Catches a first screen whose output is that of an older default run."""
    block = re.search(r"<!-- first run.*?^```\n(.*?)^```$.*?<!-- end of the first run -->", README, re.M | re.S)[1]
    tiny = train_gpt2.TrainConfig.from_preset("tiny")
    steps = [int(step) for step in re.findall(r"^step +(\d+) ", block, re.MULTILINE)]
    assert max(steps) == tiny.max_steps and max(steps) - 1 in steps and 0 in steps
    for kind in ("validation loss:", "sample 0:"):
        assert f"step {tiny.max_steps:5d} | {kind}" in block
    assert len(block.splitlines()) <= 14


def test_export_opens_as_other_programs_open_it(results):
    """Catches folder that the lines of lm_eval, vLLM and llama.cpp name: all three open it by transformers' classes.

    Those programs need a network or a GPU and are not run.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    [line] = [c.text for c in COMMANDS if c.text.startswith("lm_eval")]
    options = argparse.ArgumentParser()  # as lm_eval names them
    for name in ("--model", "--model_args", "--tasks"):
        options.add_argument(name, required=True)
    parsed = options.parse_args(shlex.split(line)[1:])
    assert parsed.model == "hf" and set(parsed.tasks.split(",")) == {"hellaswag", "lambada_openai", "arc_easy"}
    folder = results[1] / parsed.model_args.removeprefix("pretrained=")
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    ids = AutoTokenizer.from_pretrained(folder, local_files_only=True)("The harbour bell").input_ids
    assert len(ids) > 2 and max(ids) < model.config.vocab_size


@pytest.mark.parametrize("command", OURS_BY_NETWORK, ids=name_of)
def test_without_a_network_one_line_says_so(results, command):
    """Catches a stale `[network]`, and a traceback or a hang where there is no network."""
    outcome = results[0][command]
    assert getattr(outcome, "returncode", None) == 2, describe(outcome)
    *before, last = outcome.stderr.strip().splitlines()
    reason = f"pip install {missing_package(command)}" if missing_package(command) else (
        "could not be downloaded|cannot fetch|wandb login")
    assert ": error: " in last and re.search(reason, last), outcome.stderr
    assert all("next try in" in line for line in before), outcome.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.mark or c in REPEATED], ids=name_of)
def test_marked_command_has_a_reason_and_parses(command):
    """Catches marks that hide a command from these tests, flags that are no more, and files that are not there."""
    assert command in OURS_BY_NETWORK + REPEATED or re.search(NEEDS[command.mark], command.text)
    if command.mark == "untested":
        return
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
            given = parse_flags(train_gpt2.TrainConfig, train_gpt2.PRESETS, words[2:])
            train_gpt2.TrainConfig.from_preset(given.pop("preset", "gpt2"), **given)
        for word in words:
            if re.search(r"^[\w/]+\.(txt|yml|sbatch|ipynb|py)$", word) and not word.startswith(("my", "gpt2/")):
                assert (ROOT / word).exists(), word


def test_same_command_has_one_mark():
    """Catches a command that is marked in one place and bare in another."""
    texts = [c.text for c in COMMANDS]
    assert sorted(texts) == sorted(set(texts))


def test_commands_in_sentences_are_commands_of_blocks():
    """Catches commands that escape these tests in running text."""
    prose = "\n".join(line for line in WITHOUT_BLOCKS.splitlines() if not line.startswith("|"))
    known = {c.text for c in COMMANDS} | set((ROOT / "docs/train.sbatch").read_text().splitlines())
    for span in re.findall(r"`((?:srun )?python [^`]+)`", prose):
        span = re.sub(r"\s+", " ", span.removeprefix("srun "))
        assert any(re.search(rf"(^|\s){re.escape(span)}(\s|$)", text) for text in known), span


def test_new_command_is_run_unless_marked():
    """Catches the reading of the pages itself: a command that it overlooks is tested by nobody."""
    page = ("```sh\n# [network] for pip\na.py && b\npython c.py --x 1     # [GPU] says\npython d.py # no\n"
            "python k.py  # [network] [untested] two\n```\n"
            "text `python e.py`\n| `python f.py` | `python g.py --h` [network] and `torchrun i.py` |\n"
            "```python\nj()\nk()\n```\n")
    assert commands_of(page) == [
        ("a.py && b", "network", "sh"), ("python c.py --x 1", "GPU", "sh"), ("python d.py", None, "sh"),
        ("python k.py", "untested", "sh"), ("python g.py --h", "network", "sh"), ("torchrun i.py", None, "sh"),
        ("j()\nk()\n", None, "python"),
    ]
    pages = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")} | {"README.md"}
    assert set(PAGES) == pages - {"docs/MEASURED.md"}
    for page, text in PAGES.items():
        fences = re.findall(r"^```(.*)$", text, re.MULTILINE)
        assert len(fences) % 2 == 0 and set(fences) <= {"sh", "python", ""}, page
    assert len(COMMANDS) > 60 and len(PLAIN) > 35


def requirements_in(file):
    """{package: requirement without blanks} of a requirements file, the files that it includes left out."""
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    return requirements_of(line for line in lines if line and not line.startswith("-"))


def requirements_of(texts):
    return {canonicalize_name(Requirement(text).name): text.replace(" ", "") for text in texts}


def test_set_up_lines():
    """Catches the two lines that set up from nothing: others than the README's reader copy them."""
    setup = [c.text for c in COMMANDS if c.text.startswith("python -m venv")]
    start = "python -m venv .venv && . .venv/bin/activate && pip install -r {} -c constraints.txt && {}"
    assert setup == [start.format("requirements.txt", "python train_gpt2.py"),
                     start.format("requirements-dev.txt", "python -m pytest")]
    assert COMMANDS[0].text == setup[0]
    ci = (ROOT / ".ci/run").read_text()
    assert "-r requirements-dev.txt -c constraints.txt\n" in ci and ci.endswith("\npython -m pytest\n")


def test_requirements_stand_in_pyproject_too():
    """Catches a package that pip installs and uv does not, or the other way round."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert requirements_of(project["dependencies"]) == requirements_in("requirements.txt")
    assert requirements_of(project["optional-dependencies"]["dev"]) == requirements_in("requirements-dev.txt")
    assert "-r requirements.txt\n" in (ROOT / "requirements-dev.txt").read_text()
    assert not (ROOT / "uv.lock").exists() or "uv.lock\n" in (ROOT / ".gitignore").read_text()


def test_constraints_are_what_the_requirements_need():
    """Catches pins of packages that nothing needs, and requirements without a pin."""
    pins = {name: Requirement(text) for name, text in requirements_in("constraints.txt").items()}
    wanted = {**requirements_in("requirements.txt"), **requirements_in("requirements-dev.txt")}
    assert set(wanted) <= set(pins)
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins.values())
    for name, pin in pins.items():
        try:
            if not pin.specifier.contains(metadata.version(name), prereleases=True):
                pytest.skip(f"{name} is not installed at its pin: what it needs may differ")
        except metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed")
    needed, waiting = set(), [Requirement(text) for text in wanted.values()]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, *requirement.extras) in needed:
            continue
        needed.add((name, *requirement.extras))
        for text in metadata.requires(name) or [] if name in pins else []:
            below = Requirement(text)
            environments = [{"python_version": "3.11", "python_full_version": "3.11.0", "extra": extra}
                            for extra in ("", *requirement.extras)]
            if below.marker is None or any(below.marker.evaluate(e) for e in environments):
                waiting.append(below)
    unpinned = {"setuptools"}  # it comes with Python's own tools; torch may cap it
    assert {name for name, *_ in needed} - unpinned == set(pins)


def known_flags():
    """Every flag of this project's commands and of torchrun."""
    parser = add_flags(Parser(), train_gpt2.TrainConfig, train_gpt2.PRESETS)
    known = set(importlib.import_module("torch.distributed.run").get_args_parser()._option_string_actions)
    known |= set(parser._option_string_actions) | {"--shutdown-timeout", "--signals-to-handle"}  # of newer torchruns
    for file in ROOT.glob("*.py"):
        known |= set(re.findall(r"\"(--\w[\w-]*)", file.read_text(encoding="utf-8")))
    return known


def test_flags_exist():
    """Catches flags in running text and tables that no program has."""
    left = "\n".join(line if not line.startswith("|") else line.split("|")[-2] for line in WITHOUT_BLOCKS.splitlines())
    assert set(re.findall(r"(?<![\w-])--\w[\w-]*", left)) <= known_flags()


def test_table_of_flags_has_the_groups_of_help():
    """Catches a group or a size that the table leaves out."""
    parser = add_flags(argparse.ArgumentParser(), train_gpt2.TrainConfig, train_gpt2.PRESETS)
    groups = [group.title for group in parser._action_groups][2:]  # after argparse's own two
    table = re.search(r"\| group \| what is in it \|\n\|.*\n((?:\|.*\n)+)", README)[1]
    assert [row.split("|")[1].strip() for row in table.splitlines()] == groups


def test_map_has_every_file_and_section():
    """Catches a map of the program in which a file or a section is missing."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*.ipynb")]:
        assert re.search(rf"^\|.*`{re.escape(file.name)}`", README, re.MULTILINE), file.name
    source = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    sections = re.findall(r"^# === (.+?) =+$", source, re.MULTILINE)
    sentence = re.search(r"reads from top to bottom: (.+?)\.", README, re.DOTALL)[1]
    assert re.split(r"\s*·\s*", sentence) == sections
    rooms = re.findall(r"^    (\w+)  ", (ROOT / "harness/__init__.py").read_text(), re.MULTILINE)
    assert set(rooms) <= {file.stem for file in (ROOT / "harness").glob("*.py")}


def cells_of(row):
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def test_memory_table_is_the_formula():
    """Catches figures that a change of the model or of the formula has left behind."""
    heads = " | ".join(f"{gb} GB" for gb in memory_formula.CARDS_GB)
    table = re.search(rf"\| model \| {re.escape(heads)} \|\n\|.*\n((?:\|.*\n)+)", PAGES["docs/faq.md"])[1]
    written = {name.split(" (")[0].strip("`"): cells for name, *cells in map(cells_of, table.splitlines())}
    assert written == memory_formula.rows_that_fit()


def test_defaults_that_are_named():
    """Catches numbers in the text that are settings of the program."""
    gpt2, tiny, finetune, muon = (train_gpt2.TrainConfig.from_preset(name, **flags) for name, flags in (
        ("gpt2", {}), ("tiny", {}), ("finetune", {}), ("gpt2", {"optimizer": "muon"})))
    readme = re.sub(r"\s+", " ", README)
    assert f"{gpt2.max_steps:,} steps of {gpt2.total_batch_size:,} tokens" in readme
    assert f"Every {gpt2.val_every} steps come" in readme
    assert gpt2.val_every == gpt2.hellaswag_every == gpt2.sample_every
    assert f"{finetune.max_steps:,} steps of 16 x {finetune.seq_len:,}" in readme
    assert finetune.total_batch_size == 16 * finetune.seq_len and finetune.max_lr == 1e-5 and finetune.dropout == 0.1
    assert f"the first run's is {tiny.seq_len}" in readme
    assert gpt2.save_minutes == 10 and gpt2.keep_checkpoints == 2 and gpt2.checkpoint_every == 5000
    same = re.sub(r"\s+", " ", PAGES["docs/coming-from.md"])
    assert f"{gpt2.beta1}, {gpt2.beta2} and weight decay {gpt2.weight_decay}" in same and gpt2.max_lr == 6e-4
    assert f"6e-4 with {gpt2.warmup_steps} steps of warmup" in same and gpt2.schedule == "cosine"
    assert gpt2.max_lr < 2e-3 < muon.max_lr  # the rate to try first is a higher one, and AdamW's


def test_links_and_lines():
    """Catches links to nowhere, addresses of the outside, and lines too long to read in a terminal."""
    anchors = {page: {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")
                      for head in re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)}
               for page, path in {**{page: ROOT / page for page in PAGES},
                                  "docs/MEASURED.md": ROOT / "docs/MEASURED.md"}.items()}
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            file, _, anchor = target.partition("#")
            path = (ROOT / page).parent / file if file else ROOT / page
            assert path.exists(), (page, target)
            assert not anchor or anchor in anchors[str(path.resolve().relative_to(ROOT))], (page, target)
        assert "://" not in text, page
        for line in text.splitlines():
            assert len(line) <= 120 or line.startswith(("|", "python -m venv")), (page, line)
    assert len(README.splitlines()) <= 250
