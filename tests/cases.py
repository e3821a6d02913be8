"""What many tests share: parameters of every shape, seeded gradients, a training loop, comparison to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lowmem_adam import Adam8bit, AdamW8bit

OptimizerClass = type[Adam8bit]
CLASSES: tuple[OptimizerClass, ...] = (AdamW8bit, Adam8bit)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OTHER_GRADIENTS = hasattr(Tensor, "grad_dtype")
"""Whether parameters take gradients of another dtype than their own, which they did not in torch 2.9."""


class Shape(NamedTuple):
    """A parameter: its shape, whether it keeps 8-bit codes, and how it lies in memory."""

    name: str
    shape: tuple[int, ...]
    coded: bool
    memory: str = "contiguous"


SHAPES = (
    Shape("matrix", (64, 128), True),
    Shape("at the limit", (32, 128), True),
    Shape("below the limit", (31, 132), False),
    Shape("ragged rows", (40, 300), True),
    Shape("short rows", (512, 9), True),
    Shape("one column", (4096, 1), True),
    Shape("one row", (1, 5000), True),
    Shape("bias", (7,), False),
    Shape("long vector", (65535,), False),
    Shape("flat partition", (65536 + 72,), True),
    Shape("scalar", (), False),
    Shape("no rows", (0, 5), False),
    Shape("no columns", (5, 0), False),
    Shape("convolution", (32, 16, 3, 3), True),
    Shape("channels last", (32, 16, 3, 3), True, "channels_last"),
    Shape("transposed", (96, 130), True, "transposed"),
    Shape("permuted", (8, 20, 30), True, "permuted"),
    Shape("every other column", (40, 150), True, "strided"),
    Shape("small transposed", (5, 9), False, "transposed"),
)

FEW = tuple(s for s in SHAPES if s.name in ("matrix", "ragged rows", "bias", "scalar", "channels last", "transposed"))
"""For tests of something else than shapes."""


def generator(*key: int) -> torch.Generator:
    """A generator of its own for every key; neighbouring keys give unrelated streams."""
    word = 1
    for part in key:
        word = (word * 1_000_003 + part + 7) % (1 << 61)
    return torch.Generator().manual_seed(word)


def lay_out(values: Tensor, memory: str) -> Tensor:
    """The same values, held in memory in another way; whatever lies between them is NaN."""
    if memory == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if memory == "transposed":
        return values.t().contiguous().t()
    if memory == "permuted":
        return values.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if memory == "strided":
        around = torch.full((values.shape[0], values.shape[1] * 2 + 1), torch.nan, dtype=values.dtype)
        view = around[:, 1::2]
        view.copy_(values)
        return view
    assert memory == "contiguous"
    return values.contiguous()


def make_params(
    shapes: Sequence[Shape] = SHAPES, dtype: torch.dtype = torch.float32, *, seed: int = 0, as_is: bool = True
) -> list[Parameter]:
    """A parameter for every row; ``as_is=False`` makes all of them contiguous."""
    params = []
    for index, shape in enumerate(shapes):
        values = (torch.randn(shape.shape, generator=generator(seed, index)) * 0.1).to(dtype)
        params.append(Parameter(lay_out(values, shape.memory if as_is else "contiguous")))
    return params


def gradient(param: Tensor, *key: int, decades: float = 3.0) -> Tensor:
    """Normal values, every element with a scale of its own that stays from step to step."""
    seed, index, step = key
    exponent = torch.rand(param.shape, generator=generator(seed, index)) * -decades
    noise = torch.randn(param.shape, generator=generator(seed, index, step))
    return (noise * 0.01 * 10.0**exponent).to(param.dtype)


def set_gradients(params: Sequence[Tensor], step: int, seed: int = 0) -> None:
    """Give every parameter its gradient of this step."""
    for index, param in enumerate(params):
        param.grad = gradient(param, seed, index, step)


def train(
    opt: torch.optim.Optimizer,
    params: Sequence[Tensor],
    steps: int,
    seed: int = 0,
    *,
    start: int = 0,
    after: Callable[[int], None] | None = None,
) -> None:
    """Take steps ``start`` .. ``start + steps - 1`` with seeded gradients; ``after(step)`` runs behind each."""
    for step in range(start, start + steps):
        set_gradients(params, step, seed)
        opt.step()
        opt.zero_grad()
        if after is not None:
            after(step)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of the elements in row-major order, so that NaN equals NaN and 0.0 differs from -0.0."""
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def assert_same_bits(a: object, b: object, where: str = "value") -> None:
    """Equal types, structure, dtypes, shapes and bits, through dictionaries, lists and tuples."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor), f"{where}: a tensor and a {type(b).__name__}"
        assert a.dtype == b.dtype, f"{where}: {a.dtype} and {b.dtype}"
        assert a.shape == b.shape, f"{where}: {tuple(a.shape)} and {tuple(b.shape)}"
        differ = int((bits(a) != bits(b)).sum())
        assert not differ, f"{where}: {differ} of {a.nbytes} bytes differ"
    elif isinstance(a, Mapping):
        assert isinstance(b, Mapping), f"{where}: a mapping and a {type(b).__name__}"
        assert list(a) == list(b), f"{where}: keys {list(a)} and {list(b)}"
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert isinstance(b, type(a)), f"{where}: a {type(a).__name__} and a {type(b).__name__}"
        assert len(a) == len(b), f"{where}: {len(a)} and {len(b)} entries"
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}[{index}]")
    else:
        assert type(a) is type(b), f"{where}: {a!r} and {b!r}"
        assert a == b, f"{where}: {a!r} and {b!r}"


def differ(a: object, b: object) -> bool:
    """Whether ``assert_same_bits`` fails."""
    try:
        assert_same_bits(a, b)
    except AssertionError:
        return True
    return False


def copied(value: Any) -> Any:
    """A deep copy of tensors, dictionaries and sequences: what something was, to compare with later."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(entry) for entry in value)
    return value


def everything(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of all parameters and of the saved state: what an error must leave as it was."""
    params = [param for group in opt.param_groups for param in group["params"]]
    return {"params": copied(params), **copied(opt.state_dict())}


def params_of(opt: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters of all groups, in order."""
    return [param for group in opt.param_groups for param in group["params"]]


def tensors_held(opt: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Every tensor in the optimizer's state."""
    for state in opt.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def need_other_gradients() -> None:
    """Skip the test where parameters take gradients of their own dtype only."""
    if not OTHER_GRADIENTS:
        pytest.skip("needs Tensor.grad_dtype, which torch 2.9 does not have")
