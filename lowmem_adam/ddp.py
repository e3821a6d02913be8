"""``DistributedDataParallel`` with a sharded optimizer: gradients reduced only to the rank that steps them."""

# DDP looks at the hook's annotations, so they must not become strings here.
import torch
import torch.distributed as dist
from torch import Tensor

from lowmem_adam.optimizer import Adam8bit

_GradBucket = getattr(dist, "GradBucket", object)  # some builds of torch are not distributed


def reduce_scatter_hook(
    state: Adam8bit,
    bucket: _GradBucket,  # type: ignore[valid-type]
) -> torch.futures.Future[torch.Tensor]:
    """A communication hook: every rank gets the mean gradients of its own shard, and NaN in the place of others.

    ``model.register_comm_hook(optimizer, reduce_scatter_hook)`` on the ``DistributedDataParallel`` model of which the
    optimizer, made with ``shard_group``, has all parameters. A step then sends what plain data parallelism without
    shards sends, in place of half as much again.

    Of the gradients a rank no longer has all. ``optimizer.clip_grad_norm_`` knows; ``torch.nn.utils.clip_grad_norm_``,
    accelerate's ``clip_grad_norm_`` and ``GradScaler`` do not and would find NaN. Accumulation needs
    ``model.no_sync()``, as accelerate's ``accumulate`` uses it.

    Args:
        state: the optimizer.
        bucket: of gradients, by DDP.

    Raises:
        RuntimeError: a second reduction without a step between.
        ValueError: the optimizer is not sharded over all ranks, or the model has parameters that it does not have.
    """
    reduced = state._reduce_scatter(bucket)
    devices = [reduced.device] if reduced.device.type != "cpu" else None
    future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)  # type: ignore[arg-type]
    future.set_result(reduced)
    return future
