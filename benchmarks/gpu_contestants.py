"""What the GPU benchmark compares, each behind one small record, and the check that each computes Adam there."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks import harness
from benchmarks.step_contestants import (
    BITSANDBYTES,
    FUSED,
    OURS,
    OURS_32BIT,
    SETTINGS,
    TORCHAO,
    UNAVAILABLE,
    VALIDATION_STEPS,
    Shape,
    allowed_error,
    make_params,
    why_unavailable,
)
from lowmem_adam import AdamW8bit
from lowmem_adam.layout import Layout, is_coded
from tests.oracle import TextbookAdam

FLASHOPTIM, FLASH_PLAIN = "FlashOptim", "FlashOptim without correction"
FUSED_WEIGHTS = "torch fused on fp32 weights"
OURS_GRAPH, FUSED_GRAPH = f"{OURS} in a graph", f"{FUSED} in a graph"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Coded by all, coded with rows that do not fill their last block, and too small to be coded by most.
VALIDATION_SHAPES: tuple[Shape, ...] = ((64, 256), (50, 200), (768,))
GRAPH_WARM_STEPS = 3

# What a processor's and a device's arithmetic differ in: contracted multiply-adds, powers of beta in float32.
DEVICE_ERROR = 2e-6

# FlashOptim's kernel that codes its first zeros searches for its best launch, a second for each size. No step calls
# that kernel, and the search is left out.
FLASH_CODING_KERNEL = "_triton_quantize_kernel"


def _failures() -> tuple[type[Exception], ...]:
    """What a contestant may raise where its package, its compiler or its kernel does not do on this machine."""
    found: list[type[Exception]] = [*UNAVAILABLE, TypeError, AttributeError, LookupError, subprocess.SubprocessError]
    if importlib.util.find_spec("triton") is not None:
        from triton.errors import TritonError

        found.append(TritonError)
    return tuple(found)


FAILURES = _failures()


class NotHereError(RuntimeError):
    """A contestant that this device is known not to suit."""


class Steps(Protocol):
    """An optimizer, or what stands for one."""

    def step(self) -> Any: ...


@dataclass(frozen=True)
class Contestant:
    """An optimizer at one precision of parameters and gradients."""

    name: str
    precision: str
    build: Callable[[list[Parameter]], Steps]
    state: Callable[[Shape], float]
    """Least bytes of state of a parameter of this shape."""
    coded: bool = False
    optional: bool = True
    """Whether the run may end well without it."""
    captured: bool = False
    """Whether steps are replays of a CUDA graph."""
    compiled: bool = False
    """Whether each shape of a parameter is compiled, which takes seconds."""
    moved: float | None = None
    """Bytes of traffic of an element, where they do not follow from the state."""

    @property
    def label(self) -> str:
        return f"{self.name} {self.precision}"

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def yardstick(self) -> str:
        """Label of what it is compared with: torch's fused step, captured as well where this one is."""
        return f"{FUSED_GRAPH if self.captured else FUSED} {self.precision}"

    def state_bytes(self, shapes: Sequence[Shape]) -> float:
        return sum(self.state(shape) for shape in shapes)

    def moved_bytes(self, shapes: Sequence[Shape]) -> float:
        """Least traffic of a step: parameter and state read and written, the gradient read."""
        numel = sum(math.prod(shape) for shape in shapes)
        if self.moved is not None:
            return self.moved * numel
        return 3 * self.dtype.itemsize * numel + 2 * self.state_bytes(shapes)


# ---------------------------------------------------------------- bytes of state


def per_element(size: float) -> Callable[[Shape], float]:
    return lambda shape: size * math.prod(shape)


def own_state(weight: float = 0.0) -> Callable[[Shape], float]:
    """Of our format: codes and two bytes a block where coded, and what is kept of a weight beside its parameter."""

    def state(shape: Shape) -> float:
        numel = math.prod(shape)
        moments = 2 * numel + 2 * Layout.of(shape).n_blocks if is_coded(shape) else 8 * numel
        return moments + weight * numel

    return state


def grouped_state(
    group: int, scale: float, least: int = 0, whole: float = 8.0, exact: bool = False, weight: float = 0.0
) -> Callable[[Shape], float]:
    """Of a format with one scale for each group of elements of each moment.

    Args:
        group: elements with one scale.
        scale: its bytes.
        least: tensors with fewer elements are not coded.
        whole: bytes of an element that is not coded.
        exact: whether only tensors of whole groups are coded.
        weight: bytes kept of an element's weight beside the parameter.
    """

    def state(shape: Shape) -> float:
        numel = math.prod(shape)
        coded = numel >= least and not (exact and numel % group)
        moments = 2 * numel + 2 * scale * math.ceil(numel / group) if coded else whole * numel
        return moments + weight * numel

    return state


# ---------------------------------------------------------------- how each is built


class Captured:
    """An optimizer whose first steps run on a side stream; the next one is captured, and replayed from then on.

    As torch documents it for whole optimizers: gradients stay where they are and are written in place.
    """

    def __init__(self, optimizer: Steps) -> None:
        self.optimizer = optimizer
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.steps = 0

    def step(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        if self.steps < GRAPH_WARM_STEPS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.optimizer.step()
            torch.cuda.current_stream().wait_stream(self.stream)
            self.steps += 1
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.optimizer.step()
        self.graph = graph
        graph.replay()  # what is captured has not run


def captured(make: Callable[..., torch.optim.Optimizer], **settings: Any) -> Callable[[list[Parameter]], Steps]:
    def build(params: list[Parameter]) -> Steps:
        if not params[0].is_cuda:
            raise NotHereError("CUDA graphs need a CUDA device")
        lr = torch.tensor(SETTINGS["lr"], device=params[0].device)
        return Captured(make(params, **{**SETTINGS, "lr": lr}, **settings, capturable=True))

    return build


class OnWeights:
    """The usual mixed precision: gradients widened, float32 weights stepped, parameters rounded from them."""

    def __init__(self, params: list[Parameter]) -> None:
        self.params = params
        self.weights = [Parameter(param.detach().float()) for param in params]
        self.wide = [torch.zeros_like(weight) for weight in self.weights]
        for weight, grad in zip(self.weights, self.wide, strict=True):
            weight.grad = grad
        self.optimizer = torch.optim.AdamW(self.weights, **SETTINGS, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        # Looked up every step, as a training loop has to: gradients may be other tensors.
        narrow = [param.grad for param in self.params if param.grad is not None]
        torch._foreach_copy_(self.wide, narrow)
        self.optimizer.step()
        torch._foreach_copy_(list[Tensor](self.params), list[Tensor](self.weights))


def ours(**settings: Any) -> Callable[[list[Parameter]], Steps]:
    return lambda params: AdamW8bit(params, **SETTINGS, **settings)


def _fused(params: list[Parameter]) -> Steps:
    return torch.optim.AdamW(params, **SETTINGS, fused=True)


def _bitsandbytes(params: list[Parameter]) -> Steps:
    from bitsandbytes.optim import AdamW8bit as BitsandbytesAdamW8bit

    optimizer: Steps = BitsandbytesAdamW8bit(params, **SETTINGS)
    return optimizer


def _torchao(**settings: Any) -> Callable[[list[Parameter]], Steps]:
    def build(params: list[Parameter]) -> Steps:
        from torchao.optim import AdamW8bit as TorchaoAdamW8bit

        if not params[0].is_cuda:
            raise NotHereError("compiles for tens of seconds on the CPU; bench_step_time has it there")
        optimizer: Steps = TorchaoAdamW8bit(params, **SETTINGS, **settings)
        return optimizer

    return build


def _flashoptim(master_weight_bits: int | None) -> Callable[[list[Parameter]], Steps]:
    def build(params: list[Parameter]) -> Steps:
        from flashoptim import FlashAdamW, optimizers

        kernel = getattr(optimizers, FLASH_CODING_KERNEL)
        kernel.configs = kernel.configs[:1]
        with warnings.catch_warnings():
            # That a bfloat16 parameter without correction loses updates is what the contestant's name says.
            warnings.filterwarnings("ignore", message="master_weight_bits=None")
            optimizer: Steps = FlashAdamW(params, **SETTINGS, master_weight_bits=master_weight_bits)
        return optimizer

    return build


def contestants(precision: str) -> list[Contestant]:
    """Everyone at a precision, the yardstick first; where memory is short, the last ones are left out."""
    item = PRECISIONS[precision].itemsize
    bnb_state = grouped_state(256, 4, least=4096)
    out = [
        Contestant(FUSED, precision, _fused, per_element(2 * item), optional=False),
        Contestant(OURS, precision, ours(), own_state(), coded=True, optional=False),
        Contestant(BITSANDBYTES, precision, _bitsandbytes, bnb_state, coded=True),
    ]
    bits, correction = (None, 0.0) if precision == "fp32" else (24, 1.0)
    flash = grouped_state(32, 2, weight=correction)
    out.append(Contestant(FLASHOPTIM, precision, _flashoptim(bits), flash, coded=True))
    out.append(Contestant(OURS_GRAPH, precision, captured(AdamW8bit), own_state(), coded=True, captured=True))
    graph = captured(torch.optim.AdamW, fused=True)
    out.append(Contestant(FUSED_GRAPH, precision, graph, per_element(2 * item), captured=True))
    out.append(
        Contestant(
            f"{OURS} bnb8bit",
            precision,
            ours(moments="bnb8bit", nonfinite="propagate", low_precision_update="nearest"),
            bnb_state,
            coded=True,
        )
    )
    if precision == "bf16":
        for name, update, weight in (
            ("split", {"low_precision_update": "split"}, 2.0),
            ("split 24", {"low_precision_update": "split", "master_bits": 24}, 1.0),
            ("fp32 weights", {"low_precision_update": "fp32"}, 4.0),
            ("nearest", {"low_precision_update": "nearest"}, 0.0),
        ):
            out.append(Contestant(f"{OURS} {name}", precision, ours(**update), own_state(weight), coded=True))
        plain = grouped_state(32, 2)
        out.append(Contestant(FLASH_PLAIN, precision, _flashoptim(None), plain, coded=True))
    stochastic = {"bf16_stochastic_round": True} if precision == "bf16" else {}
    torchao_state = grouped_state(256, 4, least=4096, whole=2 * item, exact=True)
    out.append(Contestant(TORCHAO, precision, _torchao(**stochastic), torchao_state, coded=True, compiled=True))
    out.append(Contestant(OURS_32BIT, precision, ours(moments="32bit"), per_element(8), optional=False))
    if precision == "bf16":
        # Gradients 2 read, 4 written, 4 read; weights read and written, read again; moments; parameters 2 written.
        out.append(Contestant(FUSED_WEIGHTS, precision, OnWeights, per_element(16), moved=40.0))
    return out


def small_shapes(tensors: int) -> list[Shape]:
    """Matrices of 16, 32 and 64 thousand elements in turn: what the launches of a step cost shows here."""
    return [((128, 128), (128, 256), (256, 256))[i % 3] for i in range(tensors)]


# ---------------------------------------------------------------- validation


def displacement_error(contestant: Contestant, device: torch.device) -> tuple[float, float]:
    """Of the tensor that comes nearest to what its format allows: error of the displacement, and what is allowed.

    Gradients are written in place, since a graph knows them by their place.
    """
    shapes = VALIDATION_SHAPES[:1] if contestant.compiled else VALIDATION_SHAPES
    params = [Parameter(param.detach().to(device)) for param in make_params(shapes, contestant.dtype)]
    starts = [param.detach().double().cpu() for param in params]
    oracles = [TextbookAdam(param.detach().cpu(), **SETTINGS) for param in params]
    paths: list[list[float]] = [[] for _ in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = contestant.build(params)
    generator = torch.Generator().manual_seed(1)
    for _ in range(VALIDATION_STEPS):
        for param, oracle, path in zip(params, oracles, paths, strict=True):
            grad = torch.randn(param.shape, generator=generator).mul_(0.01).to(contestant.dtype)
            assert param.grad is not None
            param.grad.copy_(grad)
            path.append(float(oracle.step(grad).norm()))
        optimizer.step()
    found = []
    for param, start, oracle, path in zip(params, starts, oracles, paths, strict=True):
        moved = oracle.param - start
        error = harness.relative_error(param.detach().double().cpu() - start, moved)
        allowed = allowed_error(contestant.dtype, path, float(moved.norm()), contestant.coded, True)
        found.append((error, allowed + DEVICE_ERROR))
    return max(found, key=lambda pair: pair[0] / pair[1])


def told(problem: Exception) -> str:
    """One of FAILURES in a line; where it is a surprise, its place is printed as well."""
    if not isinstance(problem, NotHereError | ModuleNotFoundError):
        traceback.print_exception(problem, limit=-3)
    return why_unavailable(problem)


def validate(contestant: Contestant, device: torch.device) -> dict[str, Any]:
    """Whether a contestant may be timed, and why not."""
    row: dict[str, Any] = {"label": contestant.label, "name": contestant.name, "optional": contestant.optional}
    row |= {"error": None, "tolerance": None, "status": "timed"}
    try:
        row["error"], row["tolerance"] = displacement_error(contestant, device)
    except FAILURES as problem:
        row["status"] = told(problem)
        return row
    if not row["error"] <= row["tolerance"]:
        row["status"] = "not timed: outside of the tolerance"
    return row
