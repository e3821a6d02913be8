"""What the step-time benchmark compares, each behind one small record, and the check that each computes Adam."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks import harness
from benchmarks.peer_formats import Float8, FourBits, MomentFormat
from lowmem_adam import AdamW8bit
from lowmem_adam.layout import BLOCK_SIZE
from tests.oracle import TextbookAdam

OURS, OURS_32BIT = "lowmem-adam", "lowmem-adam 32bit"
FUSED, FOREACH = "torch fused", "torch foreach"
DEEPSPEED, BITSANDBYTES, TORCHAO = "DeepSpeedCPUAdam", "bitsandbytes", "torchao"
TORCHAO_4BIT, TORCHAO_FP8 = "torchao 4bit", "torchao fp8"

# The decay is large so that leaving it out shows above the error of 8 bits; a step takes the same time with any.
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 2.0}
VALIDATION_SHAPE = (64, 256)  # whole blocks of every peer, and above the 4,096 elements from which all of them code
VALIDATION_STEPS = 10

# Twice what free runs of these formats measure where all gradient scales are equal (bench_codec_fidelity: 0.022 and
# 0.024): wide enough for ten steps, far below what a wrong bias correction, decay or rounding does.
CODED_ERROR = 0.05

# Codes that a peer may round the other way than the textbook whose moments pass through its format, as each computes
# the middle of two values in its own precision: one in a hundred thousand, wrong by its element's whole displacement.
FLIPPED_CODES = 1e-5

# What an optional package may raise where it cannot be imported, built or run on this machine's CPU.
UNAVAILABLE = (ImportError, OSError, RuntimeError, ValueError, AssertionError)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Contestant:
    """An optimizer at one precision of parameters and gradients."""

    name: str
    dtype: torch.dtype
    build: Callable[[list[Parameter]], Optimizer]
    moment_bytes: float
    """State held for one parameter."""
    coded: bool = False
    passes: bool = False
    """Whether a step is one pass over parameter, gradient and state, so that the bytes it moves can be counted."""
    optional: bool = False
    float32_corrections: bool = False
    """Whether 1 - beta ** step is computed in float32, which loses most of its digits in the first steps."""
    compiled: bool = False
    """Whether every shape of a parameter is compiled anew in its first step, for seconds."""
    coder: Callable[[], MomentFormat] | None = None
    """A format so coarse that its own error would hide a wrong step: the textbook's moments pass through it as well."""

    @property
    def label(self) -> str:
        return f"{self.name} {'bf16' if self.dtype == torch.bfloat16 else 'fp32'}"

    @property
    def held_bytes(self) -> float:
        """Parameter, gradient and state of one parameter."""
        return 2 * self.dtype.itemsize + self.moment_bytes

    @property
    def moved_bytes(self) -> float | None:
        """Least traffic of one parameter's step: it and its state read and written, the gradient read."""
        return 3 * self.dtype.itemsize + 2 * self.moment_bytes if self.passes else None

    def tolerance(self, oracle_path: Sequence[float], displacement: float) -> float:
        """What the format allows as error of the displacement; see ``allowed_error``."""
        flipped = 0.0 if self.coder is None else math.sqrt(FLIPPED_CODES)
        return flipped + allowed_error(self.dtype, oracle_path, displacement, self.coded, self.float32_corrections)


def allowed_error(
    dtype: torch.dtype, oracle_path: Sequence[float], displacement: float, coded: bool, float32_corrections: bool
) -> float:
    """What a format allows as error of the displacement, of which `oracle_path` has the parameter's norms.

    A step rounds a parameter at most twice to nearest (decay, update) or once stochastically: at most an eps of
    its magnitude. Uncoded moments lie in the parameter's type and cost another eps of the update. Gradients
    are drawn anew every step, so the errors of steps are independent and their squares add.
    """
    eps = torch.finfo(dtype).eps
    moments = CODED_ERROR if coded else eps * math.sqrt(VALIDATION_STEPS)
    corrections = correction_error() if float32_corrections else 0.0
    return moments + corrections + eps * math.hypot(*oracle_path) / displacement


def correction_error() -> float:
    """Mean over the steps: beta2 and its power are each off by half an ulp below 1, eps / 4; the root halves it."""
    corrections = [1 - SETTINGS["betas"][1] ** step for step in range(1, VALIDATION_STEPS + 1)]
    return torch.finfo(torch.float32).eps / 8 * sum(2 / c for c in corrections) / len(corrections)


def _ours(params: list[Parameter]) -> Optimizer:
    return AdamW8bit(params, **SETTINGS)


def _ours_32bit(params: list[Parameter]) -> Optimizer:
    return AdamW8bit(params, **SETTINGS, moments="32bit")


def fused(params: list[Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, **SETTINGS, fused=True)


def _foreach(params: list[Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, **SETTINGS, foreach=True)


def deepspeed_adam(params: list[Parameter], **settings: Any) -> Optimizer:
    # Both are read when deepspeed is imported; the kernel is compiled once and then found again.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(harness.CACHE / f"torch_extensions_{torch.__version__}"))
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer: Optimizer = DeepSpeedCPUAdam(params, **SETTINGS, adamw_mode=True, **settings)
    return optimizer


def _bitsandbytes(params: list[Parameter]) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit as BitsandbytesAdamW8bit

    optimizer: Optimizer = BitsandbytesAdamW8bit(params, **SETTINGS)
    return optimizer


def _torchao(name: str) -> Callable[[list[Parameter]], Optimizer]:
    def build(params: list[Parameter]) -> Optimizer:
        import torchao.optim

        optimizer: Optimizer = getattr(torchao.optim, name)(params, **SETTINGS)
        return optimizer

    return build


def own_and_torch() -> list[Contestant]:
    """What runs everywhere; torch keeps its moments in the parameter's type."""
    ours_bytes = 2 + 2 / BLOCK_SIZE
    out = []
    for dtype in (torch.float32, torch.bfloat16):
        moments = 2 * dtype.itemsize
        out += [
            Contestant(OURS, dtype, _ours, ours_bytes, coded=True, passes=True),
            Contestant(FUSED, dtype, fused, moments, passes=True),
            Contestant(FOREACH, dtype, _foreach, moments),
        ]
    return [*out, Contestant(OURS_32BIT, torch.float32, _ours_32bit, 8, passes=True)]


def own_settings() -> list[Contestant]:
    """Our other ways of keeping moments and bfloat16 weights, each by what it adds."""

    def built(**settings: Any) -> Callable[[list[Parameter]], Optimizer]:
        return lambda params: AdamW8bit(params, **SETTINGS, **settings)

    ours_bytes, bf16 = 2 + 2 / BLOCK_SIZE, torch.bfloat16
    split24 = built(low_precision_update="split", master_bits=24)
    return [
        Contestant(f"{OURS} bnb8bit", torch.float32, built(moments="bnb8bit"), 2 + 8 / 256, coded=True),
        Contestant(f"{OURS} split 24", bf16, split24, ours_bytes + 1, coded=True),
        Contestant(f"{OURS} split", bf16, built(low_precision_update="split"), ours_bytes + 2, coded=True),
        Contestant(f"{OURS} fp32 weights", bf16, built(low_precision_update="fp32"), ours_bytes + 4, coded=True),
    ]


def installed_peers() -> list[Contestant]:
    """Other packages' optimizers for the CPU; which of them are there, their validation finds out."""
    peer_bytes = 2 + 8 / 256  # two codes, and for 256 elements two float32 scales
    return [
        Contestant(DEEPSPEED, torch.float32, deepspeed_adam, 8, passes=True, optional=True, float32_corrections=True),
        Contestant(BITSANDBYTES, torch.float32, _bitsandbytes, peer_bytes, coded=True, optional=True),
        Contestant(TORCHAO, torch.float32, _torchao("AdamW8bit"), peer_bytes, coded=True, optional=True, compiled=True),
        *(
            Contestant(
                name,
                torch.float32,
                _torchao(kind),
                held,
                optional=True,
                float32_corrections=True,
                compiled=True,
                coder=coder,
            )
            for name, kind, held, coder in (
                (TORCHAO_4BIT, "AdamW4bit", 1 + 8 / 128, FourBits),
                (TORCHAO_FP8, "AdamWFp8", peer_bytes, Float8),
            )
        ),
    ]


def make_params(shapes: Sequence[Shape], dtype: torch.dtype, seed: int = 0) -> list[Parameter]:
    """Parameters with gradients that stay as they are: what is timed is the step alone."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in shapes:
        param = Parameter(torch.randn(shape, generator=generator, dtype=dtype).mul_(0.02))
        param.grad = torch.randn(shape, generator=generator, dtype=dtype).mul_(0.01)
        params.append(param)
    return params


def one_tensor(numel: int) -> list[Shape]:
    """One matrix of about so many elements; the smallest has rows that do not fill a block."""
    columns = 1024 if numel >= 100_000 else 100
    return [(max(1, numel // columns), columns)]


def gpt2_shapes(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> list[Shape]:
    """The parameters of GPT-2, by default the 148 of the small model; its output layer is the embedding."""
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp: list[Shape] = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *(norm + attention + norm + mlp) * layers, *norm]


def count(shapes: Sequence[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def displacement_error(contestant: Contestant) -> tuple[float, float]:
    """Error of the displacement after a few steps against the float64 textbook Adam, and what the format allows.

    Where the contestant names a coder, the textbook's moments pass through it between steps.
    """
    (param,) = make_params([VALIDATION_SHAPE], contestant.dtype)
    start = param.detach().double()
    oracle, path = TextbookAdam(param, **SETTINGS), []
    coder = None if contestant.coder is None else contestant.coder()
    optimizer = contestant.build([param])
    generator = torch.Generator().manual_seed(1)
    for step in range(1, VALIDATION_STEPS + 1):
        grad = torch.randn(VALIDATION_SHAPE, generator=generator).mul_(0.01).to(contestant.dtype)
        param.grad = grad.clone()
        optimizer.step()
        path.append(float(oracle.step(grad).norm()))
        if coder is not None:
            pass_through(coder, oracle, step)
    moved = oracle.param - start
    error = harness.relative_error(param.detach().double() - start, moved)
    return error, contestant.tolerance(path, float(moved.norm()))


def pass_through(coder: MomentFormat, oracle: TextbookAdam, step: int) -> None:
    """Give the textbook the moments that the format keeps of its own."""
    exp_avg, exp_avg_sq = (moment.float().flatten() for moment in (oracle.exp_avg, oracle.exp_avg_sq))
    kept = coder.decode(coder.encode(exp_avg, exp_avg_sq, step))
    oracle.exp_avg, oracle.exp_avg_sq = (moment.double().view_as(oracle.param) for moment in kept)


def why_unavailable(problem: Exception) -> str:
    """One of UNAVAILABLE, in a line."""
    if isinstance(problem, ModuleNotFoundError):
        return "not installed"
    first_line = next(iter(str(problem).splitlines()), "")
    return f"not available: {type(problem).__name__}: {first_line}"


def validate(contestant: Contestant) -> dict[str, Any]:
    """Whether a contestant may be timed, and why not; what is not optional has to be there and right."""
    row: dict[str, Any] = {"name": contestant.label, "error": None, "tolerance": None, "status": "timed"}
    try:
        row["error"], row["tolerance"] = displacement_error(contestant)
    except UNAVAILABLE as problem:
        if not contestant.optional:
            raise
        row["status"] = why_unavailable(problem)
        return row
    if not row["error"] <= row["tolerance"]:
        if not contestant.optional:
            raise RuntimeError(f"{contestant.label}: error {row['error']:.3g}, allowed {row['tolerance']:.3g}")
        row["status"] = "not timed: outside of the tolerance"
    return row
