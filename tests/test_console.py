"""The console: what a run says and takes there, and what happens when it goes away.

Real processes, in a terminal of their own (a pty) where it matters.
"""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, TRAINER, Terminal, log_rows, make_shards, tiny_flags

from harness.cli import OutputClosed, Parser, UserError, add_flags, exit_status, users_error
from train_gpt2 import PRESETS, TrainConfig

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="terminals and signals are POSIX's")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("data"))


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train_gpt2.py", "sample.py", "hellaswag.py", "convert.py", "bench.py"])
def test_ctrl_c_in_the_imports(name, tmp_path):
    """Catches a traceback through torch's files for a command that was mistyped."""
    terminal = Terminal([sys.executable, ROOT / name], cwd=tmp_path)
    time.sleep(0.7)  # importing torch takes longer, with a warm disk too
    terminal.type("\x03")
    assert terminal.finish() in (-signal.SIGINT, 128 + signal.SIGINT)
    assert "Traceback" not in terminal.text
    assert not (tmp_path / "log").exists()


def test_ctrl_c_while_compiling(data, tmp_path):
    """While g++ runs, which the terminal interrupts too. Catches its errors on the console, a minute without a word."""
    def compiling():
        names = subprocess.run(["ps", "-A", "-o", "sid=,comm="], capture_output=True, text=True).stdout
        return any(line.split() == [str(terminal.process.pid), "cc1plus"] for line in names.splitlines())

    command = [sys.executable, TRAINER, *tiny_flags(data, tmp_path / "log", compile=True)]
    terminal = Terminal(command, env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")})
    terminal.wait_until(compiling)
    terminal.wait_until(lambda: "compiling: 00:02" in terminal.text)
    began = time.monotonic()
    terminal.type("\x03")
    assert terminal.finish() == 128 + signal.SIGINT
    assert time.monotonic() - began < 5
    after = terminal.text.split("^C")[-1]
    assert after.strip().removeprefix("\x1b[K") == (
        "interrupted while compiling; nothing to save; the same command starts again")


def test_files_that_cannot_be_opened(tmp_path, capsys):
    """A page of traceback for a file without permissions, where no code of ours says more of it."""
    assert exit_status((tmp_path / "nothing").read_text) == 2
    assert capsys.readouterr().err.count("\n") == 1
    error = OSError(errno.EACCES, "Permission denied", "some/file")
    assert str(users_error(error)).startswith("some/file: Permission denied: see that")
    assert users_error(OSError(errno.ENOTCONN, "no file")) is None and users_error(ValueError()) is None


def test_ctrl_c_in_a_step(data, tmp_path):
    """Catches a silence in which people press it again, and lose what would have been saved."""
    log = tmp_path / "log"
    terminal = Terminal([sys.executable, TRAINER, *tiny_flags(data, log, max_steps=100000, val_every=0)])
    terminal.wait_until(lambda: (log / "log.txt").exists() and len(log_rows(log)) > 3)
    terminal.type("\x03")
    assert terminal.finish() == 128 + signal.SIGINT
    said = terminal.text
    assert said.count("stopping after this step, saving; Ctrl-C again leaves at once\n") == 1
    assert f"stopped by Ctrl-C at step {log_rows(log)[-1][0] + 1}, saved" in said
    assert list(log.glob("rolling_*.pt")) and "Traceback" not in said


# --- Consoles that go away, or were never there ----------------------------------------------------------------------


def test_terminals_that_close():
    """A terminal closed with and without SIGHUP, below torchrun, and under nohup. Guards: work lost with a window."""
    script = ROOT / "tests" / "scripts" / "terminals.py"
    kinds = ["closed", "hangup", "torchrun", "nohup"]
    done = subprocess.run([sys.executable, script, "--times", "1", "--jobs", "2", "--kinds", *kinds],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def shell(command, cwd, **env):
    """A command line of bash, in which $TRAIN starts the trainer."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "ROOT": str(ROOT), **env}
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=env, capture_output=True, text=True)


def test_nobody_reads_and_the_work_is_done(data, tmp_path):
    """`train_gpt2.py ... 2>&1 | true` finishes, a torn checkpoint included; its mistakes keep their status.

    Guards: exit 0 at the first line that nobody reads, with no step made.
    """
    log = tmp_path / "log"
    flags = " ".join(tiny_flags(data, log, max_steps=4, checkpoint_every=1))
    train = "$PYTHON $ROOT/train_gpt2.py"
    ended = "2>&1 | true; echo ${PIPESTATUS[0]}"
    assert shell(f"{train} {flags} {ended}", tmp_path).stdout == "0\n"
    assert (log / "model_00004.pt").exists()
    rows = log_rows(log)
    (log / "model_00004.pt").write_bytes((log / "model_00004.pt").read_bytes()[:1000])
    assert shell(f"{train} --resume --log_dir {log} {ended}", tmp_path, PYTHONUNBUFFERED="1").stdout == "0\n"
    assert log_rows(log) == rows
    assert shell(f"{train} --n_layer 0 {ended}", tmp_path).stdout == "2\n"


def test_standard_streams_closed_at_the_start(data, tmp_path):
    """`<&- >&- 2>&-`: sys.stdout is None then. Guards: a traceback; a checkpoint under the number of stderr."""
    log = tmp_path / "log"
    done = shell(f"$PYTHON $ROOT/train_gpt2.py {' '.join(tiny_flags(data, log, max_steps=2))} <&- >&- 2>&-", tmp_path)
    assert done.returncode == 0
    assert (log / "hf" / "model.safetensors").exists() and len(log_rows(log)) == 4


WRITER = """
import sys, time, warnings
from harness.cli import exit_status
def main():
    for i in range(20000):
        print(f"line {i}")
    warnings.warn("still there")
    sys.stderr.write("still there\\n")
    return 7
sys.exit(exit_status(main, output_is_product=%s))
"""


@pytest.mark.parametrize("is_product, status", [(True, 141), (False, 7)])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_has_had_enough(tmp_path, is_product, status, unbuffered):
    """`sample.py | head -1` stops quietly with 141; a command that works goes on without its reader.

    Guards: a traceback, Python's own 120 at its exit, and a 0 for what was cut off.
    """
    (tmp_path / "writer.py").write_text(WRITER % is_product)
    done = shell('$PYTHON writer.py | head -1; echo "${PIPESTATUS[0]}"', tmp_path, PYTHONPATH=str(ROOT),
                 PYTHONUNBUFFERED=unbuffered)
    assert done.stdout == f"line 0\n{status}\n"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert ("still there" in done.stderr) == (not is_product)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_product_that_does_not_fit_on_the_disk(tmp_path):
    """`sample.py > FILE` on a full disk. Guards: half a text and exit 0."""
    (tmp_path / "writer.py").write_text(WRITER % True)
    done = shell("$PYTHON writer.py > /dev/full", tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert done.stderr == "writer.py: error: the output cannot be written: No space left on device\n"


def test_a_broken_pipe_that_is_no_console_is_a_fault(tmp_path):
    """Catches a tracker's dead socket that ends a run with exit 0."""
    code = ("import sys; from harness.cli import exit_status\n"
            "def main(): raise BrokenPipeError(32, 'a socket')\n"
            "sys.exit(exit_status(main))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr
    assert not issubclass(OutputClosed, OSError)  # or code that minds its files would take it for its own


# --- Words on the command line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, hint", [
    (["--learning_rate", "1e-3"], "--max_lr"),
    (["--local-rank=0"], "torchrun"),
    (["--learning-rate=1e-3"], "--max_lr"),
    (["--batch_size=12"], "--micro_batch_size"),
    (["--gradient_accumulation_steps=5"], "--total_batch_size"),
    (["--max_iters", "5"], "--max_steps"),
    (["--block_size=64"], "--seq_len"),
    (["--wandb_log=True"], "--tracker wandb"),
    (["--compile=False"], "--no-compile"),
    (["--shuffle=1"], "--shuffle"),
    (["--batch_size", "12", "--learning_rate=1e-3"], "--max_lr for --learning_rate"),
    (["-m", "gpt2"], "--model"),
    (["--out_dir=out"], "--log_dir"),
    (["--eval_interval=5"], "--val_every"),
    (["config/train_gpt2.py"], "--preset"),
    (["--max_step", "5"], "--max_steps"),
])
def test_names_that_people_bring(words, hint):
    """nanoGPT's flags, and slips, get the name here. Guards: a --help of sixty flags to search for it."""
    with pytest.raises(UserError, match=r"did you mean .*\? see --help") as caught:
        add_flags(Parser(allow_abbrev=False), TrainConfig, PRESETS).parse_args(words)
    assert f" {hint}" in str(caught.value).split("did you mean")[1]


def test_no_hint_names_a_flag_that_is_not_there():
    """`--learning_rate` to a command that has no learning rate. Guards: a hint that is refused in its turn."""
    parser = Parser()
    parser.add_argument("--prompt")
    for words, hint in ((["--learning_rate", "1"], ""), (["--start", "x"], "did you mean --prompt? ")):
        with pytest.raises(UserError) as caught:
            parser.parse_args(words)
        assert str(caught.value) == f"unrecognized arguments: {' '.join(words)}; {hint}see --help"
