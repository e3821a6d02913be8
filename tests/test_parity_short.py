"""The parity benchmark in short: same criterion, same control, two epochs of digits or 30 steps of words a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import pytest
import torch

from benchmarks.peer_formats import Linear

for package in ("sklearn", "cv2", "scipy", "typer", "rich"):
    pytest.importorskip(package, reason="the parity benchmark needs it")

# Only now: these modules import the packages above.
from benchmarks.bench_parity import BASELINE, CONTROL, OPTIMIZERS, OURS, judge  # noqa: E402
from benchmarks.parity_tasks import Task, images, train, word_language_model  # noqa: E402


@pytest.fixture(scope="module")
def digits() -> Task:
    return images("digits", epochs=2)


@pytest.fixture(scope="module")
def words() -> Task:
    """A language model most of whose embedding rows get a gradient rarely; the loss of 8,192 equal chances is 9.0."""
    steps, task = 30, word_language_model(quick=True)
    return replace(task, steps=steps, batches=lambda seed: islice(task.batches(seed), steps))


def finals(task: Task, optimizer: str, seeds: Sequence[int]) -> list[float]:
    return [train(task, seed, OPTIMIZERS[optimizer], evaluations=1).final for seed in seeds]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seeds", "learned"), [("digits", (0, 1, 2), 1.0), ("words", (0, 1), 7.0)])
def test_eight_bit_moments_end_where_float32_does_and_the_control_does_not(
    name: str, seeds: Sequence[int], learned: float, request: pytest.FixtureRequest
) -> None:
    task: Task = request.getfixturevalue(name)
    baseline = finals(task, BASELINE, seeds)
    assert max(baseline) < learned, "float32 AdamW did not learn: the comparison would say nothing"
    ours = judge(baseline, finals(task, OURS, seeds))
    assert ours["parity"], ours
    control = judge(baseline, finals(task, CONTROL, seeds))
    assert not control["parity"], control


def test_pairs_differ_in_nothing_but_the_optimizer(digits: Task) -> None:
    """A seed repeats itself to the bit, and another seed is another run."""
    first = train(digits, 0, OPTIMIZERS[BASELINE]).final
    assert train(digits, 0, OPTIMIZERS[BASELINE]).final == first
    assert train(digits, 1, OPTIMIZERS[BASELINE]).final != first


@pytest.mark.parametrize(
    ("other", "parity"),
    [
        ([1.0, 1.2, 1.4], True),
        ([1.1, 1.3, 1.5], True),
        ([0.9, 1.1, 1.3], True),
        ([1.3, 1.5, 1.7], False),
        ([0.7, 0.9, 1.1], False),
        ([1.0, 1.2, math.inf], False),
    ],
)
def test_judge_compares_the_mean_difference_with_the_spread_between_seeds(other: list[float], parity: bool) -> None:
    verdict = judge([1.0, 1.2, 1.4], other)
    assert verdict["seed_spread"] == pytest.approx(0.2)
    assert verdict["parity"] is parity


def test_interval_of_the_paired_differences() -> None:
    """Differences 0.01, 0.03, 0.05: mean 0.03, deviation 0.02, and t of two degrees of freedom is 4.303."""
    verdict = judge([1.0, 1.2, 1.4], [1.01, 1.23, 1.45])
    half = 4.3027 * 0.02 / math.sqrt(3)
    assert verdict["mean_difference"] == pytest.approx(0.03)
    assert verdict["interval"] == pytest.approx([0.03 - half, 0.03 + half], rel=1e-4)
    assert verdict["interval_within_spread"] is True
    wide = judge([1.0, 1.2, 1.4], [1.1, 1.2, 1.7])  # mean 0.13 with a deviation of 0.15
    assert (wide["parity"], wide["interval_within_spread"]) == (True, False)
    assert judge([1.0, 1.2], [1.0, math.inf])["interval"] is None


def test_the_control_loses_second_moments_that_the_format_must_keep() -> None:
    """What makes the control fail: an element with a gradient a thirtieth of its neighbour's decodes to v = 0."""
    m, v = torch.ones(256), torch.ones(256)
    m[0], v[0] = 1 / 30, 1 / 900
    m_coded, v_coded = Linear().decode(Linear().encode(m, v, 1))
    assert m_coded[0] > 0
    assert v_coded[0] == 0
