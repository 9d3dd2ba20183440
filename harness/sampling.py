"""From a prompt to texts."""

import torch

from harness import tokenizer


def sample_texts(model, prompt, num_samples, max_new_tokens, generator, top_k=50):
    """`num_samples` texts, a list: `prompt` as `model.generate` continues it. The model's mode stays as it was."""
    encoding = tokenizer.gpt2()
    ids = encoding.encode(prompt, allowed_special="all") or [tokenizer.END_OF_TEXT]
    training = model.training
    model.eval()
    idx = torch.tensor([ids] * num_samples, device=generator.device)
    idx = model.generate(idx, max_new_tokens, top_k=top_k, generator=generator)
    model.train(training)
    return [encoding.decode(row) for row in idx.tolist()]
