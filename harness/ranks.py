"""Which ranks take part in a run, and what they agree on. Without torchrun or srun there is one, for which every method
is a plain call.

Ranks wait for one another on the control group for as long as the work takes (see heartbeat.py). Exchanges on the
default group (gradients, sums, objects), in which nobody has work left, have `dist_timeout` as torch's own time limit.
"""

import contextlib
import itertools
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from harness.cli import UserError, say, users_error
from harness.heartbeat import Heartbeat, SilentRank
from harness.signals import Signals, Stopped

STORES = {}  # {(address, port): the store at which the ranks meet, torchrun's or rank 0's own}, kept by this process
STARTS = itertools.count()  # of process groups by this process; all ranks count alike


class AgreedError(UserError):
    """A `UserError` of one rank or of all, raised on all ranks at the same place: they can still save together."""


def attempt(function, *args):
    """(result, None) of `function(*args)`, or (None, the user's error that it raised, see `users_error`)."""
    try:
        return function(*args), None
    except (UserError, OSError) as error:
        if not (found := users_error(error)):
            raise
        return None, found


def rank_from_environment():
    """(rank, local rank, world size) as torchrun, srun or Open MPI's mpirun set them, else (0, 0, 1)."""
    env = os.environ
    if env.get("WORLD_SIZE") == "1":  # a world of one needs no more; Kubernetes sets RANK beside it, no LOCAL_RANK
        return 0, 0, 1
    if "RANK" in env:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    elif env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    elif env.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE")
    else:
        return 0, 0, 1
    try:
        return tuple(int(env[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UserError(f"{error}: the launcher must set {', '.join(names)} to whole numbers") from None


def launcher():
    """The words that start a script on as many ranks as this process is one of, where torchrun did so on one machine.

    Elsewhere ["python"]: what starts a job on several machines is not known here, and `srun` is repeated by its script.
    """
    env = os.environ
    ranks = env.get("LOCAL_WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in env and env.get("GROUP_WORLD_SIZE") == "1" and ranks != "1":
        return ["torchrun", "--standalone", f"--nproc_per_node={ranks}"]
    return ["python"]


class Ranks(Signals):
    """This process among the `world_size` of its run. Leaving `with` leaves the process group."""

    def __init__(self, rank=0, local_rank=0, world_size=1, dist_timeout=600.0, distributed=None):
        """`distributed`: whether there is a process group; by default where there are several ranks."""
        self.rank, self.local_rank, self.world_size = rank, local_rank, world_size
        self.dist_timeout = dist_timeout  # seconds that a rank may be silent
        self.distributed = world_size > 1 if distributed is None else distributed
        self.control = None  # the group on which ranks wait for each other's work
        if self.distributed:
            self._join()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not self.distributed:
            return
        if kind is None or issubclass(kind, UserError | SystemExit):
            self.heartbeat.close()
            # subtle: a thread of gloo that drops the last reference to a tensor needs the interpreter lock, and a
            # group is destroyed with that lock held, waiting for its threads. A sleep gives the lock away, and by now
            # there is nothing else for them to do.
            time.sleep(0.1)
            dist.destroy_process_group()
            self.control = None
            if self.rank and isinstance(error, AgreedError):
                raise SystemExit(2) from None  # rank 0 reports it
            return
        lost = self._lost_another(error)
        self.heartbeat.close(left=True)
        if lost:
            say(f"rank {self.rank}: lost another rank{lost}", sys.stderr)
            os._exit(128 + self.signal if self.signal else 1)  # an orderly exit would wait for the broken group

    def _lost_another(self, error):
        """What to add to "lost another rank" if that is why `error` was raised; None if it is this rank's own."""
        if isinstance(error, SilentRank):
            return f": {error}"
        # subtle: the type does not tell. gloo raises a plain RuntimeError, out of DDP's passes too, and an error in the
        # model may be one as well, so the question is whether the other ranks are there.
        if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and self.heartbeat.lost_another():
            return (", or waited --dist_timeout for it; the other ranks' first error is the cause\n"
                    f"({str(error)[-300:]})")
        return None

    def _join(self):
        os.environ.setdefault("MASTER_PORT", "29500")
        address, port, timeout = os.environ.get("MASTER_ADDR"), os.environ["MASTER_PORT"], self.dist_timeout
        if not address:
            if self.rank:
                raise SystemExit(2)  # rank 0 reports it
            raise UserError("MASTER_ADDR is not set: use torchrun, or set it to the first machine's name as "
                            "docs/train.sbatch does")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        limit = timedelta(seconds=timeout)
        try:
            if (address, port) not in STORES:
                STORES[address, port] = next(rendezvous("env://", self.rank, self.world_size, timeout=limit))[0]
            # subtle: the store outlives a group, and the next one would find the addresses that this one left there
            store = dist.PrefixStore(f"start {next(STARTS)}", STORES[address, port])
            store.set_timeout(limit)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=limit)
            self.heartbeat = Heartbeat(store, self)
            self.control = dist.new_group(backend="gloo", timeout=timedelta(days=365))  # the heartbeat has a limit
            self.heartbeat.start()  # now every rank has its key in the store
        except (dist.DistError, RuntimeError) as error:
            raise UserError(f"rank {self.rank} of {self.world_size} found no other ranks at {address}:{port} within "
                            f"--dist_timeout {timeout:g} s: check that all were started, that the address is rank 0's "
                            f"and the port open ({str(error)[:200]})") from None

    def sum(self, values):
        """Element-wise sum of a list of numbers over all ranks, in fp64."""
        if not self.distributed:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def mean(self, values):
        """Element-wise mean of a list of numbers over all ranks, in fp64."""
        return [total / self.world_size for total in self.sum(values)]

    def gather(self, value):
        """Every rank's `value`, in the order of the ranks."""
        if not self.distributed:
            return [value]
        self.barrier()  # the work before it may take long, the exchange itself may not
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_rank0(self, function, *args):
        """`function(*args)` on rank 0, its result on every rank; the others wait as long as it takes.

        A `UserError` there is raised on all ranks. Rank 0 gets the very object back, the others a copy.
        """
        result = attempt(function, *args) if self.rank == 0 else None
        if self.distributed:
            self.barrier()  # as in `gather`
            sent = [result]
            dist.broadcast_object_list(sent, src=0)
            result = result or sent[0]
        result, error = result
        if error is not None:
            self.fail(error)
        return result

    def on_all(self, function, *args):
        """`function(*args)` on every rank; the first `UserError` of any of them is raised on all."""
        result, error = attempt(function, *args)
        if errors := [error for error in self.gather(error) if error]:
            self.fail(errors[0])
        return result

    def barrier(self):
        """Wait for all ranks, however long they take."""
        if self.distributed:
            self.heartbeat.wait(dist.barrier(group=self.control, async_op=True))

    def fail(self, message):
        """End all ranks, each of which calls this, with exit status 2 and one line from rank 0."""
        raise AgreedError(message)

    def clock(self):
        """Rank 0's `time.monotonic()`, by which all ranks decide."""
        now = torch.tensor(time.monotonic(), dtype=torch.float64)
        if self.distributed:
            self.heartbeat.wait(dist.broadcast(now, src=0, group=self.control, async_op=True))
        return now.item()

    def print(self, text):
        """A line on the console, from rank 0 only; a progress bar makes room for it."""
        if self.rank == 0:
            with tqdm.external_write_mode():
                say(text)

    def sync_gradients(self, model, enabled):
        """Context of a forward and backward pass after which DDP averages gradients over ranks, if `enabled`."""
        if self.distributed and not enabled:
            return model.no_sync()
        return contextlib.nullcontext()

    def data_parallel(self, model):
        """`model` in DDP's wrapper, which averages gradients over ranks; on one rank the model itself."""
        if not self.distributed:
            return model
        wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        wrapped.broadcast_buffers = False  # the only buffer is the same on every rank
        return wrapped

    def raise_if_stopped(self, error=None):
        """Raise on all ranks, which all call this, what any of them has: a `UserError` of its own or a stop signal.

        `error`: this rank's, None if it has none. All ranks raise an `AgreedError` for the first one, else `Stopped`.
        """
        if error is not None and not isinstance(error, UserError):
            raise error  # a fault, to be seen with its traceback
        seen = torch.tensor([error is not None, self.signal], dtype=torch.int64)
        if self.distributed:
            self.heartbeat.wait(dist.all_reduce(seen, dist.ReduceOp.MAX, group=self.control, async_op=True))
        failed, number = seen.tolist()
        if failed:
            self.fail(next(error for error in self.gather(error) if error))
        if number:
            raise Stopped(number)
