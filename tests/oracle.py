"""A textbook Adam in float64: what every backend and every benchmark is judged against.

Adam: Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 1.
AdamW: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 2, with the decay
multiplied by the learning rate as all implementations do (the paper's schedule multiplier absorbs it).
The lines follow the papers' order, one tensor at a time; nothing is fused, reordered or kept in fewer bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TextbookAdam:
    """One parameter tensor; `param`, `exp_avg` and `exp_avg_sq` are float64 and may be read or set at any time."""

    def __init__(
        self,
        param: Tensor,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = True,
        maximize: bool = False,
    ) -> None:
        self.param = param.detach().to(torch.float64).clone()
        self.exp_avg = torch.zeros_like(self.param)
        self.exp_avg_sq = torch.zeros_like(self.param)
        self.t = 0
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.decoupled, self.maximize = decoupled, maximize

    def step(self, grad: Tensor) -> Tensor:
        """Take one step with `grad` and return the new parameter (the live tensor)."""
        beta1, beta2 = self.betas
        self.t += 1
        g = grad.detach().to(torch.float64)
        if self.maximize:
            g = -g
        if not self.decoupled:
            g = g + self.weight_decay * self.param
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * g
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * g**2
        m_hat = self.exp_avg / (1 - beta1**self.t)
        v_hat = self.exp_avg_sq / (1 - beta2**self.t)
        update = m_hat / (v_hat.sqrt() + self.eps)
        if self.decoupled:
            update = update + self.weight_decay * self.param
        self.param = self.param - self.lr * update
        return self.param
