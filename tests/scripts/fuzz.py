"""Random command lines, damaged files and combinations: the trainer must run, or exit 2 with one line that says why.

    python tests/scripts/fuzz.py --commands 500 --files 500 --combinations 1000

Each case goes through `main(argv)` in this process, a few steps of a very small model. What counts as a fault: any
exception but those that mean exit 2, a line on stderr that does not hold a value or file that was tampered with, more
than that one line (warnings aside), more than five minutes, a temporary file left, a log that is not whole,
a file written outside the folders given, a resumed run that differs from the undisturbed one although its data and
its checkpoint's contents were not replaced, and a run that goes on although a byte of its shards was. A combination
is a run that was stopped half-way, and up to four things that change no contents: it is resumed, its end is redone, it
is copied, its data are touched or moved, it goes on in another folder or process, it is killed. It must end with the
undisturbed run's log, weights and hf/.

POSIX only (timers, limits). The memory of this process is limited, so that a size that cannot be had fails at once.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import helpers  # noqa: E402

import convert  # noqa: E402
import train_gpt2  # noqa: E402
from harness.cli import choices_of, exit_status, value_type  # noqa: E402

SECONDS, GIGABYTES = 300, 12
STEPS = 6
SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 8, "seq_len": 16, "total_batch_size": 64, "micro_batch_size": 2,
         "max_steps": STEPS, "val_every": 3, "val_tokens": 64, "warmup_steps": 2, "checkpoint_every": 2,
         "save_minutes": 0}


class Hang(BaseException):
    """A case that took too long."""


# ---------------------------------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------------------------------


def run(argv, main=train_gpt2.main):
    """(status, stdout, stderr, fault): the outcome of a command in this process; `fault` is a traceback or None."""
    def alarm(number, frame):
        raise Hang(f"more than {SECONDS} s")

    out, err, fault, status = io.StringIO(), io.StringIO(), None, None
    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = exit_status(main, argv)
    except SystemExit as end:
        status = end.code
    except BaseException:  # noqa: BLE001 (what gets here is what is looked for)
        fault = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return status, out.getvalue(), err.getvalue(), fault


def named(line, suspects):
    """Whether a line holds one of the values, as text or as a number."""
    numbers = {float(n) for n in re.findall(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?", line.replace(",", ""))}
    for value in suspects:
        if " ".join(str(value).split()) in line or str(value)[:40] in line:
            return True
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            if float(value) in numbers:
                return True
    return False


def complaint(outcome, suspects, log_dir):
    """What is wrong with an outcome, in a line, or None."""
    status, _, err, fault = outcome
    if fault:
        return fault.strip().splitlines()[-1]
    lines = [line for line in err.splitlines() if line.strip() and not line.lower().startswith("warning")]
    if status == 2 and len(lines) != 1:
        return f"exit 2 with {len(lines)} lines on stderr: {err[:300]}"
    if status == 2 and not named(lines[0], suspects):
        return f"exit 2 without the value: {lines[0]}"
    if status == 0 and lines:
        return f"exit 0 with lines on stderr: {err[:300]}"
    if status not in (0, 2):
        return f"exit {status}: {err[:300]}"
    return torn(log_dir) if log_dir.is_dir() else None


def torn(log_dir):
    """What in a log folder is not whole, or None."""
    if left := [file for file in log_dir.rglob("*.tmp") if "archive" not in file.parts]:
        return f"left behind: {left[0].name}"
    log = log_dir / "log.txt"
    text = log.read_text(errors="replace") if log.exists() else ""
    if not re.fullmatch(r"(\d+ (train|val|hella) \S+\n)*", text):
        return f"log.txt is not whole: {text[-100:]!r}"
    return None


# ---------------------------------------------------------------------------------------------------------------
# Command lines
# ---------------------------------------------------------------------------------------------------------------

ODD = ["", " ", "x", "-1", "0", "1", "2", "3", "7", "64", "0.5", "1e3", "1e-9", "-0.0", "nan", "inf", "-inf", "1e999",
       "9" * 30, "9" * 5000, "0x10", "1_0", "१", "½", "True", "none", "null", "auto", "newest", "a b", "it's", 'a"b',
       "naïve-Ω-日本", "..", ".", "/", "~", "/dev/null", "/proc/self/mem", "$(touch pwned)", "; rm x", "%s%n",
       "a" * 300, "a\nb", "\t", "--", "-", "--seed", "\udcff"]
COSTLY = {  # valid, but long: these are kept to sizes that take a second
    "max_steps": 8, "seq_len": 64, "n_layer": 3, "n_head": 8, "n_embd": 64, "total_batch_size": 1024, "num_samples": 3,
    "sample_tokens": 20, "micro_batch_size": 64, "dist_timeout": 1e9,
}


def random_command(rng, bench, log_dir):
    """(argv, values that were tampered with) of a command line with one to three things wrong or unusual."""
    changes, suspects, extra = dict(SMALL), [], []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        f = rng.choice(fields(train_gpt2.TrainConfig))
        limit, kind = f.metadata, value_type(f)
        way = rng.random()
        if way < 0.08:
            extra += rng.choice([[f"--{f.name}x", "1"], [f"--{f.name[:-1]}", "1"], ["stray"], ["-z"], [f"--{f.name}"],
                                 [f"--{f.name}=1=2"], ["--no-" + f.name], ["--help_me"], ["--"], ["-"]])
            suspects += [part for part in extra if part != "1"] + [f.name]
            continue
        if f.name in ("compile", "log_dir", "cache_dir", "device", "tracker", "wandb_project") and way < 0.8:
            continue  # a compile costs half a minute; the others would write elsewhere
        if kind is bool:
            value = rng.choice([True, False]) if f.name != "compile" else False
        elif choices_of(f) and way < 0.5:
            value = rng.choice(choices_of(f))
        elif limit["minimum"] is not None and way < 0.6:
            largest = COSTLY.get(f.name, limit["maximum"])
            value = rng.choice([limit["minimum"] - 1, limit["minimum"], 5 if largest is None else largest,
                                5 if limit["maximum"] is None else limit["maximum"] + 1, 2**63,
                                rng.randint(1, 9), round(rng.uniform(0, 1), 3)])
        elif f.name in ("data", "val_data", "init_from", "resume", "hellaswag_path") and way < 0.6:
            value = rng.choice(bench.paths)
        else:
            value = rng.choice(ODD)
        if f.name in ("log_dir", "cache_dir"):
            value = f"{log_dir.parent}/{value.strip('/.~') or 'x'}" if isinstance(value, str) else value
        if f.name in COSTLY and not isinstance(value, str) and value < 2**63:
            value = min(value, COSTLY[f.name])
        if f.name == "epochs":
            with contextlib.suppress(ValueError):
                value = min(float(value), 0.5) if isinstance(value, str) else min(value, 0.5)
        if f.name == "model" and value in train_gpt2.MODELS:
            continue
        changes[f.name] = value
        suspects += [value, f.name, *(["gpt2"] if value == "finetune" else [])]  # whose weights it wants
    flags = {"data": bench.data, "log_dir": log_dir, "cache_dir": bench.cache, **changes}
    argv = helpers.tiny_flags(flags.pop("data"), flags.pop("log_dir"), **flags)
    if "epochs" in changes and "max_steps" not in suspects:
        i = argv.index("--max_steps")
        del argv[i : i + 2]
    return argv + extra, suspects


# ---------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------


def damaged(data, rng):
    """`data` (bytes) with one thing done to it."""
    size, way = len(data), rng.randrange(9)
    at = rng.randrange(max(1, size))
    if way == 0:
        return data[:at]
    if way == 1:
        return data[:-1] if rng.random() < 0.5 else data[: size // 2 * 2 - 2]
    if way == 2:
        return b""
    if way == 3:
        return data + rng.randbytes(rng.choice([1, 2, 1000]))
    if way == 4:  # flipped bits
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 8])):
            changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if way == 5:  # a flipped bit in the first bytes, where headers are
        changed = bytearray(data)
        changed[rng.randrange(min(size, 128))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if way == 6:  # what a power cut leaves
        return data[:at] + bytes(min(4096, size - at)) + data[at + 4096 :]
    if way == 7:
        return data[:at] + rng.randbytes(rng.choice([1, 7, 512])) + data[at:]
    return rng.randbytes(rng.choice([1, 2, 100, 3000]))


HOSTILE = [None, True, -1, 0, 0.5, 2**63, 10**30, 1e308, "", "x", [], {}, [[]], {"a": {}}, "../../../etc/passwd",
           "\ud800"]


def nested(depth):
    return "[" * depth + "]" * depth


def damaged_json(text, rng):
    """JSON with a key gone, a value replaced, or text that is hard on a parser."""
    way = rng.random()
    if way < 0.2:
        return rng.choice([nested(100_000), '{"files": ' + nested(5000) + "}", '{"a":' * 50_000, "9" * 5000, "1e999",
                           '"' + "a" * 10**6 + '"', "NaN", "null", "[]", "\ufeff{}", '{"a": 1, "a": 2}'])
    content = json.loads(text)
    place = content
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.6:
            place = place[key]
            continue
        break
    if isinstance(place, dict) and rng.random() < 0.3:
        del place[key]
    else:
        place[key] = rng.choice(HOSTILE)
    return json.dumps(content)


def damaged_checkpoint(path, rng):
    """Replace something in a checkpoint and save it as a sound file; what was changed, in words."""
    content = torch.load(path, weights_only=True)
    place, where = content, ""
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        where += f"/{key}"
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.75:
            place = place[key]
            continue
        break
    if isinstance(place, dict) and rng.random() < 0.4:
        del place[key]
        what = "gone"
    else:
        tensors = torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.full((), float("nan"))
        what = rng.choice([*HOSTILE, *tensors])
        place[key] = what
    torch.save(content, path)
    return f"{where} = {str(what)[:40]}"


def random_file(rng, bench, folder):
    """(argv, suspects, log folder, what was done, the log that a run must end with): one damaged file.

    That log is None where any will do, and "" where the run must be refused.
    """
    log_dir, changes, expected = folder / "log", dict(SMALL), None
    kind = rng.choice(["shard", "shard", "npy kind", "bin", "manifest", "text", "jsonl", "parquet", "checkpoint",
                       "checkpoint", "checkpoint value", "only checkpoint", "logs", "hf config", "hf weights",
                       "hellaswag", "resumed shard", "resumed shard"])
    if kind == "resumed shard":
        return resumed_shard(rng, bench, folder)
    data = bench.data
    if kind in ("shard", "bin", "manifest", "npy kind"):
        data = folder / "data"
        shutil.copytree(bench.data, data)
        if kind == "bin":
            for file in data.glob("*.npy"):
                tokens = np.load(file)
                head = np.zeros(256, np.int32)
                head[:3] = 20240520, 1, len(tokens)
                file.with_suffix(".bin").write_bytes(head.tobytes() + tokens.tobytes())
                file.unlink()
            (data / "manifest.json").unlink()
        victim = data / "manifest.json" if kind == "manifest" else rng.choice(sorted(data.glob("toy_*")))
    elif kind in ("text", "jsonl", "parquet"):
        victim = data = folder / bench.texts[kind].name
        shutil.copy(bench.texts[kind], data)
        changes["cache_dir"] = folder / "cache"
    elif kind in ("checkpoint", "checkpoint value", "only checkpoint", "logs"):
        shutil.copytree(bench.started, log_dir)
        checkpoints = sorted(log_dir.glob("model_*.pt"))
        victim = rng.choice(checkpoints) if kind == "checkpoint" else checkpoints[-1]
        if kind == "only checkpoint":
            for file in checkpoints[:-1]:
                file.unlink()
        if kind == "logs":
            victim = log_dir / rng.choice(["log.txt", "metrics.jsonl", "config.json"])
        changes["resume"] = rng.choice(["auto", "newest"])
        expected = bench.log if kind in ("checkpoint", "only checkpoint") else None
    elif kind in ("hf config", "hf weights"):
        shutil.copytree(bench.finished / "hf", folder / "hf")
        victim = folder / "hf" / ("config.json" if kind == "hf config" else "model.safetensors")
        changes |= {"init_from": folder / "hf", "n_layer": None, "n_head": None, "n_embd": None}
    else:
        victim = folder / "hellaswag.jsonl"
        shutil.copy(bench.questions, victim)
        changes |= {"hellaswag_path": victim, "hellaswag_every": 3}
    if kind == "checkpoint value":
        what = damaged_checkpoint(victim, rng)
    elif kind == "npy kind":
        arrays = {"object": np.array([{}, print], dtype=object), "float": np.zeros(500), "none": np.zeros(0, np.uint16),
                  "two": np.zeros((50, 50), np.uint16), "big": np.zeros(500, ">u2"), "scalar": np.uint16(3),
                  "beyond": np.full(5000, 60000, np.uint16)}
        what = rng.choice(list(arrays))
        np.save(victim, arrays[what], allow_pickle=True)
    elif kind in ("manifest", "hf config", "hellaswag") and rng.random() < 0.7:
        lines = victim.read_text().splitlines() if kind == "hellaswag" else [victim.read_text()]
        i = rng.randrange(len(lines))
        lines[i] = damaged_json(lines[i], rng)
        victim.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        what = lines[i][:80]
    else:
        before = victim.read_bytes()
        victim.write_bytes(damaged(before, rng))
        what = f"{len(before)} bytes, now {victim.stat().st_size}"
    argv = helpers.tiny_flags(data, log_dir, **{"cache_dir": bench.cache, **changes})
    if "resume" in changes:
        argv = ["--resume", changes["resume"], "--log_dir", log_dir, "--cache_dir", bench.cache]
    suspects = [victim, victim.name, data, log_dir if "resume" in changes else victim.parent]
    return list(map(str, argv)), suspects, log_dir, f"{kind}: {victim.name}: {what}", expected


def resumed_shard(rng, bench, folder):
    """As `random_file`: a resume whose shards were moved, and one of them changed, but for one case in six."""
    log_dir, data = folder / "log", folder / "data"
    shutil.copytree(bench.started_large, log_dir)
    shutil.copytree(bench.large, data)
    victim = rng.choice(sorted(data.glob("toy_*")))
    before, way = victim.read_bytes(), rng.randrange(6)
    if way == 0:
        after = before
    elif way < 4:  # a few tokens replaced by others, anywhere: length and header stay
        at = rng.randrange(128, len(before), 2)
        tokens = np.array([rng.randrange(50257) for _ in range(rng.choice([1, 10, 1000]))], "<u2").tobytes()
        after = (before[:at] + tokens)[: len(before)] + before[at + len(tokens) :]
    elif way == 4:
        after = damaged(before, rng)
    else:  # another shard under this name
        after = rng.choice(sorted(data.glob("toy_*"))).read_bytes()
    victim.write_bytes(after)
    if rng.random() < 0.5:  # the time of change can be set, and proves nothing
        os.utime(victim, ns=(0, (bench.large / victim.name).stat().st_mtime_ns))
    changed = sum(x != y for x, y in zip(before, after)) + abs(len(before) - len(after))
    argv = ["--resume", "--data", data, "--log_dir", log_dir, "--cache_dir", bench.cache]
    return (list(map(str, argv)), [data, victim.name], log_dir, f"resumed shard: {victim.name}: {changed} bytes differ",
            "" if after != before else bench.log_large)


# ---------------------------------------------------------------------------------------------------------------
# Combinations
# ---------------------------------------------------------------------------------------------------------------


def combination(rng, bench, folder):
    """(what was done, what is wrong or None) of a run that was stopped half-way, disturbed, and resumed to its end."""
    log_dir, data, done = folder / "log", shutil.copytree(bench.data, folder / "data"), []
    shutil.copytree(bench.started, log_dir)
    start = ["--cache_dir", bench.cache, "--resume"]
    for number in range(rng.randint(1, 4)):
        way = rng.choice(["resume", "redo", "copy", "touch data", "move data", "other folder", "kill", "hf of another"])
        done.append(way)
        resume, outcome = [*start, "--data", data, "--log_dir", log_dir], None
        checkpoints = sorted(log_dir.glob("model_*.pt"))
        if way == "resume":
            outcome = go_on(rng, resume)
        elif way == "redo":
            for file in checkpoints[rng.randint(1, 2) :]:
                file.unlink()
            outcome = go_on(rng, resume)
        elif way == "copy":
            log_dir = shutil.copytree(log_dir, folder / f"copy {number}")
        elif way == "touch data":
            for file in rng.sample(sorted(data.iterdir()), 2):
                os.utime(file, (1, 1) if rng.random() < 0.5 else None)
        elif way == "move data":
            data = shutil.copytree(data, folder / f"data {number}")
        elif way == "other folder":
            log_dir = folder / f"other {number}"
            outcome = go_on(rng, [*start, rng.choice(checkpoints), "--data", data, "--log_dir", log_dir])
        elif way == "kill":
            before = partial(helpers.strike, name=rng.choice(["train_step", "validate", "checkpoint.write"]), call=1)
            helpers.run_trainer(resume, before)
        else:  # a model of the same step and another run
            shutil.rmtree(log_dir / "hf", ignore_errors=True)
            shutil.copytree(bench.others / "hf", log_dir / "hf")
            outcome = go_on(rng, [*start, checkpoints[0], "--data", data, "--log_dir", log_dir])
        if outcome and (wrong := complaint(outcome, [], log_dir) or outcome[0] and outcome[2]):
            return " > ".join(done), wrong
    outcome = go_on(rng, [*start, "--data", data, "--log_dir", log_dir])
    wrong = complaint(outcome, [], log_dir) or (outcome[2] if outcome[0] else None)
    if not wrong and not bench.log.endswith((log_dir / "log.txt").read_text() or "no rows"):
        wrong = "the log differs from the undisturbed run's"  # of which another folder has only the later rows
    for name in (f"model_{STEPS:05d}.pt", "hf"):
        if not wrong and not same_weights(log_dir / name, bench.finished / name):
            wrong = f"{name} is another model"
    return " > ".join(done), wrong


def go_on(rng, argv):
    """The outcome of a command, in this process or, one time in five, in another one."""
    argv = list(map(str, argv))
    if rng.random() < 0.8:
        return run(argv)
    ended = helpers.run_trainer(argv)
    return ended.returncode, ended.stdout, ended.stderr, ended.stderr if ended.returncode not in (0, 2) else None


def same_weights(ours, due):
    ours, due = convert.read_source(str(ours)).tensors, convert.read_source(str(due)).tensors
    return ours.keys() == due.keys() and all(torch.equal(ours[name], due[name]) for name in due)


# ---------------------------------------------------------------------------------------------------------------
# All cases
# ---------------------------------------------------------------------------------------------------------------


class Bench:
    """Sound files to damage: shards, texts, questions, a finished run and one that stopped half-way."""

    def __init__(self, work):
        self.work, self.cache = work, work / "cache"
        self.data = helpers.make_shards(work / "data", train=(1500, 700), val=(400,))
        entries = {f.name: {"tokens": len(np.load(f)), "sha256": hashlib.sha256(f.read_bytes()).hexdigest()}
                   for f in sorted(self.data.glob("*.npy"))}
        (self.data / "manifest.json").write_text(json.dumps({
            "format_version": 1, "source": "toy", "revision": None, "name": "toy", "tokenizer": "gpt2",
            "dtype": "uint16", "vocab_size": 50257, "shard_size": 1000, "files": entries, "complete": True,
            "expected_shards": 3, "documents": 1, "skipped": 0, "next": None}))
        words = " ".join(f"word{i % 97}" for i in range(1500))
        self.texts = {kind: work / f"words.{end}" for kind, end in
                      (("text", "txt"), ("jsonl", "jsonl"), ("parquet", "parquet"))}
        self.texts["text"].write_text(words)
        documents = [words[i : i + 500] for i in range(0, len(words), 500)]
        self.texts["jsonl"].write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), self.texts["parquet"])
        self.questions = work / "questions.jsonl"
        self.questions.write_text("".join(json.dumps({
            "ind": i, "activity_label": "Cooking", "ctx_a": "A man", "ctx_b": "he", "ctx": "A man he", "label": i % 4,
            "endings": ["cooks.", "runs.", "eats.", "reads a book."]}) + "\n" for i in range(6)))
        self.finished, self.started, self.log = self.run(self.data, "finished", "started")
        self.others, *_ = self.run(self.data, "others", "others_started", seed=2)
        # large beside the 64 KiB at both ends that a fingerprint also has, so that most changes lie between them
        self.large = helpers.make_shards(work / "large", train=(400_000, 300_000), val=(200_000,))
        self.run(self.large, "first", "first_started")  # leaves the SHA-256 in the cache: the next has it at once
        _, self.started_large, self.log_large = self.run(self.large, "finished_large", "started_large")
        self.paths = [str(p) for p in (self.data, *self.texts.values(), self.questions, self.finished, self.work,
                                       self.finished / "hf", next(self.data.glob("*train*")),
                                       self.finished / "model_00004.pt", self.data / "manifest.json")]
        os.symlink("nowhere", work / "broken.txt")
        os.mkfifo(work / "pipe.txt")
        self.paths += [str(work / "broken.txt"), str(work / "broken.txt" / "below")]

    def run(self, data, *names, **changes):
        """(finished, started, log): a whole run, the same as a kill after its checkpoint of step 4 leaves it."""
        finished, started = (self.work / name for name in names)
        assert run(helpers.tiny_flags(data, finished, cache_dir=self.cache, **SMALL, **changes))[0] == 0
        shutil.copytree(finished, started)
        (started / f"model_{STEPS:05d}.pt").unlink()
        shutil.rmtree(started / "hf")
        return finished, started, (finished / "log.txt").read_text()


def main(argv=None):
    """Run all cases; returns 1 when one was a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commands", type=int, default=500)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--combinations", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="only the case of this number, told at length")
    args = parser.parse_args(argv)
    began, work = time.monotonic(), Path(tempfile.mkdtemp(prefix="fuzz_"))
    os.chdir(work)
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES * 2**30, GIGABYTES * 2**30))
    torch.set_num_threads(1)
    bench = Bench(work)
    sound = {file: file.stat().st_mtime_ns for file in work.rglob("*")
             if file.is_file() and bench.cache not in file.parents}
    listing, outcomes, faults = [*work.iterdir(), bench.cache], Counter(), []
    for number in range(args.commands + args.files + args.combinations):
        rng = random.Random(f"{args.seed} {number}")
        if args.only not in (None, number):
            continue
        folder = work / f"case {number}"
        folder.mkdir()
        kind = "command" if number < args.commands else "file"
        if number >= args.commands + args.files:
            kind, outcome, log_dir = "combination", [None], folder / "log"
            what, wrong = combination(rng, bench, folder)
        elif number < args.commands:
            log_dir, expected = folder / "log", None
            command, suspects = random_command(rng, bench, log_dir)
            what = " ".join(map(repr, suspects))[:200]
        else:
            command, suspects, log_dir, what, expected = random_file(rng, bench, folder)
        if kind != "combination":
            outcome = run(command)
            wrong = complaint(outcome, suspects, log_dir)
        if not wrong and outcome[0] == 0 and expected is not None and (log_dir / "log.txt").read_text() != expected:
            wrong = "the log differs from the undisturbed run's" if expected else "trained on shards that had changed"
        changed = [file for file, at in sound.items() if not file.exists() or file.stat().st_mtime_ns != at]
        strange = [path.name for path in work.iterdir() if path not in (*listing, folder)]
        if changed or strange:
            wrong = wrong or f"touched {[str(c) for c in changed][:2] + strange[:2]}"
            sound = {file: at for file, at in sound.items() if file not in changed}
        outcomes[kind, outcome[0]] += 1
        if wrong or args.only is not None:
            faults.append(number)
            print(f"case {number}: {what}\n    {wrong}", flush=True)
        if args.only is not None:
            print(command, *outcome, sep="\n")
        shutil.rmtree(folder, ignore_errors=True)
    for (kind, status), n in sorted(outcomes.items(), key=str):
        print(f"{kind}s: exit {status}: {n}")
    print(f"{len(faults)} faults in {sum(outcomes.values())} cases, {time.monotonic() - began:.0f} s")
    os.chdir("/")
    shutil.rmtree(work)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
