"""What a step is doing, told to whoever listens: ``lowmem_adam.profile`` does, and mostly nobody.

A step says by explicit calls where a phase begins; time until the next call is that phase's. Where nobody listens it
compares six times with None in a step that is the last one over again, and calls empty methods in others: a few for
each call of the kernel, none for a single tensor.
"""

from __future__ import annotations

CHECK = "check"
"""Python on the host: what is checked, made and described before a kernel is called."""
GATHER = "gather"
"""Communication: parameters sent among ranks, and waiting for other ranks."""
STEP = "step"
"""The kernel."""
TRANSFER = "transfer"
"""Copies between a device and the host that ``offload`` starts and waits for."""
OTHER = "other"
"""What else ``step()`` does: the closure, mostly."""

PHASES = (CHECK, GATHER, STEP, TRANSFER, OTHER)


class Listener:
    """Is told of steps and their phases; this one does nothing."""

    def begin(self) -> None:
        """A step begins, with the phase ``OTHER``. One that ends by an error, or early, has no ``end``."""

    def now(self, phase: str) -> None:
        """From now on the step is in this phase."""

    def end(self) -> None:
        """The step is taken."""


NOBODY = Listener()
