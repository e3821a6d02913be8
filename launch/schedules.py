"""Learning-rate schedules that several jobs share, as factors for torch's LambdaLR."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, steps: int, warmup_steps: int, final_fraction: float = 0.0) -> float:
    """Linear warmup, then a cosine down to `final_fraction`, in optimizer steps counted from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return final_fraction + (1.0 - final_fraction) * cosine
