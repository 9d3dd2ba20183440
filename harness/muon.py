"""Muon, an optimizer for matrices: momentum whose every update is made orthogonal."""

import math

import torch


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): each update of a matrix is its momentum, made orthogonal in `dtype`.

    A parameter of a group with `stacked` n is n matrices on top of one another, each for itself. An
    update's size is matched to AdamW's (Liu et al. 2025, section 2.2), so that one rate serves both.
    """

    def __init__(self, groups, lr, weight_decay, dtype, momentum=0.95):
        self.dtype = dtype
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum, n = group["lr"], group["momentum"], group["stacked"]
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average = self.state[p]["momentum_buffer"]
                average.lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(average, momentum)  # Nesterov's look ahead
                p.mul_(1 - lr * group["weight_decay"])
                for weight, change in zip(p.chunk(n), update.chunk(n)):
                    size = 0.2 * math.sqrt(max(weight.shape))
                    weight.add_(orthogonalize(change, self.dtype), alpha=-lr * size)


def orthogonalize(matrix, dtype):
    """Nearly U V^T of the matrix U S V^T: five Newton-Schulz steps with Jordan's coefficients."""
    x = matrix.to(dtype)
    if x.size(0) > x.size(1):
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.T
        b = torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, b, x, beta=3.4445)
    return x.T if matrix.size(0) > matrix.size(1) else x
