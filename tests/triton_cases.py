"""The Triton kernels give the reference's bits: cases for a process whose device runs them.

``tests/test_gpu.py`` runs them on a CUDA device, ``tests/test_gpu_interpreted.py`` in Triton's interpreter, on the CPU
and so on fewer numbers: a program takes some 20 ms there.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_adam.kernels import reference, triton
from lowmem_adam.kernels.fragment import CodedMoments, Fragment, FullMoments, StepScalars, Work
from lowmem_adam.kernels.tables import Plan
from lowmem_adam.layout import Layout
from tests import kernel_cases as cases
from tests.cases import DTYPES, generator
from tests.kernel_cases import (
    CHANGES,
    DTYPE_PAIRS,
    MEMORY,
    UPDATES,
    Case,
    all_halves,
    assert_same,
    differences,
    every_other,
    hostile,
    in_order,
    mixed_work,
    one_by_one,
    one_step,
    play,
    scalars,
    sliced,
    snapshot,
    twin,
    whole,
)

INTERPRETED = triton.interpreted()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
HALVES = (torch.bfloat16, torch.float16)
BOTH = ("8bit", "32bit")


def few(rows: Sequence[Any], count: int) -> list[Any]:
    """All of them on a GPU; interpreted, about so many, spread evenly."""
    return list(rows)[:: max(1, len(rows) // count)] if INTERPRETED else list(rows)


# ---------------------------------------------------------------- fragments on the device


def placed(tensor: Tensor) -> Tensor:
    """The tensor on the device, in memory of the same strides and as far from a multiple of 16 bytes."""
    if INTERPRETED:
        return tensor
    if tensor.is_neg():
        return tensor.to(DEVICE)
    held = cases.memory(tensor)
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    base = torch.empty(held.numel() + offset, dtype=tensor.dtype, device=DEVICE)
    base[offset:].copy_(held)
    return base.as_strided(tensor.shape, tensor.stride(), offset)


def on_device(fragment: Fragment) -> Fragment:
    held = {name: placed(tensor) for name, tensor in cases.state_by_name(fragment).items()}
    moved = fragment._replace(param=placed(fragment.param), grad=placed(fragment.grad))
    return cases.with_state(moved, held)


def take_back(fragment: Fragment, moved: Fragment) -> None:
    """Copy what a step has changed to where the fragment lies; also what it should not have changed."""
    if not INTERPRETED:
        cases.memory(fragment.param).copy_(cases.memory(moved.param))
        for name, tensor in cases.state_by_name(fragment).items():
            tensor.copy_(cases.state_by_name(moved)[name])


def step_all(work: Sequence[Work]) -> Tensor:
    moved = [(on_device(fragment), record) for fragment, record in work]
    skipped = triton.adam_step_(moved)
    for (fragment, _), (there, _) in zip(work, moved, strict=True):
        take_back(fragment, there)
    return skipped.cpu()


def step(fragment: Fragment, record: StepScalars) -> Tensor:
    return step_all([(fragment, record)])


def assert_triton_same(case: Case) -> None:
    assert_same(play(case), play(case, step))


# ---------------------------------------------------------------- numbers

# Rows that lie in three ways: blocks of 128 elements, multiples of 16, anything. Pairs and moments take turns.
NUMBERS = list(itertools.product(CHANGES, DTYPE_PAIRS, BOTH))
SOME_NUMBERS = [
    (name, DTYPE_PAIRS[index % 5], BOTH[index // 5 % 2]) for index, name in enumerate([*CHANGES, *list(CHANGES)[::3]])
]


@pytest.mark.parametrize(("name", "dtypes", "moments"), SOME_NUMBERS if INTERPRETED else NUMBERS)
def test_hostile_numbers_in_every_setting(name: str, dtypes: tuple[torch.dtype, torch.dtype], moments: str) -> None:
    index = NUMBERS.index((name, dtypes, moments))
    cols = (128, 144, 150)[index % 3]
    assert_triton_same(hostile(CHANGES[name], dtypes, moments, cols, 5 if INTERPRETED else 1))


@pytest.mark.parametrize("floor_and_span", few([(120, 10), (1, 1), (167, 24), (0, 0), (110, 0), (0, 7)], 3), ids=str)
def test_all_pairs_of_codes(floor_and_span: tuple[int, int]) -> None:
    ratio = torch.arange(-128, 128).to(torch.int8).repeat(256, 1)
    root = torch.arange(256).to(torch.uint8)[:, None].repeat(1, 256)
    for pair in few([(ratio, root), (ratio.t().contiguous(), root.t().contiguous())], 1):
        grids = (torch.full((512,), value, dtype=torch.uint8) for value in floor_and_span)
        moments = CodedMoments(pair[0], pair[1], *grids)
        for scale in few([1e-6, 0.0, 1.0], 1):
            grad = torch.randn(256, 256, generator=generator(1)) * scale
            assert_triton_same(one_step(torch.ones(256, 256), grad, moments))
            assert_triton_same(one_step(torch.ones(256, 256), grad, moments, 8, decoupled=False, eps=0.0))


@pytest.mark.parametrize("dtype", few(DTYPES, 1))
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_values_of_metadata(nonfinite: str, dtype: torch.dtype) -> None:
    """All pairs of floor and span, also those that no encoding gives: roots that wrap, infinite and NaN ones."""
    pairs, drawn = torch.arange(0, 65536, 97 if INTERPRETED else 1), generator(2)
    rows = len(pairs)
    root = torch.tensor([0, 1, 2, 128, 255, 7, 8, 9] * 2, dtype=torch.uint8).repeat(rows, 1)
    root[:, 3].random_(0, 256, generator=drawn)
    ratio = torch.randint(-128, 128, (rows, 16), generator=drawn).to(torch.int8)
    moments = CodedMoments(ratio, root, (pairs >> 8).to(torch.uint8), (pairs & 255).to(torch.uint8))
    grad = torch.randn(rows, 16, generator=drawn).to(dtype)
    assert_triton_same(one_step(torch.ones(rows, 16, dtype=dtype), grad, moments, nonfinite=nonfinite))


@pytest.mark.parametrize("moments", few(BOTH, 1))
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_of_16_bits_as_weight_and_as_gradient(dtype: torch.dtype, update: str, moments: str) -> None:
    normal = torch.randn(512, 128, generator=generator(3)).to(dtype)
    halves = all_halves(dtype)
    for weight, grad, nonfinite in (
        (halves, normal, "skip"),
        (normal, halves, "propagate"),
        *few([(halves, normal, "propagate"), (normal, halves, "skip")], 1)[1 if INTERPRETED else 0 :],
    ):
        held = cases.random_moments(Layout(512, 128), moments, 4)
        assert_triton_same(one_step(weight, grad, held, **UPDATES[update], nonfinite=nonfinite))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_of_weights_between_two_of_16_bits(dtype: torch.dtype, update: str) -> None:
    """Where two numbers of 16 bits meet: each, the middle to the next, one bit to both sides, and any.

    As in test_cpu_kernel.py: such a step makes -m of a zero weight and a first moment m.
    """
    bits = all_halves(dtype).float().view(torch.int32).view(-1, 1)[:: 11 if INTERPRETED else 1]
    middle = 0x8000 if dtype == torch.bfloat16 else 0x1000
    drawn = torch.randint(0, 2 * middle, (len(bits), 4), generator=generator(5)).to(torch.int32)
    special = torch.tensor([[0, middle - 1, middle, middle + 1]], dtype=torch.int32).repeat(len(bits), 1)
    moment = (bits + torch.cat([special, drawn], dim=1)).view(torch.float32)
    moment = moment.reshape(-1)[: moment.numel() // 128 * 128].view(-1, 128)
    weight = torch.zeros(moment.shape, dtype=dtype)
    changes: dict[str, Any] = {"lr": 1.0, "betas": (0.5, 0.0), "eps": 1.0, "weight_decay": 0.0}
    held = FullMoments(moment, torch.zeros_like(moment))
    assert_triton_same(one_step(weight, weight, held, 1, **UPDATES[update], **changes))


@pytest.mark.parametrize("name", ["exp_avg_code", "exp_avg_sq_code", "block_floor", "block_span"])
def test_one_bit_of_one_code_shows(name: str) -> None:
    """The comparison itself: a bit of the state before the step is seen after it."""
    weight = torch.randn(4, 300, generator=generator(9))
    moments = cases.random_moments(Layout.of(weight.shape), "8bit", 10)
    case = one_step(weight, torch.zeros_like(weight), moments)
    spoiled = moments._replace(**{name: moments._asdict()[name].clone()})
    spoiled._asdict()[name].view(-1)[5].bitwise_xor_(2)
    changed = case._replace(start=case.start._replace(moments=spoiled))
    assert not differences(play(case), play(case, step))
    assert differences(play(case), play(changed, step))


# ---------------------------------------------------------------- shapes, cuts, orders


def together(made: Sequence[Case]) -> tuple[list[dict[str, Tensor]], int]:
    """All cases' first steps in one call."""
    work = [(twin(case.start)._replace(grad=case.steps[0][0]), case.steps[0][1]) for case in made]
    skipped = step_all(work)
    return [snapshot(fragment) for fragment, _ in work], int(skipped)


TAILS = list(itertools.product(UPDATES, DTYPE_PAIRS, BOTH))


@pytest.mark.parametrize(("update", "dtypes", "moments"), few(TAILS, 4))
def test_tails_of_every_length(update: str, dtypes: tuple[torch.dtype, torch.dtype], moments: str) -> None:
    made = []
    for cols in few([*range(1, 131), 255, 256, 257, 383, 400], 45):
        param = torch.randn(2, cols, generator=generator(11, cols)).to(dtypes[0])
        grad = torch.randn(2, cols, generator=generator(12, cols)).to(dtypes[1])
        held = cases.random_moments(Layout(2, cols), moments, 13, cols)
        made.append(one_step(param, grad, held, 3 + cols % 2, **UPDATES[update]))
    wanted, got = one_by_one(made), together(made)
    assert_same(wanted[0], got[0])
    assert wanted[1] == got[1] == 0


@pytest.mark.parametrize("numel", [1, 127, 128, 129, 2048, 2049, 5000])
@pytest.mark.parametrize("moments", BOTH)
def test_one_row_of_any_length(numel: int, moments: str) -> None:
    """All blocks but the last are whole, whatever the length."""
    param, grad = (torch.randn(numel, generator=generator(31, part)) for part in range(2))
    assert_triton_same(one_step(param, grad, cases.random_moments(Layout(1, numel), moments, 32)))


def some_shape(drawn: random.Random, _: int) -> tuple[int, ...]:
    size = drawn.choice([1, 2, 5, 9, 100, 128, 129, 300])
    shapes = ((), (0,), (size,), (0, size), (size, 0), (1, 1), (3, size), (2, 2, size), (2, 3, 2, 2, size))
    return shapes[drawn.randrange(len(shapes))]


def test_many_parameters_of_all_kinds_in_one_call_and_any_order() -> None:
    made = mixed_work(120 if INTERPRETED else 60, 14, some_shape)
    wanted, wanted_skipped = one_by_one(made)
    assert wanted_skipped > 1
    for shuffle in (None, 1):
        order = list(range(len(made)))
        if shuffle is not None:
            random.Random(shuffle).shuffle(order)
        got, skipped = together([made[index] for index in order])
        assert_same([wanted[index] for index in order], got)
        assert skipped == wanted_skipped


@pytest.mark.parametrize("dtype", few(DTYPES, 2))
@pytest.mark.parametrize("update", few(["stochastic", *cases.MASTERS], 2))
@pytest.mark.parametrize("shape", [(7, 300), (40, 9), (1, 2000), (8, 256)], ids=str)
def test_split_at_any_blocks(shape: tuple[int, int], update: str, dtype: torch.dtype) -> None:
    layout = Layout.of(shape)
    param = torch.randn(shape, generator=generator(16)).to(dtype)
    steps = []
    for number in (1, 2):
        grad = torch.randn(shape, generator=generator(17, number)).to(dtype)
        grad.view(-1)[layout.block_start(layout.n_blocks // 2)] = torch.nan
        steps.append((grad, scalars(number, **UPDATES[update])))
    drawn = random.Random(18)

    def in_pieces(fragment: Fragment, record: StepScalars) -> Tensor:
        inner = sorted(drawn.sample(range(1, layout.n_blocks), drawn.randrange(1, min(8, layout.n_blocks))))
        pieces = [cases.cut(fragment, low, high) for low, high in itertools.pairwise([0, *inner, layout.n_blocks])]
        drawn.shuffle(pieces)
        return step_all([(piece, record) for piece in pieces])

    for moments in BOTH:
        case = Case(whole(param, steps[0][0], moments, cases.random_master(param, UPDATES[update], 28)), steps)
        wanted = play(case)
        assert int(wanted[0]["skipped"]) == 1
        assert_same(wanted, play(case, in_pieces))


@pytest.mark.parametrize("number", [1, 2**31 - 1, 2**32 - 1, 2**32 + 5])
@pytest.mark.parametrize("seed", [0, 2**32 + 1, 2**63 - 1])
def test_large_seeds_steps_and_block_ordinals(seed: int, number: int) -> None:
    places = [(300, 2**31 - 3), (256, 2**31 + 4), (5, 2**32 - 2), (208, 2**40 + 1), (2**34 + 5, 2**33 + 7)]
    for cols, first in few(places, 3):
        layout, end = Layout(2**42 // -(-cols // 128), cols), first + 4
        numel = layout.block_start(end) - layout.block_start(first)
        param, grad = (torch.randn(numel, generator=generator(19, t)).to(torch.bfloat16) for t in range(2))
        start = Fragment(param, grad, cases.zero_moments(layout, first, end, "8bit"), layout, first, end)
        assert_triton_same(Case(start, [(grad, scalars(number, seed=seed))]))


def test_nothing_at_all() -> None:
    assert int(triton.adam_step_([])) == 0


# ---------------------------------------------------------------- memory

Way = Callable[[Tensor], Tensor]

LAYOUTS = list(itertools.product(MEMORY, ["stochastic", *cases.MASTERS], DTYPE_PAIRS, BOTH))


@pytest.mark.parametrize(
    ("name", "update", "dtypes", "moments"),
    [row for index, row in enumerate(LAYOUTS) if index % 160 // 10 == index // 160] if INTERPRETED else LAYOUTS[::3],
)
def test_any_memory_layout(name: str, update: str, dtypes: tuple[torch.dtype, torch.dtype], moments: str) -> None:
    """Of the parameter, of the gradient, and of both."""
    shape, lay_out, _ = MEMORY[name]
    param = torch.randn(shape, generator=generator(21)).to(dtypes[0])
    grad = torch.randn(shape, generator=generator(22)).to(dtypes[1])
    for weight, laid in ((lay_out(param), lay_out(grad)), (lay_out(param), grad), (param, lay_out(grad))):
        master = cases.random_master(param, UPDATES[update], 29)
        steps = [(laid, scalars(1, **UPDATES[update]))]
        assert_triton_same(Case(whole(weight, laid, moments, master), steps))


def test_gradients_that_share_memory_or_are_views_of_complex_ones() -> None:
    param = torch.randn(40, 150, generator=generator(23))
    spread = torch.randn(1, 150, generator=generator(24)).expand(40, 150)
    conjugate = torch.randn(40, 150, generator=generator(25), dtype=torch.complex64).conj()
    for grad in (spread, spread.t().contiguous().t(), conjugate.real, conjugate.imag):
        assert_triton_same(one_step(param, grad, "8bit"))


def test_tables_are_made_anew_where_gradients_lie_otherwise() -> None:
    """One dictionary over the steps, as the optimizer does it."""
    to_bfloat16: Way = torch.Tensor.bfloat16
    ways: list[Way] = [torch.clone, sliced, every_other, in_order(2, 0, 1), torch.clone, to_bfloat16, torch.clone]
    both: tuple[Way, ...] = (torch.clone, every_other)
    for lay_out in both:
        weight = lay_out(torch.randn(6, 5, 40, generator=generator(26)).bfloat16())
        start = whole(weight, weight)
        moved, now = on_device(twin(start)), twin(start)
        moved = moved._replace(cache={})
        plans: list[object] = []
        for number, way in enumerate(ways):
            grad = way(torch.randn(weight.shape, generator=generator(27, number)))
            record = scalars(number + 1, decoupled=number != 5)
            reference.adam_step_(now._replace(grad=grad), record)
            triton.adam_step_([(moved._replace(grad=placed(grad)), record)])
            there = twin(start)
            take_back(there, moved)
            assert_same([snapshot(now)], [snapshot(there if not INTERPRETED else moved)])
            assert moved.cache is not None
            plans.append(moved.cache["triton"][0])
        assert all(before is not after for before, after in itertools.pairwise(plans))


def test_tables_are_kept_where_nothing_has_changed_but_values() -> None:
    param = torch.randn(6, 256, generator=generator(33))
    moved = on_device(whole(param, param))._replace(cache={})
    plans = []
    for number in (1, 2, 3):
        triton.adam_step_([(moved._replace(grad=placed(param * number)), scalars(number, lr=0.1 / number))])
        assert moved.cache is not None
        plans.append(moved.cache["triton"][0])
    assert plans[0] is plans[1] is plans[2]


# ---------------------------------------------------------------- launches, refusals


def launches(made: Sequence[Case]) -> int:
    moved = [(on_device(case.start)._replace(grad=placed(case.steps[0][0])), case.steps[0][1]) for case in made]
    return len(Plan(moved, moved[0][0].param.device).launches)


def test_a_handful_of_launches_for_a_model_of_300_tensors() -> None:
    """Matrices, biases, an embedding whose rows end in a shorter block, and a flat partition."""
    shapes = [(64, 256), (256,), (50, 48), (70001,)] * 75
    made = []
    for shape in shapes:
        param = torch.zeros(shape)
        moments = "8bit" if param.numel() > 2000 else "32bit"
        made.append(one_step(param, param, moments, 1))
    assert launches(made) == 4
    assert launches(made[::4]) == 1


def test_refusals() -> None:
    param = torch.randn(4, 300)
    good = on_device(whole(param, param))
    before = snapshot(good)
    for grad, message in (
        (good.grad.half(), "gradient of dtype torch.float16"),
        (good.grad[:2], "has 600 elements"),
        (good.grad.to("meta"), "on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            triton.adam_step_([(good._replace(grad=grad), scalars(1))])
    wrong = good.moments._replace(exp_avg_code=good.moments[0].to(torch.int16))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"exp_avg_code of dtype torch\.int16"):
        triton.adam_step_([(good._replace(moments=wrong), scalars(1))])
    assert_same([before], [snapshot(good)])
