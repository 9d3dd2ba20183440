"""Many ranks: the same run for every world size, and none that hangs, tears or lies when one of them fails.

Real processes over gloo on the CPU, one thread each. Most are forked (see helpers.py); the torchrun agents and the
job script run as a user runs them.
"""

import errno
import os
import re
import signal
import stat
import subprocess
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ROOT,
    TRAINER,
    at_call,
    finish,
    free_port,
    log_rows,
    make_shards,
    metric_rows,
    run_ranks,
    start_ranks,
    strike,
    tiny_flags,
    write_questions,
)

import harness.text
from harness.checkpoint import files as checkpoint_files
from harness.checkpoint import read as read_checkpoint
from harness.cli import UserError
from harness.ranks import Ranks, rank_from_environment

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and fork are POSIX's")

T = 16
SMALL = {"n_embd": 16, "seq_len": T, "dist_timeout": 30}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards of 400 sequences in all, of which no two are alike, and a validation split of 50."""
    return make_shards(tmp_path_factory.mktemp("shards"), train=(4000, 2416), val=(810,))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """24 rows in HellaSwag's schema, several batches of them."""
    return write_questions(tmp_path_factory.mktemp("hellaswag") / "hellaswag_val.jsonl", 24)


def on_rank(rank, hook, trainer):
    """For `before=`: apply `hook` in the process of that rank only."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == str(rank):
        hook(trainer)


def struck(rank, number, name, call):
    """A `before` by which signal `number` comes to `rank` when it calls the trainer's `name` for the `call`-th time."""
    return partial(on_rank, rank, partial(strike, name=name, call=call, number=number))


def statuses(results):
    return [result.returncode for result in results]


def values(log_dir, *kinds):
    """{(step, kind): value} of log.txt, in which every row is once."""
    rows = log_rows(log_dir)
    assert len({(step, kind) for step, kind, _ in rows}) == len(rows), "a row is there twice"
    return {(step, kind): float(value) for step, kind, value in rows if not kinds or kind in kinds}


def assert_same_run(log_dir, reference):
    """Both logs have the same rows; losses agree to 1e-4, validation to 2e-4, HellaSwag to the last digit, norms."""
    ours, theirs = values(log_dir), values(reference)
    assert list(ours) == list(theirs)
    limit = {"train": 1e-4, "val": 2e-4, "hella": 0}
    far = {row: (ours[row], theirs[row]) for row in ours if abs(ours[row] - theirs[row]) > limit[row[1]]}
    assert not far
    norms = [[row["grad_norm"] for row in metric_rows(folder, "train")] for folder in (log_dir, reference)]
    assert np.allclose(*norms, rtol=1e-3)


def no_leftovers(log_dir):
    """No torn file: every checkpoint opens, and no temporary one is left."""
    assert not list(Path(log_dir).glob(".*.tmp"))
    for file in checkpoint_files(log_dir):
        read_checkpoint(file)


# --- The same run on any number of ranks -----------------------------------------------------------------------------


def test_elastic_resume(shards, questions, tmp_path):
    """4 ranks, one killed in a step; resumed with 2, stopped by a signal; resumed with 1: as one run of one rank.

    They make 2, 8 and 2 micro-steps an update, the one run 4. Catches data replayed or skipped, rows lost or doubled,
    a rank's share that repeats another's, a loss or gradient that is averaged by the wrong number; a validation loss,
    HellaSwag counts and samples that depend on ranks or micro-batch. (The sequences themselves: test_loader.py.)
    """
    flags = {**SMALL, "total_batch_size": 16 * T, "micro_batch_size": 4, "max_steps": 12, "val_every": 3,
             "hellaswag_every": 4, "hellaswag_path": questions, "sample_every": 4, "num_samples": 3,
             "sample_tokens": 5, "checkpoint_every": 4}
    straight, log = tmp_path / "straight", tmp_path / "log"
    assert statuses(run_ranks(tiny_flags(shards, straight, **flags), 1)) == [0]

    in_twos = tiny_flags(shards, log, **{**flags, "micro_batch_size": 2})
    killed = run_ranks(in_twos, 4, struck(2, signal.SIGKILL, "lr_at", call=7))
    assert statuses(killed) == [1, 1, -signal.SIGKILL, 1]
    assert "lost another rank" in killed[0].stderr
    assert max(values(log, "train"))[0] == 5

    resume = ["--resume", "--log_dir", str(log), "--micro_batch_size"]
    stopped = run_ranks([*resume, "1"], 2, struck(1, signal.SIGTERM, "lr_at", call=5))
    assert statuses(stopped) == [128 + signal.SIGTERM] * 2, stopped[0].stderr
    assert (log / "rolling_00009.pt").exists()
    assert max(values(log, "train"))[0] == 8

    assert statuses(run_ranks([*resume, "8"], 1)) == [0]
    no_leftovers(log)
    assert_same_run(log, straight)
    samples = [[(row["step"], row["texts"]) for row in metric_rows(folder, "sample")] for folder in (log, straight)]
    assert samples[0] == samples[1]


# --- Launchers -------------------------------------------------------------------------------------------------------


def watch_writes(file, trainer):
    """Note every file of the run that this process opens for writing, makes, moves or deletes."""
    def hook(event, args):
        if event == "open" and isinstance(args[0], str) and (args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or \
                event in ("os.rename", "os.remove", "os.mkdir"):
            os.write(notes, f"{event} {args[0]}\n".encode())

    notes = os.open(file, os.O_WRONLY | os.O_CREAT)
    sys.addaudithook(hook)


def test_srun_without_torchrun(shards, tmp_path):
    """In the environment of an srun step of two tasks the ranks find each other; only rank 0 writes.

    Guards: two runs of one rank each, in one folder; a rank that leaves files of its own beside the logs.
    """
    log, wrote = tmp_path / "run" / "log", tmp_path / "wrote"
    step = {"SLURM_STEP_NUM_TASKS": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    flags = tiny_flags(shards, log, **SMALL, max_steps=2, checkpoint_every=1, sample_every=1)
    tasks = [start_ranks(flags, env={**step, "SLURM_PROCID": r, "SLURM_LOCALID": r},
                         before=partial(on_rank, 1, partial(watch_writes, wrote)))[0] for r in range(2)]
    results = [finish(task, 60) for task in tasks]
    assert statuses(results) == [0, 0], results[0].stderr
    assert "2 ranks" in results[0].stdout and not results[1].stdout
    assert (log / "model_00002.pt").exists()
    assert not [line for line in wrote.read_text().splitlines() if str(tmp_path) in line]


def torchrun(script, tmp_path, ranks=2, timeout=120):
    """`script`, Python after `import train_gpt2`, run as `torchrun --standalone` runs it; the finished process."""
    file = tmp_path / "script.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{script}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(file)]
    return subprocess.run(launch, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, text=True, timeout=timeout,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_train_twice_under_torchrun(shards, tmp_path):
    """Catches a second train() of a process that finds the first one's addresses in torchrun's store, and hangs."""
    done = torchrun(f"""
from train_gpt2 import TrainConfig, train
for run in range(2):
    train(TrainConfig.from_preset("gpt2", data={str(shards)!r}, log_dir=f"log{{run}}", n_layer=1, n_head=2, n_embd=16,
          seq_len=16, total_batch_size=64, micro_batch_size=2, max_steps=2, val_tokens=64, hellaswag_every=0,
          sample_every=0, compile=False, device="cpu", dtype="float32", dist_timeout=20))
    import signal, threading
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
""", tmp_path)
    assert done.returncode == 0, done.stdout
    assert log_rows(tmp_path / "log0") == log_rows(tmp_path / "log1")
    assert done.stdout.count("done: 2 steps") == 2


OMPI = {"OMPI_COMM_WORLD_RANK": 5, "OMPI_COMM_WORLD_LOCAL_RANK": 1, "OMPI_COMM_WORLD_SIZE": 8}


@pytest.mark.parametrize("env, place", [
    (OMPI, (5, 1, 8)),
    ({**OMPI, "RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 1}, (0, 0, 1)),
    ({"RANK": 0, "WORLD_SIZE": 1}, (0, 0, 1)),  # as Kubernetes sets them
    ({"RANK": 0, "WORLD_SIZE": 2}, "LOCAL_RANK"),
    ({"RANK": 0}, "launcher must set"),
    ({"RANK": "zero", "LOCAL_RANK": 0, "WORLD_SIZE": 2}, "launcher must set RANK"),
    ({"SLURM_STEP_NUM_TASKS": 2}, "launcher must set SLURM_PROCID"),
    ({"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2}, "MASTER_ADDR is not set: use torchrun"),
])
def test_places_by_launcher(monkeypatch, env, place):
    """Catches ranks of mpirun that each take themselves for a run of one, a world of one that is refused, and, for
    half an environment, a KeyError or a wait without end."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    if isinstance(place, str):
        with pytest.raises(UserError, match=place):
            Ranks(*rank_from_environment())
    else:
        assert rank_from_environment() == place


def test_two_machines_and_usr1(shards, tmp_path):
    """Two torchrun agents on one host, as on two machines; SIGUSR1 to the second one's agent saves the whole run.

    Guards: local ranks taken for ranks, and a signal that stops one machine while the other waits.
    """
    log = tmp_path / "log"
    flags = tiny_flags(shards, log, **SMALL, max_steps=100000, val_every=0)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
              f"--rdzv_endpoint=localhost:{free_port()}", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", str(TRAINER)]
    agents = [subprocess.Popen(launch + flags, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    try:
        deadline = time.monotonic() + 120
        while not (log / "log.txt").exists() or (log / "log.txt").read_text().count("\n") < 3:
            assert agents[0].poll() is None and time.monotonic() < deadline, "no three rows"
            time.sleep(0.1)
        agents[1].send_signal(signal.SIGUSR1)
        outputs = [agent.communicate(timeout=90)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert all(agent.returncode for agent in agents)
    said = "\n".join(outputs)
    at = int(re.search(r"stopped by SIGUSR1 at step (\d+), saved", said)[1])
    assert said.count("stopped by") == 1
    assert (log / f"rolling_{at:05d}.pt").exists()
    assert max(values(log, "train"))[0] == at - 1


def test_job_script_requeues(tmp_path):
    """docs/train.sbatch with stand-ins for SLURM's commands: USR1 reaches the ranks and the job queues itself again.

    Guards: a requeue of a finished or failed job, an interrupted `wait` that leaves the ranks behind, the wrong host.
    """
    tools = {
        "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" >> calls; fi',
        "srun": 'echo "srun $MASTER_ADDR" >> calls; trap "sleep 0.5; echo saved >> calls; exit 138" USR1\n'
                'touch started; [ "$MODE" = stop ] || exit "$MODE"; while :; do sleep 0.1; done',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    for mode, status in (("0", 0), ("1", 1), ("stop", 0)):
        for name in ("calls", "started"):
            (tmp_path / name).unlink(missing_ok=True)
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "MODE": mode, "SLURM_JOB_ID": "4711",
               "SLURM_JOB_NODELIST": "node[7-8]"}
        job = subprocess.Popen(["bash", str(ROOT / "docs" / "train.sbatch")], env=env, cwd=tmp_path)
        if mode == "stop":
            while not (tmp_path / "started").exists():
                time.sleep(0.05)
            job.send_signal(signal.SIGUSR1)
        assert job.wait(30) == status
        calls = (tmp_path / "calls").read_text().splitlines()
        assert calls == ["srun node7"] + (["saved", "requeue 4711"] if mode == "stop" else [])


# --- Failure ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_group_that_does_not_come_together(shards, tmp_path, rank):
    """A rank whose fellow never starts says within --dist_timeout what to check. Guards: half an hour of silence."""
    port = free_port()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    flags = tiny_flags(shards, tmp_path / "log", **SMALL | {"dist_timeout": 2})
    [result] = [finish(start_ranks(flags, env=place)[0], timeout=40)]
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]  # torch logs its own tries above
    assert "--dist_timeout 2 s" in line and f"127.0.0.1:{port}" in line and "check" in line
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("changes, part", [
    ({"max_steps": 0}, "--max_steps 0"),  # found by every rank before they meet
    ({"micro_batch_size": 3}, "--micro_batch_size 3"),  # by rank 0 alone
    ({"device": "cuda"}, "--device cuda"),  # by every rank after they met
    ({"resume": "newest"}, "--resume"),
    ({"bogus": 1}, "--bogus"),
])
def test_mistakes_are_reported_once(shards, tmp_path, changes, part):
    """A user's mistake ends all ranks with status 2 and is printed by rank 0 alone."""
    import torch

    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    results = run_ranks(tiny_flags(shards, tmp_path / "log", **{**SMALL, **changes}), 2, timeout=60)
    assert statuses(results) == [2, 2]
    assert part in results[0].stderr
    assert not results[1].stderr + results[1].stdout


def test_data_that_only_one_machine_has(tmp_path):
    """A rank that does not find rank 0's data ends all, reported once. Guards: machines that train on other files."""
    make_shards(tmp_path / "here" / "toy")
    make_shards(tmp_path / "there" / "toy", seed=1)
    elsewhere = partial(on_rank, 1, partial(_chdir, tmp_path / "there"))
    results = run_ranks(tiny_flags("toy", tmp_path / "log", **SMALL), 2, elsewhere, cwd=tmp_path / "here", timeout=60)
    assert statuses(results) == [2, 2]
    assert "rank 1 does not find rank 0's files" in results[0].stderr and not results[1].stderr


def _chdir(folder, trainer):
    os.chdir(folder)


def test_help_is_printed_once():
    """`torchrun ... --help` shows the flags once, not once a rank."""
    results = run_ranks(["--help"], 2, timeout=60)
    assert statuses(results) == [0, 0]
    assert "--total_batch_size" in results[0].stdout and not results[1].stdout + results[1].stderr


ERRORS = {
    "mistake": UserError("the reason of it all"),
    "fault": ValueError("the reason of it all"),
    "connection": RuntimeError("the connection of this layer to its peer timed out"),  # a fault, by gloo's words
    "full disk": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
}


def fail(name, call, kind, trainer):
    """Make the `call`-th call of the trainer's `name` raise."""
    def act():
        raise ERRORS[kind]

    at_call(trainer, name, call, act)


def test_full_disk_at_the_end(shards, tmp_path):
    """The disk is full at the last export: all ranks leave with 2, and the user reads why and how to resume."""
    results = run_ranks(tiny_flags(shards, tmp_path / "log", **SMALL, max_steps=1), 2,
                        partial(fail, "GPT.save_pretrained", 1, "full disk"), timeout=60)
    assert statuses(results) == [2, 2]
    assert "hf is not written" in results[0].stderr and not results[1].stderr


@pytest.mark.parametrize("rank, kind, name, call", [
    (1, "mistake", "lr_at", 1),  # say, a shard that only this machine cannot read
    (1, "connection", "GPT.forward", 3),
    (0, "fault", "checkpoint.write", 1),  # while the others wait for it
    (1, "fault", "build", 1),  # before the first step
])
def test_one_rank_fails(shards, tmp_path, rank, kind, name, call):
    """What one rank raises is what the user reads, once; the others end too, and say that they are not the cause.

    Catches ranks that wait for a dead one, a cause that drowns in its consequences, and a RuntimeError of the model's
    that is taken for gloo's own by its words and loses its traceback.
    """
    results = run_ranks(tiny_flags(shards, tmp_path / "log", **SMALL, checkpoint_every=1), 2,
                        before=partial(on_rank, rank, partial(fail, name, call, kind)), timeout=60)
    failed, other = results[rank], results[1 - rank]
    assert failed.returncode == (2 if kind == "mistake" else 1)
    assert failed.stderr.count(f"{'' if kind == 'mistake' else type(ERRORS[kind]).__name__ + ': '}{ERRORS[kind]}") == 1
    assert ("Traceback" in failed.stderr) == (kind != "mistake") and "lost another rank" not in failed.stderr
    assert other.returncode == 1 and "lost another rank" in other.stderr and "Traceback" not in other.stderr


def test_all_ranks_fail_alike(shards, tmp_path):
    """Catches an error of all ranks that each takes for the loss of the other, so that nobody prints a traceback."""
    before = partial(fail, "GPT.forward", 3, "connection")
    results = run_ranks(tiny_flags(shards, tmp_path / "log", **SMALL, val_every=0), 2, before, timeout=60)
    assert statuses(results) == [1, 1]
    assert all("Traceback" in end.stderr and "lost another rank" not in end.stderr for end in results)


def bad_shard(call, trainer):
    """Let rank 1's `call`-th read of the training shards, and all after it, find a shard that cannot be read.

    A signal comes to rank 0 in the update before: what the user reads is the mistake.
    """
    if os.environ["RANK"] == "0":
        strike(trainer, "lr_at", call // 4, signal.SIGTERM)
        return
    inner, calls = trainer.Shards.read, count(1)

    def read(self, ids):
        if "_train_" in self.shard_files[0][0].name and next(calls) >= call:
            raise UserError("shard 1 cannot be read")
        return inner(self, ids)

    trainer.Shards.read = read


BAD_SHARD = {**SMALL, "total_batch_size": 16 * T, "micro_batch_size": 2, "max_steps": 9, "val_every": 0}


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory):
    """The log folder of a run of two ranks that nothing happened to."""
    log = tmp_path_factory.mktemp("straight") / "log"
    assert statuses(run_ranks(tiny_flags(shards, log, **BAD_SHARD), 2)) == [0, 0]
    return log


@pytest.mark.parametrize("call", [1, 23, 25])
def test_a_shard_that_one_rank_cannot_read_in_the_middle_of_a_step(shards, straight, tmp_path, call):
    """Catches ranks that wait in an all-reduce for the one that left, and ten minutes of work that are not saved."""
    log = tmp_path / "log"
    results = run_ranks(tiny_flags(shards, log, **BAD_SHARD), 2, partial(bad_shard, call), timeout=60)
    assert statuses(results) == [2, 2], results[1].stderr
    assert results[0].stderr.count("shard 1 cannot be read") == 1 and not results[1].stderr
    done = (call - 1) // 4  # a step of a rank is four micro-batches
    assert len(values(log, "train")) == done and (log / f"rolling_{done:05d}.pt").exists()
    if call > 1:
        assert statuses(run_ranks(["--resume", "--log_dir", str(log)], 2)) == [0, 0]
        assert log_rows(log) == log_rows(straight)
        weights = [read_checkpoint(folder / "model_00009.pt")["model"] for folder in (log, straight)]
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[1])


def test_rank_that_stands_still(shards, tmp_path):
    """A rank that stops answering, as a machine does that lost its network, costs --dist_timeout and no more."""
    started = start_ranks(tiny_flags(shards, tmp_path / "log", **SMALL | {"dist_timeout": 3}), 2,
                          before=struck(1, signal.SIGSTOP, "lr_at", call=2))
    try:
        other = finish(started[0], 60)
    finally:
        started[1].kill()
        finish(started[1])
    assert other.returncode == 1
    assert "lost another rank" in other.stderr and "imed out" in other.stderr


def test_frozen_ranks():
    """A rank that freezes in a sample, in front of a save or while it writes one. Guards: fellows that wait for days.

    They must leave within --dist_timeout + 10 s, and on SIGTERM before that.
    """
    script = ROOT / "tests" / "scripts" / "terminals.py"
    done = subprocess.run([sys.executable, script, "--kinds", "frozen", "--times", "4", "--jobs", "4"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def group_of_one(trainer):
    trainer.Runtime = partial(trainer.Runtime, distributed=True)


def test_a_world_of_one_in_a_process_group(shards, tmp_path):
    """DDP, `no_sync` and both groups around a single rank change no digit of the run without them.

    Guards: a path that only several GPUs take. Where there is one, tests/scripts/gpu.sh runs this over NCCL.
    """
    flags = {**SMALL, "total_batch_size": 8 * T, "micro_batch_size": 2, "max_steps": 6, "val_every": 3}
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "RANK": 0, "WORLD_SIZE": 1}  # and no LOCAL_RANK
    for name, hook in (("plain", None), ("group", group_of_one)):
        [result] = run_ranks(tiny_flags(shards, tmp_path / name, **flags), 1, hook, env=env)
        assert result.returncode == 0, result.stderr
    assert log_rows(tmp_path / "group") == log_rows(tmp_path / "plain")
    norms = [[row["grad_norm"] for row in metric_rows(tmp_path / name, "train")] for name in ("group", "plain")]
    assert norms[0] == norms[1]


def compile_or_not(trainer):
    """Let torch.compile fail on rank 1, and on rank 0 trace the model without the minutes of compiling it."""
    def broken(graph, inputs):
        raise OSError("the compiler is broken")

    backend = broken if os.environ["RANK"] == "1" else "eager"
    trainer.torch.compile = partial(trainer.torch.compile, backend=backend)


def test_a_compile_that_fails_on_one_rank(shards, tmp_path):
    """A compiler that works on one machine only: all ranks train uncompiled, with one WARNING, to the same losses.

    Guards: a traceback of the compiler's in place of a slower run; ranks of which only some are compiled.
    """
    flags = {**SMALL, "max_steps": 3}
    assert statuses(run_ranks(tiny_flags(shards, tmp_path / "plain", **flags), 1)) == [0]
    results = run_ranks(tiny_flags(shards, tmp_path / "log", **flags, compile=True), 2, compile_or_not)
    assert statuses(results) == [0, 0], results[1].stderr
    assert results[0].stdout.count("WARNING: torch.compile failed") == 1
    assert "the compiler is broken" in results[0].stdout and not results[1].stdout
    assert_same_run(tmp_path / "log", tmp_path / "plain")


def slow(seconds, trainer):
    """Make the first text that is prepared and the first checkpoint that is written take `seconds` more."""
    at_call(harness.text, "prepare_text", 1, partial(time.sleep, seconds))
    at_call(trainer, "checkpoint.write", 1, partial(time.sleep, seconds))


def test_others_wait_for_text_and_checkpoints(tmp_path):
    """Rank 0 takes longer than --dist_timeout to prepare text and to write a checkpoint. Guards: the others give up."""
    text = tmp_path / "plays.txt"
    text.write_text("\n\n".join(f"Scene {i}. Enter a king, who speaks." for i in range(400)))
    flags = tiny_flags(text, tmp_path / "log", **SMALL | {"dist_timeout": 2}, max_steps=2, save_minutes=1e-9)
    results = run_ranks(flags, 2, partial(slow, 2.5))
    assert statuses(results) == [0, 0], results[1].stderr
    assert {p.name for p in (tmp_path / "log").glob("*.pt")} == {"rolling_00001.pt", "model_00002.pt"}


# --- Signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, number, name, call, step", [
    (1, signal.SIGUSR1, "lr_at", 3, 3),  # mid-step: the update is made, then all stop
    (0, signal.SIGTERM, "validate", 2, 4),  # evaluation leaves at its next batch
    (1, signal.SIGINT, "log_hellaswag", 1, 4),
    (0, signal.SIGTERM, "write_samples", 1, 5),  # samples are drawn whole, an update follows
    *((0, number, "lr_at", 3, 3) for number in (signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP)),  # of batch systems
])
def test_a_signal_to_one_rank_stops_all(shards, questions, tmp_path, rank, number, name, call, step):
    """All ranks stop at the same step, saved, with 128 + N each, wherever the signal meets the one."""
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("this signal is ignored here, as by nohup")
    log = tmp_path / "log"
    flags = tiny_flags(shards, log, **SMALL, max_steps=8, hellaswag_every=4, hellaswag_path=questions, sample_every=4,
                       num_samples=3, sample_tokens=4)
    results = run_ranks(flags, 2, struck(rank, number, name, call), timeout=60)
    assert statuses(results) == [128 + number] * 2, results[0].stderr
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert f"stopped by {name} at step {step}, saved" in results[0].stdout
    assert "Traceback" not in results[0].stderr + results[1].stderr
    assert (log / f"rolling_{step:05d}.pt").exists()
    no_leftovers(log)
    assert max(values(log, "train"))[0] == step - 1
    resumed = run_ranks(["--resume", "--log_dir", str(log)], 2, timeout=60)
    assert statuses(resumed) == [0, 0], resumed[0].stderr
    evaluations = [(step, kind) for step, kind, _ in log_rows(log) if kind != "train"]
    assert evaluations == [(0, "val"), (4, "val"), (4, "hella"), (8, "val"), (8, "hella")]
    assert [row["step"] for row in metric_rows(log, "sample")] == [4, 8]


def test_the_first_signal_decides():
    """Catches an exit status that names the last of several signals."""
    ranks = Ranks()
    with ranks.catch_signals():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
    assert ranks.signal == signal.SIGTERM


def signals_while_saving(numbers, trainer):
    """Let signals come to this process in the midst of writing a checkpoint, after one that made it save."""
    def act():
        for number in numbers:
            os.kill(os.getpid(), number)
        time.sleep(0.5)

    strike(trainer, "lr_at", 2, signal.SIGINT)
    at_call(trainer, "torch.save", 1, act)


@pytest.mark.parametrize("numbers, expected", [
    ([signal.SIGTERM, signal.SIGUSR1], [128 + signal.SIGINT] * 2),
    ([signal.SIGINT], [128 + signal.SIGINT, 1]),  # the second Ctrl-C leaves at once, and nobody waits for rank 0
])
def test_signals_while_saving(shards, tmp_path, numbers, expected):
    """Catches an impatient scheduler that tears the checkpoint, and ranks that wait for one that was told to leave."""
    hook = partial(on_rank, 0, partial(signals_while_saving, numbers))
    results = run_ranks(tiny_flags(shards, tmp_path / "log", **SMALL), 2, hook, timeout=60)
    assert statuses(results) == expected
    saved = [file.name for file in (tmp_path / "log").glob("*.pt")]
    assert saved == (["rolling_00002.pt"] if expected[1] != 1 else [])
    if saved:
        no_leftovers(tmp_path / "log")
