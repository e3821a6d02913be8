"""What a kernel is given: a fragment of a parameter with its moments, and one record of hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

from torch import Tensor

from lowmem_adam.codec import exceeds
from lowmem_adam.layout import Layout


class CodedMoments(NamedTuple):
    """8-bit moments of a fragment, contiguous: codes in the parameter's order, metadata one entry a block.

    ``exp_avg_code`` int8 and ``exp_avg_sq_code`` uint8 have as many elements as the fragment; ``block_floor`` and
    ``block_span``, uint8, as many as it has blocks. Shapes are free, only the flat order counts.
    """

    exp_avg_code: Tensor
    exp_avg_sq_code: Tensor
    block_floor: Tensor
    block_span: Tensor


class DynamicMoments(NamedTuple):
    """Moments of a fragment in bitsandbytes' 8-bit format (``lowmem_adam.dynamic_map``), contiguous.

    ``state1`` and ``state2``, uint8, are the codes of first and second moment, as many as the fragment has elements;
    ``absmax1`` and ``absmax2``, float32, as many as it has blocks, which are of ``FLAT_BLOCK_SIZE``.
    """

    state1: Tensor
    state2: Tensor
    absmax1: Tensor
    absmax2: Tensor


class FullMoments(NamedTuple):
    """fp32 moments of a fragment, contiguous, in the parameter's order."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


Moments = CodedMoments | DynamicMoments | FullMoments
"""All kinds of moments; those of ``DynamicMoments`` have a layout of ``Layout.of(shape, FLAT)``."""


class Fragment(NamedTuple):
    """Blocks ``[first_block, end_block)`` of one parameter: what one rank steps of it.

    ``param`` (float32, bfloat16 or float16) and ``grad`` (the same dtype or float32) hold the elements of these
    blocks and nothing else, in row-major order of whatever strides. ``layout`` is that of the whole parameter, so
    that block ordinals, and with them every rounding decision, do not depend on how it was cut.

    ``cache`` is the owner's, who hands over the same dictionary with the same ``param``, ``moments``, ``master`` and
    blocks from step to step: a backend may keep there what it found out about them. Without one it finds out each time.

    ``master`` keeps what a 16-bit parameter cannot hold of its weight, contiguous, in the parameter's order: float32
    for the weight itself, int16 or int8 for a correction, as ``rounding`` says.
    """

    param: Tensor
    grad: Tensor
    moments: Moments
    layout: Layout
    first_block: int
    end_block: int
    cache: dict[str, Any] | None = None
    master: Tensor | None = None


def l2_decay(weight_decay: float) -> float:
    """A coefficient, or 0 where float32 rounds it to zero: that is no decay, also of an infinite weight."""
    return 0.0 if weight_decay <= 2.0**-150 else weight_decay


def power(base: float, exponent: int) -> float:
    """A whole power by squaring: the same bits wherever doubles are multiplied, which no library's ``pow`` promises."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


@dataclass(frozen=True, slots=True)
class StepScalars:
    """Hyperparameters of one step of one parameter, bias corrections included.

    All are computed in double and rounded once, to float32, where a kernel uses them.
    """

    beta1: float
    beta2: float
    eps: float
    """Added to sqrt(v), so times the bias correction of that: ``eps * sqrt(1 - beta2**step)``."""
    weight_decay: float
    """Coefficient of L2 decay, added to the gradient; 0 where the decay is decoupled."""
    shrink: float
    """Factor of decoupled decay on the parameter, ``1 - lr * weight_decay``; 1 where there is none."""
    step_size: float
    """``lr * sqrt(1 - beta2**step) / (1 - beta1**step)``: both bias corrections."""
    grad_scale: float
    """Factor of the gradient; 1 where there is none."""
    maximize: bool
    stochastic: bool
    """Round a 16-bit parameter stochastically rather than to nearest, where it has no ``master``."""
    skip_nonfinite: bool
    """Leave blocks with a non-finite gradient as they are, and count them."""
    wide: bool
    """Blocks look for ratio octaves: ``codec.exceeds`` of the betas."""
    step: int
    seed: int
    lr: float
    """As given, like the next two: for kernels that calculate in another order."""
    plain_eps: float
    decoupled_decay: float

    @classmethod
    def at_step(
        cls,
        step: int,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decoupled: bool,
        maximize: bool,
        low_precision_update: str,
        nonfinite: str,
        seed: int,
        grad_scale: float = 1.0,
    ) -> StepScalars:
        """The record of step number ``step`` (the first is 1) from a param group's settings."""
        beta1, beta2 = betas
        root_correction = math.sqrt(1.0 - power(beta2, step))
        return cls(
            beta1=beta1,
            beta2=beta2,
            eps=eps * root_correction,
            weight_decay=0.0 if decoupled else l2_decay(weight_decay),
            shrink=1.0 - lr * weight_decay if decoupled else 1.0,
            step_size=lr * root_correction / (1.0 - power(beta1, step)),
            grad_scale=grad_scale,
            maximize=maximize,
            stochastic=low_precision_update == "stochastic",
            skip_nonfinite=nonfinite == "skip",
            wide=exceeds(beta1, beta2),
            step=step,
            seed=seed,
            lr=lr,
            plain_eps=eps,
            decoupled_decay=weight_decay if decoupled else 0.0,
        )


@dataclass(frozen=True, slots=True)
class DeviceSettings:
    """Settings of a param group whose steps are counted on the device, as a CUDA graph needs it (``capturable``)."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    stochastic: bool
    skip_nonfinite: bool
    seed: int

    @property
    def l2_decay(self) -> float:
        """``StepScalars.weight_decay``."""
        return 0.0 if self.decoupled else l2_decay(self.weight_decay)

    @property
    def wide(self) -> bool:
        """``StepScalars.wide``."""
        return exceeds(*self.betas)


class DeviceRates(NamedTuple):
    """What changes from step to step; tensors are read on the device, at each replay anew."""

    lr: float | Tensor
    grad_scale: float | Tensor
    """Factor of the gradient."""
    found_inf: float | Tensor
    """Where it is not 0, nothing is stepped and no step counted."""


class DeviceStep(NamedTuple):
    """A step of which the number is on the device: ``StepScalars`` that a kernel computes, to the same bits."""

    step: Tensor
    """int64 scalar, the number of steps taken; the kernel counts."""
    settings: DeviceSettings
    rates: DeviceRates
    """The same object for all of a param group."""
    captured: list[object]
    """Takes what CUDA graphs read, and keeps it as long as the optimizer lives."""


Work = tuple[Fragment, StepScalars]
"""What a backend steps: a fragment and its hyperparameters."""

DeviceWork = tuple[Fragment, DeviceStep]
"""The same where the device counts the steps."""

AnyWork = tuple[Fragment, StepScalars | DeviceStep]


class Batch(Sequence[Work]):
    """Fragments of which a backend may know all but where gradients lie and the numbers of this step.

    Args:
        fragments: with any tensor in the place of their gradients.
        grads: gradients, one a fragment, none of which has its sign bit set.
        addresses: of these.
        records: hyperparameters, each once.
        rows: of every fragment its record.
        kept: a dictionary for backends, the same as long as ``fragments`` and ``rows`` are the same objects, gradients
            look the same (``looks.Look``), and so do the switches in records: whether there is L2 decay,
            ``stochastic``, ``skip_nonfinite`` and ``wide``.
    """

    __slots__ = ("_fragments", "_grads", "addresses", "kept", "records", "rows")

    def __init__(
        self,
        fragments: Sequence[Fragment],
        grads: Sequence[Tensor],
        addresses: Sequence[int],
        records: Sequence[StepScalars],
        rows: Sequence[int],
        kept: dict[str, Any],
    ) -> None:
        self._fragments, self._grads = fragments, grads
        self.addresses, self.records, self.rows, self.kept = addresses, records, rows, kept

    def __len__(self) -> int:
        return len(self._fragments)

    @overload
    def __getitem__(self, index: int) -> Work: ...
    @overload
    def __getitem__(self, index: slice) -> list[Work]: ...
    def __getitem__(self, index: int | slice) -> Work | list[Work]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._fragments[index]._replace(grad=self._grads[index]), self.records[self.rows[index]]
