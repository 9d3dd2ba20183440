"""From a prompt to texts."""

import torch

from harness import tokenizer


def sample_texts(model, prompt, num_samples, max_new_tokens, generator, top_k=50):
    """`num_samples` texts, a list: `prompt` as `model.generate` continues it. The model's mode stays as it was."""
    own = tokenizer.of(model)
    ids = own.encode(prompt, special=True).tolist() or [own.end_of_text]
    training = model.training
    model.eval()
    idx = torch.tensor([ids] * num_samples, device=generator.device)
    idx = model.generate(idx, max_new_tokens, top_k=top_k, generator=generator)
    model.train(training)
    return [own.decode(row) for row in idx.tolist()]
