"""Fits of growth on made-up figures: known coefficients are found, other growth than a linear one is told."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

for package in ("numpy", "scipy", "rich"):
    pytest.importorskip(package, reason="the fits need it")

from benchmarks.growth import growth, growth_row, linear_fit, power_fit  # noqa: E402
from benchmarks.harness import t_quantile  # noqa: E402

SIZES = (10**4, 10**5, 1 << 18, 10**6, 10**7, 1 << 25, 10**8, 250 * 10**6)
LARGE = SIZES[4:]


def noisy(function: Callable[[int], float], sizes: tuple[int, ...] = SIZES, spread: float = 0.02) -> list[float]:
    draw = random.Random(0)
    return [function(n) * (1 + draw.gauss(0, spread)) for n in sizes]


def test_student_quantiles_are_those_of_tables() -> None:
    for freedom, wanted in ((1, 12.706), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert t_quantile(0.975, freedom) == pytest.approx(wanted, abs=1e-3)


def test_known_coefficients_are_found() -> None:
    found = growth(SIZES, [1e-4 + 6e-10 * n for n in SIZES], 0.1)
    assert found["constant"] == pytest.approx(1e-4, rel=1e-6)
    assert found["slope"] == pytest.approx(6e-10, rel=1e-6)
    assert found["exponent"] == pytest.approx(1, abs=1e-4)
    assert found["largest_residual"] < 1e-6
    assert found["r_squared"] == pytest.approx(1, abs=1e-9)
    assert found["linear"]


def test_intervals_hold_the_truth_of_noisy_figures_and_are_not_wide() -> None:
    """Noise of 2% over eight sizes: the intervals hold what was put in for these draws, and say a few percent."""
    found = growth(SIZES, noisy(lambda n: 1e-4 + 6e-10 * n), 0.1)
    for name, truth in (("constant", 1e-4), ("slope", 6e-10)):
        low, high = found[f"{name}_interval"]
        assert low < truth < high
        assert high - low < 0.15 * truth
    low, high = found["exponent_interval"]
    assert low <= 1.005
    assert high >= 0.995
    assert high - low < 0.1
    assert found["linear"]


@pytest.mark.parametrize(
    ("name", "function", "exponent", "linear"),
    [
        ("quadratic", lambda n: 1e-4 + 1e-15 * n**2, 2.0, False),
        ("three halves", lambda n: 1e-9 * n**1.5, 1.5, False),
        ("root", lambda n: 1e-4 * n**0.5, 0.5, False),
        ("eleven tenths", lambda n: 1e-4 + 1e-10 * n**1.12, 1.12, False),
        ("linear", lambda n: 7e-10 * n, 1.0, True),
    ],
)
@pytest.mark.parametrize("spread", [0.0, 0.01])
def test_other_growth_is_told(
    name: str, function: Callable[[int], float], exponent: float, linear: bool, spread: float
) -> None:
    found = growth(SIZES, noisy(function, spread=spread), 0.1)
    assert found["exponent"] == pytest.approx(exponent, abs=0.02 if spread else 1e-3)
    assert found["linear"] is linear
    assert growth_row(name, "all", found)[-1] == ("yes" if linear else "NO")


def test_large_sizes_have_an_exponent_without_a_constant() -> None:
    """Four sizes are enough for it; with a constant there would be one size more than coefficients."""
    found = growth(LARGE, noisy(lambda n: 6e-10 * n, LARGE), 0.1, with_constant=False)
    low, high = found["exponent_interval"]
    assert low <= 1.005
    assert high >= 0.995
    assert high - low < 0.15
    assert found["linear"]
    assert not growth(LARGE, [1e-15 * n**2 for n in LARGE], 0.1, with_constant=False)["linear"]


def test_small_sizes_count_as_much_as_large_ones() -> None:
    """A tenth too much at a million parameters shows, though it is nothing beside the largest value."""
    exact = [8.0 * n for n in SIZES]
    assert linear_fit(SIZES, exact)["largest_residual"] < 1e-9
    assert linear_fit(SIZES, [*exact[:3], exact[3] * 1.1, *exact[4:]])["largest_residual"] > 0.05


@pytest.mark.parametrize(
    ("numels", "values", "told"),
    [
        ([1, 2], [1.0, 2.0], "sizes are"),
        ([1, 2, 2], [1.0, 2.0, 2.0], "sizes are"),
        ([1, 2, 3], [1.0, 2.0], "sizes are"),
        ([1, 2, 3], [1.0, 0.0, 2.0], "values are"),
        ([1, 2, 3], [1.0, math.inf, 2.0], "values are"),
    ],
)
def test_what_cannot_be_fitted(numels: list[int], values: list[float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        growth(numels, values, 0.1)


def test_three_sizes_have_no_interval() -> None:
    assert power_fit(SIZES[:3], [8.0 * n for n in SIZES[:3]])["exponent_interval"] is None
    assert growth_row("three", "all", growth(SIZES[:3], [8.0 * n for n in SIZES[:3]], 0.1))[-2] == "-"
