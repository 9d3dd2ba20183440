"""From next-token logits to a token: greedy, temperature, top-k and nucleus sampling."""

import math

import torch

from harness import tokenizer


def pick_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token id a row, (B, 1) int64, from next-token `logits` (B, V); temperature 0: the largest.

    `top_k` keeps the k likeliest tokens; `top_p` the fewest likeliest whose probabilities reach p (nucleus sampling,
    Holtzman et al. 2020), at least one.
    """
    if temperature < 1e-6:  # as good as 0, and 1 / temperature might not be finite
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        values, order = logits.sort(dim=-1, descending=True)
        probs = values.softmax(dim=-1)
        beyond = probs.cumsum(dim=-1) - probs >= top_p  # the tokens before this one already reach p
        beyond[:, 0] = False
        logits = logits.scatter(-1, order, values.masked_fill(beyond, -math.inf))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


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
