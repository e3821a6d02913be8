"""Where the time of optimizer steps goes in any training loop, and what the state takes.

    with lowmem_adam.profile(optimizer) as prof:
        for batch in batches:
            model(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    print(prof.summary())

``lowmem_adam.profile`` is the function, which takes the name of this module; the classes that it returns are in
``lowmem_adam.profiling``. That is imported by the first call: who profiles nothing need not load it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem_adam.optimizer import Adam8bit

if TYPE_CHECKING:
    from lowmem_adam.profiling import Profile


def profile(optimizer: Adam8bit, *, trace: bool = True) -> Profile:
    """Record the steps that an optimizer takes in a ``with`` block.

    Parameters and state get the bits of a run without it. Times are of the host's clock. Where parameters are on a
    device, the step is made to wait for it, since kernels have only been queued when their call returns: at the start,
    so that what the backward pass has left to do counts as rest of the training step; after kernels and gathers, on the
    stream they run in, so that their time is theirs; and at the end. A step on a device is thus as long as it is by
    itself, while in training Python's part may be hidden behind the backward pass. With ``offload`` it waits at the
    start and at the end only: in between the step waits for copies by itself, and those beside the host's kernel stay
    beside it. It is the host's clock and no events of the device, because a step's parts are on several streams and on
    the host, and only with one clock do they add up to the whole.

    A step that fails, and one that is left out for ``found_inf``, has no record, nor has one in a CUDA graph capture; a
    graph's replay calls no ``step()``. Under DeepSpeed's ZeRO a record is one call for one param group.

    Args:
        optimizer: ``AdamW8bit`` or ``Adam8bit``, also as ``Accelerator.prepare`` returns it.
        trace: keep when each phase began, about 100 bytes for each, for ``chrome_trace``.

    Returns:
        A context manager that holds ``records``.

    Raises:
        TypeError: another optimizer.
        RuntimeError: on entering the block: the optimizer is being profiled already, or ``step_in_backward`` steps its
            parameters outside of ``step()``, where this does not see them.
    """
    from lowmem_adam.profiling import Profile

    return Profile(optimizer, trace=trace)
