"""The native kernel gives the reference's bits: on every instruction set, over every kind of number, shape and setting,
however the work is cut, ordered and threaded.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_adam.kernels import checks, cpu
from lowmem_adam.kernels.fragment import CodedMoments, DynamicMoments, Fragment, FullMoments, StepScalars
from lowmem_adam.layout import FLAT
from tests import kernel_cases as cases
from tests.cases import DTYPES, generator
from tests.kernel_cases import (
    CHANGES,
    MEMORY,
    UPDATES,
    Case,
    Snapshot,
    all_halves,
    assert_same,
    differences,
    every_other,
    hostile,
    in_order,
    mixed_work,
    native,
    one_by_one,
    one_step,
    play,
    scalars,
    sliced,
    snapshot,
    together,
    whole,
)

if reason := cases.without_library():
    pytest.skip(reason, allow_module_level=True)

every_isa = pytest.mark.parametrize("isa", cases.isas())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_pair = pytest.mark.parametrize(
    "dtypes", cases.DTYPE_PAIRS, ids=lambda pair: "-".join(str(dtype).removeprefix("torch.") for dtype in pair)
)
every_update = pytest.mark.parametrize("update", UPDATES)
all_moments = pytest.mark.parametrize("moments", cases.MOMENTS)


@functools.lru_cache(maxsize=2)
def hostile_by_reference(name: str, dtypes: tuple[torch.dtype, torch.dtype], moments: str) -> list[Snapshot]:
    return play(hostile(CHANGES[name], dtypes, moments))


@every_isa
@all_moments
@every_pair
@pytest.mark.parametrize("name", CHANGES)
def test_hostile_numbers_in_every_setting(
    name: str, dtypes: tuple[torch.dtype, torch.dtype], moments: str, isa: str
) -> None:
    wanted = hostile_by_reference(name, dtypes, moments)
    assert_same(wanted, play(hostile(CHANGES[name], dtypes, moments), native(isa)), isa)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 6},
        {"betas": (0.9, 0.998)},
        {"betas": (0.9001, 0.999)},
        {"eps": 1e-7},
        {"lr": 0.0101},
        {"grad_scale": 0.9},
    ],
    ids=str,
)
@all_moments
@every_pair
def test_a_change_of_any_setting_shows(
    dtypes: tuple[torch.dtype, torch.dtype], moments: str, change: dict[str, Any]
) -> None:
    """The comparison itself: it is not blind."""
    said = differences(hostile_by_reference("AdamW", dtypes, moments), play(hostile(change, dtypes, moments), native()))
    rounds_by_seed = moments == "8bit" or dtypes[0] != torch.float32
    assert bool(said) == ("seed" not in change or rounds_by_seed)


# ---------------------------------------------------------------- every code, every metadata value, every 16-bit number


def assert_native_same(case: Case, isa: str) -> None:
    assert_same(play(case), play(case, native(isa)), isa)


@every_isa
@pytest.mark.parametrize("floor_and_span", [(120, 10), (1, 1), (167, 24), (0, 0), (110, 0), (0, 7)], ids=str)
def test_all_pairs_of_codes(floor_and_span: tuple[int, int], isa: str) -> None:
    ratio = torch.arange(-128, 128).to(torch.int8).repeat(256, 1)
    root = torch.arange(256).to(torch.uint8)[:, None].repeat(1, 256)
    # As they are, every block has roots of one code only; the other way round, of 128.
    for pair in ((ratio, root), (ratio.t().contiguous(), root.t().contiguous())):
        grids = (torch.full((512,), value, dtype=torch.uint8) for value in floor_and_span)
        moments = CodedMoments(pair[0], pair[1], *grids)
        for scale in (0.0, 1e-6, 1.0):
            grad = torch.randn(256, 256, generator=generator(1)) * scale
            assert_native_same(one_step(torch.ones(256, 256), grad, moments), isa)
            assert_native_same(one_step(torch.ones(256, 256), grad, moments, 8, decoupled=False, eps=0.0), isa)


@every_isa
@every_dtype
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_all_values_of_metadata(nonfinite: str, dtype: torch.dtype, isa: str) -> None:
    """All 65,536 pairs of floor and span, also those that no encoding gives: roots that wrap, infinite and NaN ones."""
    rows, drawn = 65536, generator(2)
    root = torch.tensor([0, 1, 2, 128, 255], dtype=torch.uint8).repeat(rows, 1)
    root[:, 3].random_(0, 256, generator=drawn)
    ratio = torch.randint(-128, 128, (rows, 5), generator=drawn).to(torch.int8)
    pairs = torch.arange(rows)
    moments = CodedMoments(ratio, root, (pairs >> 8).to(torch.uint8), (pairs & 255).to(torch.uint8))
    grad = torch.randn(rows, 5, generator=drawn).to(dtype)
    assert_native_same(one_step(torch.ones(rows, 5, dtype=dtype), grad, moments, nonfinite=nonfinite), isa)


@every_isa
@all_moments
@every_update
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_as_weight_and_as_gradient(
    dtype: torch.dtype, update: str, moments: str, isa: str
) -> None:
    normal = torch.randn(512, 128, generator=generator(3)).to(dtype)
    for weight, grad in ((all_halves(dtype), normal), (normal, all_halves(dtype))):
        for nonfinite in ("skip", "propagate"):
            layout = cases.layout_of(512, 128, moments)
            held = cases.random_moments(layout, moments, 4)
            case = one_step(weight, grad, held, layout=layout, **UPDATES[update], nonfinite=nonfinite)
            assert_native_same(case, isa)


@every_isa
@every_update
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_every_weight_between_two_of_16_bits(dtype: torch.dtype, update: str, isa: str) -> None:
    """Where two numbers of 16 bits meet: each, the middle to the next, one bit to both sides, and any.

    Of a zero weight and gradient with beta2 = 0, eps = 1 and a first moment m the step makes -m, exactly but for
    subnormal moments, which lose a bit where they are halved.
    """
    bits = all_halves(dtype).float().view(torch.int32).view(-1, 1)
    middle = 0x8000 if dtype == torch.bfloat16 else 0x1000
    drawn = torch.randint(0, 2 * middle, (65536, 4), generator=generator(5)).to(torch.int32)
    special = torch.tensor([[0, middle - 1, middle, middle + 1]], dtype=torch.int32).repeat(65536, 1)
    moment = (bits + torch.cat([special, drawn], dim=1)).view(torch.float32)
    weight = torch.zeros(moment.shape, dtype=dtype)
    changes: dict[str, Any] = {"lr": 1.0, "betas": (0.5, 0.0), "eps": 1.0, "weight_decay": 0.0}
    case = one_step(weight, weight, FullMoments(moment, torch.zeros_like(moment)), 1, **UPDATES[update], **changes)
    wanted = play(case)
    if update in ("nearest", "fp32"):
        exact = ~(moment.view(-1).abs() < 2.0**-125)
        assert not cases.different(wanted[0]["param"].view(-1), (0.0 - moment.view(-1)).to(dtype))[exact].any()
    assert_same(wanted, play(case, native(isa)), isa)


@every_isa
@every_update
@every_pair
def test_a_nan_stays_one_through_steps_with_finite_gradients(
    dtypes: tuple[torch.dtype, torch.dtype], update: str, isa: str
) -> None:
    """NaN of odd payloads, in fp32 moments from an earlier step: rounding must not carry them to something else."""
    nan = cases.rows_of(["NaN of odd payloads"], cases.GRADIENTS, 300, dtypes[1], 6)
    finite = torch.randn(1, 300, generator=generator(7))
    grads = [nan, *(finite.to(dtypes[1]) for _ in range(3))]
    changes = {**UPDATES[update], "nonfinite": "propagate"}
    steps = [(g, scalars(t + 1, **changes)) for t, g in enumerate(grads)]
    # Fresh weights before the second step would be a loaded checkpoint: the moments keep the NaN, the weights do not.
    weight = finite.to(dtypes[0])
    master = cases.zero_master(weight, changes)
    first = play(Case(whole(weight, nan, "32bit", master), steps[:1]))[0]
    assert first["exp_avg"][::3].isnan().all()
    start = whole(weight, finite, FullMoments(first["exp_avg"], first["exp_avg_sq"]), master)
    case = Case(start, steps[1:])
    got = play(case, native(isa))
    assert got[0]["param"][::3].isnan().all()
    assert_same(play(case), got, isa)


@every_isa
@every_dtype
@all_moments
def test_nothing_to_do_changes_nothing(moments: str, dtype: torch.dtype, isa: str) -> None:
    kinds = [kind for kind in cases.WEIGHTS if kind != "not finite"]
    weight = cases.rows_of(kinds, cases.WEIGHTS, 200, dtype, 8)
    l2 = {"decoupled": False, "weight_decay": 0.0}
    rows: tuple[dict[str, Any], ...] = (*UPDATES.values(), {"maximize": True}, {"eps": 0.0}, l2)
    for changes in rows:
        case = one_step(weight, torch.zeros_like(weight), moments, 1, lr=0.0, **changes)
        assert_same([snapshot(case.start)], play(case, native(isa)))


@pytest.mark.parametrize("name", [*CodedMoments._fields, *DynamicMoments._fields])
def test_one_bit_of_one_code_shows(name: str) -> None:
    """The comparison itself once more: a bit of the state before the step is seen after it."""
    weight = torch.randn(4, 300, generator=generator(9))
    kind = "8bit" if name in CodedMoments._fields else FLAT
    moments = cases.random_moments(cases.layout_of_shape(weight.shape, kind), kind, 10)
    case = one_step(weight, torch.zeros_like(weight), moments)
    spoiled = moments._replace(**{name: moments._asdict()[name].clone()})
    held = spoiled._asdict()[name].view(-1)
    held[3 if held.is_floating_point() else 5].view(
        torch.int32 if held.is_floating_point() else held.dtype
    ).bitwise_xor_(2)
    changed = case._replace(start=case.start._replace(moments=spoiled))
    assert not differences(play(case), play(case, native()))
    assert differences(play(case), play(changed, native()))


# ---------------------------------------------------------------- shapes, cuts, orders, threads


@every_isa
@all_moments
@every_pair
@every_update
def test_tails_of_every_length(update: str, dtypes: tuple[torch.dtype, torch.dtype], moments: str, isa: str) -> None:
    made = []
    for cols in (*range(1, 131), 255, 256, 257, 383, 400):
        param = torch.randn(2, cols, generator=generator(11, cols)).to(dtypes[0])
        grad = torch.randn(2, cols, generator=generator(12, cols)).to(dtypes[1])
        layout = cases.layout_of(2, cols, moments)
        held = cases.random_moments(layout, moments, 13, cols)
        made.append(one_step(param, grad, held, 3 + cols % 2, layout, **UPDATES[update]))
    wanted, got = one_by_one(made), together(made, isa)
    assert_same(wanted[0], got[0], isa)
    assert wanted[1] == got[1] == 0


def some_shape(drawn: random.Random, _: int) -> tuple[int, ...]:
    size = drawn.choice([1, 2, 5, 9, 100, 128, 129, 300])
    shapes = ((), (0,), (size,), (0, size), (size, 0), (1, 1), (3, size), (2, 2, size), (2, 3, 2, 2, size))
    return shapes[drawn.randrange(len(shapes))]


@every_isa
def test_300_parameters_of_all_kinds_in_one_call_and_any_order(isa: str) -> None:
    made = mixed_work(300, 14, some_shape)
    wanted, wanted_skipped = one_by_one(made)
    assert wanted_skipped > 5
    for shuffle in (None, 1, 2):
        order = list(range(len(made)))
        if shuffle is not None:
            random.Random(shuffle).shuffle(order)
        got, skipped = together([made[index] for index in order], isa)
        assert_same([wanted[index] for index in order], got, isa)
        assert skipped == wanted_skipped


@functools.cache
def threaded_work() -> tuple[list[Case], tuple[list[Snapshot], int]]:
    """Enough blocks for more than eight threads, none to 1,400 of them in a parameter, cut anyhow by the split."""
    made = mixed_work(40, 15, lambda drawn, index: ((1, 700, 3, 0, 41)[index % 5], (9, 5, 300, 130, 129)[index % 4]))
    return made, one_by_one(made)


@every_isa
@pytest.mark.parametrize("threads", range(1, 9))
def test_thread_counts(threads: int, isa: str) -> None:
    made, wanted = threaded_work()
    assert sum(case.start.end_block for case in made) >= 8 * 64 * 2
    got = together(made, isa, threads)
    assert_same(wanted[0], got[0], isa)
    assert wanted[1] == got[1] > 0


@every_isa
@all_moments
@every_dtype
@pytest.mark.parametrize("update", ["stochastic", *cases.MASTERS])
@pytest.mark.parametrize("shape", [(7, 300), (40, 9), (1, 2000)], ids=str)
def test_split_at_any_blocks(shape: tuple[int, int], update: str, dtype: torch.dtype, moments: str, isa: str) -> None:
    layout = cases.layout_of_shape(shape, moments)
    param = torch.randn(shape, generator=generator(16)).to(dtype)
    steps = []
    for step in (1, 2, 3):
        grad = torch.randn(shape, generator=generator(17, step)).to(dtype)
        grad.view(-1)[layout.block_start(layout.n_blocks // 2)] = torch.nan
        steps.append((grad, scalars(step, **UPDATES[update])))
    case = Case(whole(param, steps[0][0], moments, cases.random_master(param, UPDATES[update], 28)), steps)
    drawn = random.Random(18)

    def in_pieces(fragment: Fragment, record: StepScalars) -> int:
        inner = sorted(drawn.sample(range(1, layout.n_blocks), drawn.randrange(layout.n_blocks)))
        pieces = [cases.cut(fragment, low, high) for low, high in itertools.pairwise([0, *inner, layout.n_blocks])]
        drawn.shuffle(pieces)
        return cpu.adam_step_([(piece, record) for piece in pieces], isa=isa, num_threads=1)

    wanted = play(case)
    assert int(wanted[0]["skipped"]) == 1
    for _ in range(4):
        assert_same(wanted, play(case, in_pieces), isa)


@every_isa
@all_moments
@pytest.mark.parametrize("step", [1, 2**31 - 1, 2**32 - 1, 2**32 + 5])
@pytest.mark.parametrize("seed", [0, 2**32 + 1, 2**63 - 1])
def test_large_seeds_steps_and_block_ordinals(seed: int, step: int, moments: str, isa: str) -> None:
    for cols, first in ((300, 2**31 - 3), (300, 2**31 + 4), (5, 2**32 - 2), (200, 2**40 + 1), (2**34 + 5, 2**33 + 7)):
        layout, end = cases.layout_of(2**42 // -(-cols // 128), cols, moments), first + 4
        numel = layout.block_start(end) - layout.block_start(first)
        param = torch.randn(numel, generator=generator(19)).to(torch.bfloat16)
        grads = [torch.randn(numel, generator=generator(20, t)).to(torch.bfloat16) for t in range(3)]
        start = Fragment(param, grads[0], cases.zero_moments(layout, first, end, moments), layout, first, end)
        case = Case(start, [(grad, scalars(step + t, seed=seed)) for t, grad in enumerate(grads)])
        assert_native_same(case, isa)


def test_nothing_at_all() -> None:
    assert cpu.adam_step_([]) == 0


# ---------------------------------------------------------------- memory


@every_isa
@all_moments
@every_pair
@pytest.mark.parametrize("update", ["stochastic", *cases.MASTERS])
@pytest.mark.parametrize("name", MEMORY)
def test_any_memory_layout(
    name: str, update: str, dtypes: tuple[torch.dtype, torch.dtype], moments: str, isa: str
) -> None:
    """Of the parameter, of the gradient, and of both, at first; the state's is the parameter's order in each case."""
    shape, lay_out, dims = MEMORY[name]
    param = torch.randn(shape, generator=generator(21)).to(dtypes[0])
    assert torch.equal(lay_out(param), param)
    assert lay_out(param).is_contiguous() == (dims == 0)
    assert dims == 0 or len(checks.merged_dimensions(lay_out(param))) == dims
    grads = [torch.randn(shape, generator=generator(22, step)).to(dtypes[1]) for step in range(2)]
    for weight, laid in (
        (lay_out(param), [lay_out(g) for g in grads]),
        (lay_out(param), grads),
        (param, [*map(lay_out, grads)]),
    ):
        steps = [(grad, scalars(t + 1, **UPDATES[update])) for t, grad in enumerate(laid)]
        assert_native_same(
            Case(whole(weight, laid[0], moments, cases.random_master(param, UPDATES[update], 29)), steps), isa
        )


@every_isa
def test_gradients_that_share_memory_or_are_views_of_complex_ones(isa: str) -> None:
    param = torch.randn(40, 150, generator=generator(23))
    spread = torch.randn(1, 150, generator=generator(24)).expand(40, 150)
    conjugate = torch.randn(40, 150, generator=generator(25), dtype=torch.complex64).conj()
    assert conjugate.imag.is_neg()  # torch keeps the sign beside the memory
    for grad in (
        spread,
        spread.t().contiguous().t(),
        conjugate.real,
        conjugate.imag,
        torch.randn(150, 1).expand(150, 40).t(),
    ):
        assert_native_same(one_step(param, grad, "8bit"), isa)


@every_isa
def test_what_is_cached_of_a_parameter_does_not_hold_a_gradient(isa: str) -> None:
    """One dictionary over the steps, as the optimizer does it, with gradients that lie otherwise each time."""
    param = torch.randn(6, 5, 40, generator=generator(26))
    ways: list[Callable[[Tensor], Tensor]] = [torch.clone, sliced, every_other, in_order(2, 0, 1), torch.clone]
    grads = [way(torch.randn(param.shape, generator=generator(27, t))) for t, way in enumerate(ways)]
    for weight in (param, every_other(param)):
        case = Case(whole(weight, grads[0]), [(grad, scalars(t + 1)) for t, grad in enumerate(grads)])
        cached = case._replace(start=case.start._replace(cache={}))
        assert_same(play(case), play(cached, native(isa)), isa)


# ---------------------------------------------------------------- the processor's modes


@every_isa
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        *({}, {"nonfinite": "propagate"}, {"eps": 1e-40}, {"lr": 1e-42}, {"decoupled": False, "weight_decay": 1e-40}),
        *map(UPDATES.__getitem__, cases.MASTERS),
    ],
    ids=str,
)
def test_flushing_of_denormals_changes_nothing(changes: dict[str, Any], threads: int, isa: str) -> None:
    """Torch sets it for the calling thread only: results would depend on the thread that has a block."""
    made = [hostile(changes, pair, moments) for pair in cases.DTYPE_PAIRS[::2] for moments in ("8bit", "32bit")]
    wanted = [play(case) for case in made]
    tiny = torch.full((8,), 1e-40)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        got = [play(case, native(isa, threads)) for case in made]
        still_flushes = not (tiny * 1.0).any()
        by_reference = [play(case) for case in made]
    finally:
        torch.set_flush_denormal(False)
    assert still_flushes  # the kernel puts back what it found
    assert any(differences(a, b) for a, b in zip(wanted, by_reference, strict=True))  # there was something to flush
    for a, b in zip(wanted, got, strict=True):
        assert_same(a, b, isa)
