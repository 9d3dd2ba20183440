"""What the tests of the trainer share: small data, small runs, real processes that can be struck down, rows of logs.

A run of these shapes takes a second or two. Processes are forked from a server that has imported the trainer (one
import of torch for all of them; where there is no fork they are spawned), so they share nothing with one another.
"""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial, reduce
from itertools import count
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TRAINER = ROOT / "train_gpt2.py"


def make_shards(folder, train=(9000,), val=(2000,), high=50257, seed=0, name="toy"):
    """Write shards of random ids below `high`, one a number of tokens in `train` and `val`; returns the folder.

    They are named as fineweb.py names its own: the validation shard 0, then the train shards from 1.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number, (split, tokens) in enumerate([("val", n) for n in val] + [("train", n) for n in train]):
        np.save(folder / f"{name}_{split}_{number:06d}.npy", rng.integers(0, high, tokens, dtype=np.uint16))
    return folder


def tiny_flags(data, log_dir, /, **changes):
    """Flags of a run of a few seconds on `data`: 8 rows of 16 tokens per step, 10 steps, validation at 0, 4, 8 and 10.

    A change to None drops a flag, True and False give `--flag` and `--no-flag`.
    """
    flags = {
        "preset": "gpt2", "data": data, "log_dir": log_dir, "cache_dir": Path(log_dir).parent / "cache",
        "n_layer": 2, "n_head": 2, "n_embd": 32, "seq_len": 16, "total_batch_size": 128, "micro_batch_size": 4,
        "max_steps": 10, "max_lr": 1e-3, "warmup_steps": 3, "val_every": 4, "val_tokens": 160, "hellaswag_every": 0,
        "sample_every": 0, "checkpoint_every": 0, "device": "cpu", "dtype": "float32", "compile": False, **changes,
    }
    argv = []
    for name, value in flags.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            argv += [f"--{name}", str(value)]
    return argv


WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
PORTS = count(20_000 + 1000 * WORKER + os.getpid() % 900)  # below those that the system gives to connections


def free_port():
    """A port that nobody uses and that the other process of pytest-xdist is not given, either."""
    while True:
        port = next(PORTS)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows knows only the latter, and ends at once on it


def at_call(trainer, name, call, act):
    """Make the `call`-th call (from 1) of `name` in the trainer's module start with `act()`.

    `name` may lead into what the module has, as in "RunLog.curves" or "os.replace".
    """
    *holders, name = name.split(".")
    holder = reduce(getattr, holders, trainer)
    inner, calls = getattr(holder, name), count(1)

    def struck(*args, **kwargs):
        if next(calls) == call:
            act()
        return inner(*args, **kwargs)

    setattr(holder, name, struck)


def strike(trainer, name, call, number=KILL):
    """`at_call` with signal `number` to the process: a kill that always comes at the same spot.

    For `run_trainer(..., before=partial(strike, name="validate", call=2))`.
    """
    at_call(trainer, name, call, partial(os.kill, os.getpid(), number))


def write_questions(path, count=2):
    """Write `count` rows in HellaSwag's schema, endings of several lengths, to `path`; returns it."""
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "over", "green", "hills", "in", "rain"]
    rng = np.random.default_rng(0)

    def text(n):
        return " ".join(rng.choice(words, n))

    rows = [{"ind": i, "activity_label": "x", "ctx": text(9), "ctx_a": text(5), "ctx_b": text(4), "label": i * 3 % 4,
             "endings": [f"{text(4 + i % 3)}." for _ in range(4)]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_trainer(args, before=None, cwd=None, env=None, timeout=300):
    """`python train_gpt2.py ARGS` in a process of its own and one thread: a CompletedProcess with both outputs.

    `before(train_gpt2)`, which must be picklable, changes the module first. A signal that ended the process shows as
    a negative return code.
    """
    return run_ranks(args, 1, before, cwd, env, timeout)[0]


def run_ranks(args, world_size, before=None, cwd=None, env=None, timeout=300):
    """`run_trainer` on `world_size` ranks at once, which find one another as under torchrun: a list by rank."""
    started = start_ranks(args, world_size, before, cwd, env)
    for process in started:
        process.join(timeout)
        if process.is_alive():  # reported with what the others said, one of which may be the cause
            said = "\n".join(Path(p.folder, "err").read_text(errors="replace")[-3000:] for p in started)
            for other in started:
                other.kill()
            raise TimeoutError(f"{process.command} took over {timeout} s; stderr of all ranks:\n{said}")
    return [finish(process) for process in started]


def start_ranks(args, world_size=1, before=None, cwd=None, env=None):
    """Start the ranks of a run and return at once: a list of processes for `finish`, with `.pid` each."""
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    if os.name == "posix":
        context.set_forkserver_preload(["train_gpt2", "fineweb", "convert", "curves", "matplotlib.figure",
                                        "safetensors.torch", "torch._inductor", "pytest"])
    if str(ROOT) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    places = [{}]
    if world_size > 1:
        port = free_port()
        places = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": port} for rank in range(world_size)]
    processes = []
    for place in places:
        folder = tempfile.mkdtemp(prefix="trainer_")
        for name in ("out", "err"):
            Path(folder, name).touch()  # there even where the process is killed before it has begun
        change = {name: str(value) for name, value in {**place, **(env or {})}.items()}
        process = context.Process(target=_child, args=([str(a) for a in args], before, cwd, change, folder))
        process.start()
        process.command, process.folder = ["train_gpt2.py", *map(str, args)], folder
        processes.append(process)
    return processes


def finish(process, timeout=300):
    """Wait for a process of `start_ranks`: its CompletedProcess. One that takes longer is killed and reported."""
    process.join(timeout)
    if late := process.is_alive():
        process.kill()
        process.join()
    out, err = (Path(process.folder, name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err"))
    shutil.rmtree(process.folder)
    if late:
        raise TimeoutError(f"{process.command} took over {timeout} s; stdout:\n{out[-3000:]}\nstderr:\n{err[-3000:]}")
    return subprocess.CompletedProcess(process.command, process.exitcode, out, err)


def _child(args, before, cwd, env, folder):
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
        stream.reconfigure(encoding="utf-8", line_buffering=True)
    faulthandler.dump_traceback_later(120)  # where it hangs, for the report of a test that timed out
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests in the background
    os.environ.update(env)
    os.chdir(cwd or folder)
    sys.argv = ["train_gpt2.py", *args]
    import torch
    from tqdm import tqdm

    import train_gpt2
    from harness.cli import exit_status

    tqdm.set_lock(threading.RLock())  # its own, shared by processes, would be left behind by one that is killed
    torch.set_num_threads(1)
    if before:
        before(train_gpt2)
    sys.exit(exit_status(train_gpt2.main))


class Terminal:
    """A command in a terminal of its own (a pty), as a user sees it; POSIX only.

    `session`: whether the terminal is the command's own, whose keys send it signals and whose end hangs it up. Without
    it (`& disown`, a tmux that crashed) a closed terminal is noticed only by what is written to it. `threads` of the
    command, None for all that it takes.
    """

    def __init__(self, command, session=True, cwd=None, env=None, columns=80, ignore=None, threads=1):
        import fcntl
        import pty
        import struct
        import termios

        def in_child():
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
            if ignore:
                signal.signal(ignore, signal.SIG_IGN)
            if session:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [str(word) for word in command], stdin=slave, stdout=slave, stderr=slave, start_new_session=True, cwd=cwd,
            env={**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {}), **(env or {})},
            preexec_fn=in_child)
        os.close(slave)
        self.bytes, self.closing = b"", threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        import select

        while not self.closing.is_set():
            if select.select([self.master], [], [], 0.02)[0]:
                try:
                    data = os.read(self.master, 65536)
                except OSError:  # the command has ended
                    return
                if not data:
                    return
                self.bytes += data

    @property
    def text(self):
        return self.bytes.decode(errors="replace").replace("\r\n", "\n")

    def wait_until(self, condition, seconds=120):
        """Return when `condition()` is true; fails where the command ends or the time is over before."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text[-3000:]}"
            assert time.monotonic() < end, f"nothing after {seconds} s:\n{self.text[-3000:]}"
            time.sleep(0.01)

    def type(self, keys):
        os.write(self.master, keys.encode())

    def close(self):
        """Close the terminal under the command."""
        self.closing.set()
        self.reader.join()
        os.close(self.master)

    def finish(self, seconds=120):
        """The command's exit status; what it has said is in `text`."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, KILL)
            raise TimeoutError(f"{self.process.args} took over {seconds} s:\n{self.text[-3000:]}") from None
        if not self.closing.is_set():
            self.reader.join(2)
            self.close()
        return status


def is_stopped(process):
    """Whether a process stands still after SIGSTOP."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process.pid)], capture_output=True, text=True).stdout
    return state.startswith("T")


def log_rows(log_dir):
    """log.txt as it stands: [(step, kind, text of the value)]."""
    lines = Path(log_dir, "log.txt").read_text(encoding="utf-8").splitlines()
    return [(int(step), kind, value) for step, kind, value in map(str.split, lines)]


def metric_rows(log_dir, kind=None):
    """The rows of metrics.jsonl, of one kind if given: a list of dicts."""
    lines = Path(log_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if kind in (None, row["kind"])]


def error_line(result):
    """The one line that a user's mistake leaves on stderr; fails where status or form are others."""
    assert result.returncode == 2, (result.returncode, result.stdout[-2000:], result.stderr[-2000:])
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and "error: " in lines[0], result.stderr
    return lines[0]
