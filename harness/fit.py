"""What fits: rows in a micro-batch, by trying one real step, and updates in a given time, by timing some."""

import math

import torch

from harness.cli import count


def divisors(n):
    """All divisors of `n`, in rising order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def find_micro_batch(raw_model, compiled, cfg, rt):
    """Rows a forward pass: as given, or the largest that fits one real step. Compiles the model on the way.

    On CUDA sizes are tried from 65,536 tokens down by halves (more gains nothing), on all ranks alike; the CPU and MPS
    take 4,096 tokens, since their caches hold no more.
    """
    largest = (65536 if rt.device.type == "cuda" else 4096) // cfg.seq_len
    rows_per_rank = cfg.total_batch_size // cfg.seq_len // rt.world_size
    sizes = [b for b in divisors(rows_per_rank) if b <= largest] or [1]
    B = cfg.micro_batch_size or sizes[-1]
    if rt.compile:
        rt.print("compiling: a minute or more the first time, a few seconds after that")
    while True:
        with rt.interruptible("compiling" if rt.compile else "trying the micro-batch"):
            fits, failure = try_micro_batch(raw_model, compiled, B, cfg, rt)
        if failures := [failure for failure in rt.gather(failure) if failure]:
            rt.stop_compiling(failures[0])
            continue
        if all(rt.gather(fits)):
            return B
        smaller = [b for b in sizes if b <= B // 2]
        if cfg.micro_batch_size or not smaller:
            rt.fail(f"out of memory at --micro_batch_size {B}, a forward and backward pass of {B} "
                    f"x {cfg.seq_len} tokens: lower it, or --seq_len, or the model's size")
        B = smaller[-1]


def try_micro_batch(raw_model, compiled, B, cfg, rt):
    """(whether `B` rows fit in training and validation, why torch.compile failed or None). The model is unchanged."""
    if rt.device.type != "cuda" and not rt.compile:
        return True, None  # nothing to find out or to compile
    try:
        shape = B, cfg.seq_len
        x, y = (torch.zeros(shape, dtype=torch.int64, device=rt.device) for _ in "xy")
        # what Adam will allocate in the first update
        spare = torch.empty(2 * sum(p.numel() for p in raw_model.parameters()), device=rt.device)
        # on CUDA twice: the second pass has the first one's gradients beside it
        for _ in range(2 if rt.device.type == "cuda" else 1):
            with rt.autocast():
                _, loss = compiled(x, y)
            loss.backward()
        del spare
        if cfg.val_every or cfg.eval_only:
            raw_model.eval()
            with torch.no_grad(), rt.autocast():
                compiled(x, y)
        return True, None
    except RuntimeError as error:
        failure, cause = rt.why_not_compiled(error), getattr(error, "inner_exception", error)
        if not failure and not isinstance(cause, torch.OutOfMemoryError):
            raise
        if rt.compile:  # it compiles 8 shapes at most: those that do not fit are not to count
            torch._dynamo.reset()
        return False, failure
    finally:
        raw_model.zero_grad(set_to_none=True)
        raw_model.train()
        if rt.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def steps_in(minutes, run, validate):
    """(updates for which `minutes` from step 0 on are enough, a line about it), by rank 0's clock.

    Timed are ten forward and backward passes, which leave the model as it is, and one validation.
    HellaSwag's time is an estimate; the optimizer's, samples' and checkpoints' are left out. `validate(run, shards)`
    is the trainer's.
    """
    cfg, rt, B, data = run.cfg, run.rt, run.micro_batch_size, run.eval_data
    micro_steps = run.micro_steps
    x, y = (torch.zeros((B, cfg.seq_len), dtype=torch.int64, device=rt.device) for _ in "xy")
    for i in range(11):
        if i == 1:  # the first pass may be slower
            rt.synchronize()
            started = rt.clock()
        with rt.sync_gradients(run.model, enabled=i % micro_steps == 0):
            with rt.autocast():
                _, loss = run.model(x, y)
            loss.backward()
    rt.synchronize()
    one_pass = (rt.clock() - started) / 10
    run.state.model.zero_grad(set_to_none=True)

    each = step = one_pass * micro_steps  # of an update, with its share of the evaluations
    left, words = 60 * minutes, f"{step:.2g} s each"
    if data.val_shards:
        started = rt.clock()
        validate(run, data.val_shards)
        seconds = rt.clock() - started
        each, left = each + seconds / cfg.val_every, left - 2 * seconds  # at step 0 and at the end
        words += f", a validation {seconds:.2g} s"
    if data.benchmark:
        tokens = sum(batch.tokens.numel() for batch in data.benchmark.batches)
        # a forward pass alone is a third of both
        seconds = one_pass / 3 * tokens / (B * cfg.seq_len * rt.world_size)
        each, left = each + seconds / cfg.hellaswag_every, left - seconds
        words += f", HellaSwag an estimated {seconds:.2g} s"
    steps = max(1, int(left / each))
    return steps, f"{minutes:g} minutes are enough for {count(steps, 'step')}: {words}"
