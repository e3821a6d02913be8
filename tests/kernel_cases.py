"""What the tests of the native kernel share: hostile rows of numbers, fragments of every kind, and a comparison to the
bit with the reference after every step.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_adam.kernels import cpu, reference
from lowmem_adam.kernels.fragment import CodedMoments, DynamicMoments, Fragment, FullMoments, Moments, StepScalars
from lowmem_adam.layout import BLOCK_SIZE, FLAT, FLAT_BLOCK_SIZE, Layout
from lowmem_adam.state import master_dtype
from tests.cases import Shape, everything, generator

DTYPE_PAIRS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
)
"""Of parameter and gradient: all that are accepted."""

SETTINGS: dict[str, Any] = {
    "lr": 1e-2,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "decoupled": True,
    "maximize": False,
    "low_precision_update": "stochastic",
    "master_bits": 32,
    "nonfinite": "skip",
    "seed": 5,
}

MOMENTS = ("8bit", "32bit", FLAT, "32bit, flat")
"""All kinds of moments; the last are those of small parameters beside bitsandbytes' format."""

UPDATES: dict[str, dict[str, Any]] = {
    "nearest": {"low_precision_update": "nearest"},
    "stochastic": {},
    "split": {"low_precision_update": "split"},
    "split in 24 bits": {"low_precision_update": "split", "master_bits": 24},
    "fp32": {"low_precision_update": "fp32"},
}
"""How a 16-bit parameter takes its update."""
MASTERS = tuple(UPDATES)[2:]
"""Those for which something is kept beside it."""

_WITH_EACH: dict[str, dict[str, Any]] = {
    "": {},
    ", propagate": {"nonfinite": "propagate"},
    ", Adam of NaN": {"nonfinite": "propagate", "decoupled": False},
    ", eps 0": {"eps": 0.0},
    ", gradients times 0.37": {"grad_scale": 0.37},
    ", large lr": {"lr": 1e30},
}

CHANGES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "no decay": {"weight_decay": 0.0},
    "Adam": {"decoupled": False},
    "Adam of NaN": {"decoupled": False, "nonfinite": "propagate"},
    "Adam with a decay that vanishes in float32": {"decoupled": False, "weight_decay": 1e-60},
    "maximize": {"maximize": True},
    "Adam, maximize": {"maximize": True, "decoupled": False, "grad_scale": 0.3},
    "nearest": UPDATES["nearest"],
    **{f"{update}{kind}": {**UPDATES[update], **changes} for update in MASTERS for kind, changes in _WITH_EACH.items()},
    "propagate": {"nonfinite": "propagate"},
    "propagate, nearest": {"nonfinite": "propagate", "low_precision_update": "nearest"},
    "propagate, maximize": {"nonfinite": "propagate", "maximize": True},
    "eps 0": {"eps": 0.0},
    "eps 0, propagate": {"eps": 0.0, "nonfinite": "propagate"},
    "denormal eps": {"eps": 1e-40},
    "eps just below the smallest normal": {"eps": 1.1e-38},
    "large eps": {"eps": 1e10},
    "lr 0": {"lr": 0.0},
    "denormal lr": {"lr": 1e-42, "weight_decay": 0.0},
    "large lr": {"lr": 1e30},
    "all decays": {"lr": 1.0, "weight_decay": 1.0},
    "large L2": {"weight_decay": 1e30, "decoupled": False},
    "betas 0": {"betas": (0.0, 0.0)},
    "slow betas": {"betas": (1 - 2**-53, 1 - 2**-53)},
    **{f"betas {betas}": {"betas": betas} for betas in ((0.95, 0.1), (0.9, 0.9999), (0.0, 0.999))},  # wide ratios
    **{
        f"gradients times {factor!r}, {mode}": {"grad_scale": factor, "nonfinite": mode}
        for mode, factors in {
            "skip": (0.0, 0.37, -0.37, 1e-60, 1 + 1e-12, 1e38, torch.inf, torch.nan),
            "propagate": (0.0, 1e-40, 1e20, 1e60, torch.inf, torch.nan),
        }.items()
        for factor in factors
    },
}


def without_library() -> str | None:
    """Why there is no native library to test; None where there is one.

    Raises:
        LibraryError: it should be there: nobody switched it off, and a C++ compiler could have built it.
    """
    try:
        cpu.load()
    except cpu.LibraryError as error:
        if os.environ.get("LOWMEM_ADAM_LIBRARY") != "none" and any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise
        return str(error)
    return None


def isas() -> list[str]:
    """The instruction sets of this library that this processor has."""
    return [] if without_library() else [name for name in cpu.ISAS if cpu.load().has_isa(name)]


def scalars(step: int, **changes: Any) -> StepScalars:
    return StepScalars.at_step(step, **{k: v for k, v in {**SETTINGS, **changes}.items() if k != "master_bits"})


# ---------------------------------------------------------------- numbers

Row = Callable[[Tensor, Tensor], Tensor]
"""From normal numbers and uniform ones in [0, 1) to the numbers of a row."""

_INFINITY = torch.tensor(torch.inf)


def _only(at: int, values: Tensor) -> Tensor:
    """Zero but for one element in every 128."""
    return torch.where(torch.arange(len(values)) % 128 == at, values, 0.0)


GRADIENTS: dict[str, Row] = {
    "normal": lambda n, u: n * 0.01,
    "decades": lambda n, u: n * 10.0 ** (u * 14 - 12),
    "more octaves than a grid has": lambda n, u: n.sign() * 2.0 ** (u * 80 - 60),
    "1e-38 to 1e38": lambda n, u: n.sign() * 10.0 ** (u * 76 - 38),
    "zeros between": lambda n, u: torch.where(u < 0.5, n * 0.0, n),
    "zeros of both signs": lambda n, u: n * 0.0,
    "one element": lambda n, u: _only(17, n),
    "one tiny element": lambda n, u: _only(0, n * 1e-30),
    "denormal": lambda n, u: n * 1e-40,
    "squares that underflow": lambda n, u: n * 1e-22,
    "squares that overflow": lambda n, u: n * 1e25,
    "largest finite": lambda n, u: n.sign() * torch.finfo(torch.float32).max,
    "constant": lambda n, u: torch.ones_like(n),
    "powers of two": lambda n, u: n.sign() * 2.0 ** (u * 20 - 10).floor(),
    "some infinite": lambda n, u: torch.where(u < 0.02, n.sign() * _INFINITY, n),
    "one NaN": lambda n, u: torch.where(torch.arange(len(n)) == 3, torch.nan, n),
    "all infinite": lambda n, u: n.sign() * _INFINITY,
    "NaN of odd payloads": lambda n, u: n,  # by odd_nan
}

WEIGHTS: dict[str, Row] = {
    "normal": lambda n, u: n * 0.1,
    "1e-38 to 1e38": lambda n, u: n.sign() * 10.0 ** (u * 76 - 38),
    "denormal": lambda n, u: torch.where(u < 0.5, n * 1e-40, n * 1e-6),
    "zeros of both signs": lambda n, u: n * 0.0,
    "not finite": lambda n, u: torch.where(u < 0.3, torch.nan, torch.where(u < 0.6, n.sign() * _INFINITY, n)),
}


def odd_nan(values: Tensor) -> None:
    """Overwrite every third element by a NaN: of all bits but the sign, of all bits, signalling."""
    if values.dtype == torch.float32:
        words = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32)
    else:
        lowest = 0x7F81 if values.dtype == torch.bfloat16 else 0x7C01
        words = torch.tensor([0x7FFF, -1, lowest], dtype=torch.int16)
    places = values[::3]
    places.copy_(words.repeat(len(places) // len(words) + 1)[: len(places)].view(values.dtype))


def rows_of(kinds: Sequence[str], table: dict[str, Row], cols: int, dtype: torch.dtype, *key: int) -> Tensor:
    """A matrix with a row of every kind named."""
    rows = torch.empty(len(kinds), cols, dtype=dtype)
    random = generator(*key)
    for row, kind in zip(rows, kinds, strict=True):
        row.copy_(table[kind](torch.randn(cols, generator=random), torch.rand(cols, generator=random)))
        if kind == "NaN of odd payloads":
            odd_nan(row)
    return rows


# ---------------------------------------------------------------- fragments


def is_flat(moments: str | Moments) -> bool:
    return moments in (FLAT, "32bit, flat") if isinstance(moments, str) else isinstance(moments, DynamicMoments)


def layout_of(rows: int, cols: int, moments: str) -> Layout:
    """Of so many rows, where blocks keep to them, and else of as many elements."""
    return Layout(1, rows * cols, block_size=FLAT_BLOCK_SIZE) if is_flat(moments) else Layout(rows, cols)


def layout_of_shape(shape: Sequence[int], moments: str | Moments) -> Layout:
    return Layout.of(shape, FLAT if is_flat(moments) else "8bit")


def zero_moments(layout: Layout, first: int, end: int, moments: str) -> Moments:
    """Moments before the first step, whatever the parameter's size."""
    numel = layout.block_start(end) - layout.block_start(first)
    assert layout.block_size == (FLAT_BLOCK_SIZE if is_flat(moments) else BLOCK_SIZE)
    if moments == FLAT:
        flat_codes = (torch.zeros(numel, dtype=torch.uint8) for _ in range(2))
        return DynamicMoments(*flat_codes, *(torch.zeros(end - first) for _ in range(2)))
    if moments.startswith("32bit"):
        return FullMoments(torch.zeros(numel), torch.zeros(numel))
    codes = (torch.zeros(numel, dtype=torch.int8), torch.zeros(numel, dtype=torch.uint8))
    return CodedMoments(*codes, *(torch.zeros(end - first, dtype=torch.uint8) for _ in range(2)))


def random_moments(layout: Layout, moments: str, *key: int) -> Moments:
    """Moments in the midst of a training: any codes, on grids of usual size."""
    drawn, made = generator(*key), zero_moments(layout, 0, layout.n_blocks, moments)
    if isinstance(made, FullMoments):
        made.exp_avg_sq.copy_(torch.rand(layout.numel, generator=drawn) * 1e-4)
        made.exp_avg.copy_(made.exp_avg_sq.sqrt() * torch.randn(layout.numel, generator=drawn))
    elif isinstance(made, DynamicMoments):
        made.state1.random_(0, 256, generator=drawn)
        made.state2.random_(0, 256, generator=drawn)
        made.absmax1.uniform_(1e-6, 1e-2, generator=drawn)
        made.absmax2.uniform_(1e-12, 1e-4, generator=drawn)
    else:
        made.exp_avg_code.random_(-127, 128, generator=drawn)
        made.exp_avg_sq_code.random_(0, 256, generator=drawn)
        made.block_floor.random_(90, 125, generator=drawn)
        octaves = torch.randint(0, 8, made.block_span.shape, generator=generator(*key, 0), dtype=torch.uint8)
        made.block_span.random_(1, 25, generator=drawn).add_(octaves << 5)
    return made


def zero_master(param: Tensor, changes: dict[str, Any]) -> Tensor | None:
    """What is kept of the weights before the first step: nothing, so that they are the parameters."""
    dtype = master_dtype(param.dtype, {**SETTINGS, **changes})
    if dtype == torch.float32:
        return param.float().reshape(-1)
    return None if dtype is None else torch.zeros(param.numel(), dtype=dtype)


def random_master(param: Tensor, changes: dict[str, Any], *key: int) -> Tensor | None:
    """Any correction, of which some fit no parameter; master weights of which about half still round to theirs."""
    drawn, made = generator(*key), zero_master(param, changes)
    if made is None or made.dtype != torch.float32:
        return made if made is None else made.random_(-128, 128, generator=drawn).mul_(1 if made.itemsize == 1 else 257)
    near = made * (1 + (torch.rand(made.shape, generator=drawn) - 0.5) * torch.finfo(param.dtype).eps)
    return torch.where(torch.rand(made.shape, generator=drawn) < 0.1, torch.randn(made.shape, generator=drawn), near)


def whole(
    param: Tensor,
    grad: Tensor,
    moments: str | Moments = "8bit",
    master: Tensor | None = None,
    layout: Layout | None = None,
) -> Fragment:
    """A parameter in one piece, with 8-bit moments also where the optimizer would keep fp32 ones."""
    layout = layout_of_shape(param.shape, moments) if layout is None else layout
    held = zero_moments(layout, 0, layout.n_blocks, moments) if isinstance(moments, str) else moments
    return Fragment(param, grad, held, layout, 0, layout.n_blocks, master=master)


def memory(tensor: Tensor) -> Tensor:
    """All the memory that a tensor spans, also what lies between its elements."""
    if tensor.numel() == 0:
        return tensor.reshape(-1)
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,))


def state_by_name(fragment: Fragment) -> dict[str, Tensor]:
    """All that a step changes beside the parameter."""
    master = {} if fragment.master is None else {"master": fragment.master}
    return {**fragment.moments._asdict(), **master}


def with_state(fragment: Fragment, held: dict[str, Tensor]) -> Fragment:
    """The fragment with other tensors of these names."""
    moments = {name: tensor for name, tensor in held.items() if name != "master"}
    return fragment._replace(moments=type(fragment.moments)(**moments), master=held.get("master"))


def twin(fragment: Fragment) -> Fragment:
    """The same fragment in memory of its own: parameter and state, not the gradient."""
    param = memory(fragment.param).clone().as_strided(fragment.param.shape, fragment.param.stride(), 0)
    held = {name: tensor.clone() for name, tensor in state_by_name(fragment).items()}
    cache: dict[str, Any] | None = None if fragment.cache is None else {}
    return with_state(fragment._replace(param=param, cache=cache), held)


def cut(fragment: Fragment, first: int, end: int) -> Fragment:
    """Blocks ``[first, end)`` of a contiguous fragment, as views."""
    origin = fragment.layout.block_start(fragment.first_block)
    part = slice(fragment.layout.block_start(first) - origin, fragment.layout.block_start(end) - origin)
    blocks = slice(first - fragment.first_block, end - fragment.first_block)
    held = {
        name: tensor.view(-1)[blocks if name.startswith(("block", "absmax")) else part]
        for name, tensor in state_by_name(fragment).items()
    }
    param, grad = fragment.param.view(-1)[part], fragment.grad.view(-1)[part]
    return with_state(fragment._replace(param=param, grad=grad, first_block=first, end_block=end, cache=None), held)


# ---------------------------------------------------------------- comparison

Snapshot = dict[str, Tensor]
Step = Callable[[Fragment, StepScalars], Tensor | int]


class Case(NamedTuple):
    """A fragment, and what is done to it: a gradient and a record of hyperparameters for each step."""

    start: Fragment
    steps: Sequence[tuple[Tensor, StepScalars]]


def native(isa: str | None = None, num_threads: int = 1) -> Step:
    """The native kernel on one fragment."""
    return lambda fragment, record: cpu.adam_step_([(fragment, record)], isa=isa, num_threads=num_threads)


def snapshot(fragment: Fragment, skipped: Tensor | int = 0) -> Snapshot:
    """Copies of everything that a step may change, and the count it returned."""
    held = {name: tensor.clone() for name, tensor in state_by_name(fragment).items()}
    return {"param": memory(fragment.param).clone(), **held, "skipped": torch.as_tensor(skipped)}


def play(case: Case, step_: Step = reference.adam_step_) -> list[Snapshot]:
    """What a kernel makes of a case: a snapshot after every step."""
    now, seen = twin(case.start), []
    for grad, record in case.steps:
        skipped = step_(now._replace(grad=grad), record)
        seen.append(snapshot(now, skipped))
    return seen


def different(a: Tensor, b: Tensor) -> Tensor:
    """Elements whose bits differ, but for the payloads of NaN."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    if not a.is_floating_point():
        return a != b
    words = torch.int32 if a.dtype == torch.float32 else torch.int16
    return (a.view(words) != b.view(words)) & ~(a.isnan() & b.isnan())


def differences(wanted: Sequence[Snapshot], got: Sequence[Snapshot]) -> list[str]:
    """Where two plays of a case differ, in words."""
    said = []
    for step, (a, b) in enumerate(zip(wanted, got, strict=True)):
        assert list(a) == list(b)
        for name in a:
            places = different(a[name], b[name]).reshape(-1).nonzero().view(-1).tolist()
            if places:
                at = places[0]
                values = f"{a[name].view(-1)[at].item()!r} and {b[name].view(-1)[at].item()!r}"
                said.append(f"step {step}, {name}: {len(places)} of {a[name].numel()} differ, [{at}]: {values}")
    return said


def assert_same(wanted: Sequence[Snapshot], got: Sequence[Snapshot], where: str = "") -> None:
    said = differences(wanted, got)
    assert not said, f"{where}: " + "; ".join(said)


# ---------------------------------------------------------------- many cases at once


def one_step(
    param: Tensor,
    grad: Tensor,
    moments: str | Moments,
    step: int = 7,
    layout: Layout | None = None,
    **changes: Any,
) -> Case:
    master = random_master(param, changes, step) if step > 1 else zero_master(param, changes)
    return Case(whole(param, grad, moments, master, layout), [(grad, scalars(step, **changes))])


def hostile(
    changes: dict[str, Any], dtypes: tuple[torch.dtype, torch.dtype], moments: str, cols: int = 150, every: int = 1
) -> Case:
    """A row for every pair of kinds; after two steps rows go on with another kind of gradient.

    ``cols`` in a row, 128 and 22 by default; with ``every``, only one of so many pairs has a row.
    """
    kinds = list(itertools.product(GRADIENTS, WEIGHTS))[::every]
    weights = rows_of([weight for _, weight in kinds], WEIGHTS, cols, dtypes[0], 1)
    steps = []
    master = random_master(weights, changes, 3)
    for step in range(3):
        shift = step // 2 * len(WEIGHTS)
        shifted = [kinds[(row + shift) % len(kinds)][0] for row in range(len(kinds))]
        grad = rows_of(shifted, GRADIENTS, cols, dtypes[1], 2, step)
        steps.append((grad, scalars(step + 1, **changes)))
    return Case(whole(weights, steps[0][0], moments, master), steps)


def all_halves(dtype: torch.dtype) -> Tensor:
    """Every number of 16 bits."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(512, 128)


def mixed_work(count: int, seed: int, shapes: Callable[[random.Random, int], tuple[int, ...]]) -> list[Case]:
    """Parameters of every dtype and setting, in the midst of training, one step each."""
    drawn, made = random.Random(seed), []
    names = list(CHANGES)
    for index in range(count):
        shape, pair = shapes(drawn, index), DTYPE_PAIRS[drawn.randrange(5)]
        param = torch.randn(shape, generator=generator(seed, index)).to(pair[0])
        grad = (torch.randn(shape, generator=generator(seed, index, 1)) * 0.01).to(pair[1])
        if drawn.random() < 0.1 and param.numel():
            grad.view(-1)[drawn.randrange(param.numel())] = drawn.choice([torch.inf, -torch.inf, torch.nan])
        moments = drawn.choice(MOMENTS)
        layout = layout_of_shape(shape, moments)
        held, changes = random_moments(layout, moments, seed, index, 2), CHANGES[names[drawn.randrange(len(names))]]
        made.append(one_step(param, grad, held, drawn.randrange(1, 50), layout, **changes))
    return made


def together(cases_: list[Case], isa: str | None = None, num_threads: int | None = 1) -> tuple[list[Snapshot], int]:
    """All cases' first steps in one call."""
    work = [(twin(case.start)._replace(grad=case.steps[0][0]), case.steps[0][1]) for case in cases_]
    skipped = cpu.adam_step_(work, isa=isa, num_threads=num_threads)
    return [snapshot(fragment) for fragment, _ in work], int(skipped)


def one_by_one(cases_: list[Case]) -> tuple[list[Snapshot], int]:
    played = [play(case)[0] for case in cases_]
    skipped = sum(int(seen.pop("skipped")) for seen in played)
    return [{**seen, "skipped": torch.tensor(0)} for seen in played], skipped


# ---------------------------------------------------------------- layouts in memory


def sliced(values: Tensor) -> Tensor:
    """In the midst of more memory, not aligned to anything; what lies around is NaN."""
    around = torch.full((values.numel() + 9,), torch.nan, dtype=values.dtype)
    around[5:-4] = values.reshape(-1)
    return around[5:-4].view(values.shape)


def every_other(values: Tensor) -> Tensor:
    around = torch.full((*values.shape[:-1], values.shape[-1] * 2), torch.nan, dtype=values.dtype)
    around[..., ::2] = values
    return around[..., ::2]


def in_order(*order: int) -> Callable[[Tensor], Tensor]:
    """Dimensions in memory in another order."""
    back = [order.index(dimension) for dimension in range(len(order))]
    return lambda values: values.permute(order).contiguous().permute(back)


def reversed_order(values: Tensor) -> Tensor:
    return in_order(*reversed(range(values.dim())))(values)


MEMORY: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor], int]] = {
    "unaligned": ((3, 300), sliced, 0),
    "transposed": ((140, 9), lambda x: x.t().contiguous().t(), 2),
    "permuted": ((3, 20, 30), in_order(2, 0, 1), 2),
    "channels last": ((3, 16, 5, 5), lambda x: x.contiguous(memory_format=torch.channels_last), 3),
    "every other": ((4, 150), every_other, 1),
    "rows apart": ((5, 150), lambda x: torch.cat([x, x], dim=1)[:, :150], 2),
    "a column": ((200,), lambda x: x[:, None].repeat(1, 3)[:, 1], 1),
    "sizes of 1 between": (
        (1, 12, 1, 40, 1),
        lambda x: x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        2,
    ),
    "ten dimensions that merge to one": ((2,) * 10, every_other, 1),
    "eight dimensions": ((2, 3, 2, 2, 3, 2, 2, 3), reversed_order, 8),
    "ten dimensions": ((2,) * 10, reversed_order, 10),
}
"""Shape, how it lies in memory, and how many dimensions remain of it."""


# ---------------------------------------------------------------- optimizers

BIG = (Shape("300 blocks", (300, 100), True), Shape("few", (7,), False))
"""Blocks enough for four threads."""


def results(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """Parameters and state without the settings, of which ``backend`` may differ."""
    held = everything(opt)
    return {"params": held["params"], "state": held["state"]}
