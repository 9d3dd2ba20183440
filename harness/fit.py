"""What fits: rows in a micro-batch, by trying one real step, and updates in a given time, by timing some."""

import math

import torch

from harness.cli import count


def divisors(n):
    """All divisors of `n`, in rising order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def fits(model, compiled, B, cfg, rt):
    """Whether `B` rows fit in training and validation, on all ranks, which all call this.

    Where torch.compile fails on one of them, all go on without it.
    """
    while rt.compile or rt.device.type == "cuda":  # else there is nothing to find out or to compile
        if rt.compile:
            rt.print(f"compiling for {count(B, 'row')}: a minute or more the first time, a few seconds after that")
        with rt.interruptible("compiling" if rt.compile else "trying the micro-batch"):
            tried = rt.gather(try_micro_batch(model, compiled, B, cfg, rt))
        if not (failures := [failure for _, failure in tried if failure]):
            return all(has_room for has_room, _ in tried)
        rt.stop_compiling(failures[0])
    return True


def try_micro_batch(raw_model, compiled, B, cfg, rt):
    """(whether `B` rows fit, why torch.compile failed or None) by one step, which leaves the model as it is."""
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
    cfg, rt, B = run.cfg, run.rt, run.micro_batch_size
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
    if run.val_shards:
        started = rt.clock()
        validate(run, run.val_shards)
        seconds = rt.clock() - started
        each, left = each + seconds / cfg.val_every, left - 2 * seconds  # at step 0 and at the end
        words += f", a validation {seconds:.2g} s"
    if run.benchmark:
        tokens = sum(batch.tokens.numel() for batch in run.benchmark.batches)
        # a forward pass alone is a third of both
        seconds = one_pass / 3 * tokens / (B * cfg.seq_len * rt.world_size)
        each, left = each + seconds / cfg.hellaswag_every, left - seconds
        words += f", HellaSwag an estimated {seconds:.2g} s"
    steps = max(1, int(left / each))
    return steps, f"{minutes:g} minutes are enough for {count(steps, 'step')}: {words}"
