"""Text samples of a run."""

import torch

from harness import tokenizer
from harness.shards import derive_seed


def write_samples(run):
    """`num_samples` texts that continue the prompt, drawn together on rank 0; none of a model that computes nan."""
    cfg, rt, model = run.cfg, run.rt, run.state.model
    own = tokenizer.of(model)
    generator = torch.Generator(rt.device).manual_seed(derive_seed(cfg.seed, run.state.step))
    prompt = own.encode(cfg.sample_prompt, special=True).tolist() or [own.end_of_text]
    idx = torch.tensor([prompt] * cfg.num_samples, device=rt.device)
    model.eval()
    try:
        with rt.autocast():
            idx = model.generate(idx, cfg.sample_tokens, top_k=50, generator=generator)
        return [own.decode(row) for row in idx.tolist()]
    except FloatingPointError as error:
        rt.print(f"step {run.state.step:5d} | no sample: {error}")
        return []
    finally:
        model.train()
