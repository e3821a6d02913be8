"""Growth of bytes and seconds with the number of parameters: fitted coefficients, and whether it is linear.

Two fits, both by least squares of relative errors (each row divided by its value), so that a size of ten thousand
counts as much as one of a hundred million: value = a + b * n, and value = a + b * n ** exponent with a >= 0, whose
exponent says what the growth is. The constant is what a step of few parameters costs; among large sizes alone, where
it is a small part and the fit could not tell it from the exponent, it is left out of the second fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import Cell, t_quantile

LEAST_EXPONENT, MOST_EXPONENT = 0.25, 4.0
GROWTH_HEADER = ["of", "sizes", "a parameter", "95%", "constant", "largest relative residual", "r squared"]
GROWTH_HEADER += ["exponent", "95%", "linear"]
GRID = 376  # exponents tried, 0.01 apart; then again between the best one's neighbours


def relative_fit(columns: Sequence[Any], values: Any) -> tuple[Any, float, Any]:
    """Coefficients of the columns, the sum of squared relative errors, and the inverse of the normal matrix."""
    design = np.stack([column / values for column in columns], axis=1)
    scale = np.linalg.norm(design, axis=0)
    found, *_ = np.linalg.lstsq(design / scale, np.ones(len(values)), rcond=None)
    errors = design / scale @ found - 1
    normal = design.T @ design / np.outer(scale, scale)
    return found / scale, float(errors @ errors), np.linalg.inv(normal) / np.outer(scale, scale)


def linear_fit(numels: Sequence[int], values: Sequence[float]) -> dict[str, Any]:
    """Fit value = constant + slope * n: coefficients with 95% intervals (Student's t), relative residuals, r squared.

    Raises:
        ValueError: fewer than three sizes.
    """
    n, y = arrays(numels, values)
    (constant, slope), squares, inverse = relative_fit([np.ones_like(n), n], y)
    half = t_quantile(0.975, len(n) - 2) * np.sqrt(np.diag(inverse) * squares / (len(n) - 2))
    residuals = (constant + slope * n) / y - 1
    weights = y**-2.0
    deviations = (weights * (y - np.average(y, weights=weights)) ** 2).sum()
    return {
        "constant": float(constant),
        "constant_interval": [float(constant - half[0]), float(constant + half[0])],
        "slope": float(slope),
        "slope_interval": [float(slope - half[1]), float(slope + half[1])],
        "residuals": [float(residual) for residual in residuals],
        "largest_residual": float(np.abs(residuals).max()),
        "r_squared": float(1 - squares / deviations),
    }


def power_fit(numels: Sequence[int], values: Sequence[float], with_constant: bool = True) -> dict[str, Any]:
    """Fit value = constant + factor * n ** exponent, constant >= 0; the exponent with its 95% profile interval.

    The interval has the exponents whose sum of squares is no larger than Student's t allows of the best one's; None
    where there are no more sizes than coefficients.
    """
    n, y = arrays(numels, values)
    shares = n / n.max()  # so that a power of it is no larger than one

    def squares_of(exponent: float) -> float:
        if with_constant:
            (constant, _), squares, _ = relative_fit([np.ones_like(n), shares**exponent], y)
            if constant >= 0:
                return squares
        return relative_fit([shares**exponent], y)[1]

    low, high = LEAST_EXPONENT, MOST_EXPONENT
    for _ in range(4):
        grid = np.linspace(low, high, GRID)
        found = [squares_of(exponent) for exponent in grid]
        best = int(np.argmin(found))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    exponent, least = float(grid[best]), found[best]
    interval = None
    if (freedom := len(n) - 2 - with_constant) > 0:
        most = least * (1 + t_quantile(0.975, freedom) ** 2 / freedom)
        within = [e for e in np.linspace(LEAST_EXPONENT, MOST_EXPONENT, GRID) if squares_of(e) <= most]
        interval = [float(min([exponent, *within])), float(max([exponent, *within]))]
    return {"exponent": exponent, "exponent_interval": interval}


def arrays(numels: Sequence[int], values: Sequence[float]) -> tuple[Any, Any]:
    if len(numels) != len(values) or len(set(numels)) < 3:
        raise ValueError(f"sizes are {list(numels)} with {len(values)} values; accepted: three sizes or more")
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"values are {list(values)}; accepted: finite positive ones")
    return np.array(numels, dtype=float), np.array(values, dtype=float)


def growth(
    numels: Sequence[int], values: Sequence[float], allowed: float, with_constant: bool = True
) -> dict[str, Any]:
    """Both fits, and whether the growth is linear: the exponent is within `allowed` of 1."""
    fitted: dict[str, Any] = {"numels": list(numels), "values": list(values)}
    fitted |= linear_fit(numels, values) | power_fit(numels, values, with_constant)
    return fitted | {"allowed": allowed, "linear": abs(fitted["exponent"] - 1) <= allowed}


def growth_row(label: str, sizes: str, fitted: dict[str, Any], scale: float = 1.0) -> list[Cell]:
    """A row under GROWTH_HEADER, constant and slope multiplied by `scale`."""
    exponent, interval = fitted["exponent"], fitted["exponent_interval"]
    between = "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
    low, high = (end * scale for end in fitted["slope_interval"])
    slope = [fitted["slope"] * scale, f"{low:.5g} to {high:.5g}", fitted["constant"] * scale]
    errors = [fitted["largest_residual"], f"{fitted['r_squared']:.6f}", f"{exponent:.4f}", between]
    return [label, sizes, *slope, *errors, "yes" if fitted["linear"] else "NO"]
