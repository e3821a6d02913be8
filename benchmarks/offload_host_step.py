"""The host's step for what offload hands it, against the optimizers that others step there: a part of bench_offload.

Peers do what they do under offload. Their weights lie on the host; those that are wider than the parameter are rounded
into memory that goes back to the device. DeepSpeed (0.19.8, ZeRO stages 1 to 3) widens gradients on the device, so they
come as float32, and keeps weights in bfloat16 where ``bf16_master_weights_and_grads`` asks for it, moments too with
``bf16_optimizer_states``. torchao's CPUOffloadOptimizer is torch's fused AdamW in the parameter's own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import harness
from benchmarks.bench_step_time import native
from benchmarks.host_contestants import (
    MOMENTS,
    Contestant,
    Times,
    heavy_tailed,
    in_place,
    missing,
    ours,
    timed,
    with_weights,
)
from benchmarks.step_contestants import CODED_ERROR, DEEPSPEED, FUSED, VALIDATION_STEPS, deepspeed_adam, fused
from benchmarks.step_timing import Plan

OURS, STOCHASTIC, SPLIT = "lowmem-adam", "lowmem-adam, stochastic", "lowmem-adam, split"
FUSED_BF16 = f"{FUSED}, all in bf16"
DEEPSPEED_WEIGHTS, DEEPSPEED_BF16 = f"{DEEPSPEED}, bf16 weights", f"{DEEPSPEED}, all in bf16"

EXACT = 1e-5
"""Error of fp32 moments; DeepSpeed may have twice that, since it computes 1 - beta ** step in float32."""
ROUNDED = 2.0**-7 * VALIDATION_STEPS**0.5
"""Error of bfloat16 moments: every step rounds them, each time by at most an eps, and the errors are independent."""
EPS32, EPS16 = 2.0**-23, 2.0**-7

_deepspeed_bf16 = partial(deepspeed_adam, fp32_optimizer_states=False)
_widened_here = with_weights(fused, torch.float32, widens=True)
_widened_there = with_weights(deepspeed_adam, torch.float32, widens=False)
_bf16_weights = with_weights(deepspeed_adam, torch.bfloat16, widens=False)
_all_in_bf16 = with_weights(_deepspeed_bf16, torch.bfloat16, widens=False)

FIELDS: dict[str, tuple[torch.dtype, dict[str, Contestant]]] = {
    "fp32": (
        torch.float32,
        {
            OURS: Contestant(ours(offload="cpu"), 12 + MOMENTS, CODED_ERROR, EPS32),
            FUSED: Contestant(in_place(fused), 28, EXACT, EPS32),
            DEEPSPEED: Contestant(in_place(deepspeed_adam), 28, 2 * EXACT, EPS32, optional=True),
        },
    ),
    "bf16": (
        torch.bfloat16,
        {
            STOCHASTIC: Contestant(ours(offload="cpu"), 6 + MOMENTS, CODED_ERROR, EPS16),
            SPLIT: Contestant(ours(offload="cpu", low_precision_update="split"), 10 + MOMENTS, CODED_ERROR, EPS32),
            FUSED: Contestant(_widened_here, 6 + 28 + 6, EXACT, EPS32),
            FUSED_BF16: Contestant(in_place(fused), 6 + 8, ROUNDED, EPS16),
            DEEPSPEED: Contestant(_widened_there, 28 + 6, 2 * EXACT, EPS32, optional=True),
            DEEPSPEED_WEIGHTS: Contestant(_bf16_weights, 6 + 16 + 4, 2 * EXACT, EPS16, optional=True),
            DEEPSPEED_BF16: Contestant(_all_in_bf16, 6 + 8 + 4, ROUNDED, EPS16, optional=True),
        },
    ),
}
"""By precision of parameters and gradients: ours, and what others step on the host."""

Table = tuple[str, list[str], list[list[harness.Cell]]]


def measure(numel: int, stream: int, plan: Plan, threads: int = 0) -> dict[str, Any]:
    """Times, ratios and host bytes of all that can be built here, on so many threads; 0 takes torch's number."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        fields = {name: _field(*field, numel, stream, plan) for name, field in FIELDS.items()}
        return {"numel": numel, "threads": torch.get_num_threads(), "native": native(), "fields": fields}
    finally:
        torch.set_num_threads(before)


def _field(
    dtype: torch.dtype, contestants: Mapping[str, Contestant], numel: int, stream: int, plan: Plan
) -> dict[str, Any]:
    absent = missing(contestants, dtype)
    there = {name: contestant for name, contestant in contestants.items() if name not in absent}
    times = timed(there, numel, stream, plan, dtype, heavy_tailed)
    return {"rows": times.rows, "ratios": list(_ratios(times)), "absent": absent}


def _ratios(times: Times) -> Iterator[dict[str, Any]]:
    """Of each of ours to each of the others."""
    for mine in times.samples:
        for peer in times.samples:
            if mine.startswith(OURS) and not peer.startswith(OURS):
                yield {"name": mine, "peer": peer, **times.ratio(mine, peer)}


def tables(data: Mapping[str, Any]) -> list[Table]:
    """Of what ``measure`` found: a table of times and bytes for each precision, and one of ratios."""
    header = ["optimizer", "ns/parameter", "5%", "95%", "bytes moved", "of bandwidth"]
    header += ["host bytes: kept", "passing", "error", "allowed"]
    keys = ["name", "ns", "p5", "p95", "moved_bytes", "bandwidth_share"]
    keys += ["state_bytes", "passing_bytes", "error", "allowed"]
    out: list[Table] = []
    for name, field in data["fields"].items():
        rows: list[list[harness.Cell]] = [[row[key] for key in keys] for row in field["rows"]]
        rows += [[peer, why, *["-"] * (len(header) - 2)] for peer, why in field["absent"].items()]
        out.append((f"The host's step of {data['numel']} parameters, {name}", header, rows))
    ratios: list[list[harness.Cell]] = [
        [name, *[row[key] for key in ("name", "peer", "ratio", "ratio_p5", "ratio_of_rounds", "ratio_p95")]]
        for name, field in data["fields"].items()
        for row in field["ratios"]
    ]
    of = ["dtype", "optimizer", "over", "ratio, of medians", "5%", "median of rounds", "95%"]
    return [*out, ("The host's step, ours over the others'", of, ratios)]


def setting(data: Mapping[str, Any]) -> str:
    """A sentence for the results page about how this was measured."""
    isa = data["native"].get("isa", "none, the reference ran")
    return (
        f"The host's step: {data['threads']} threads; our native kernel's instruction set: {isa}. Gradients are "
        "heavy-tailed and none is zero; every optimizer first followed the textbook Adam in float64. Host bytes are "
        "those of a parameter: moments and weights that are kept, and gradients and parameters that pass. Ours pass "
        "through two buckets of pinned memory in all, whatever the model's size."
    )
