"""Hugging Face transformers: what its Trainer, and TRL's, need beside the optimizer where moments are shared.

Without ``shard_group`` nothing of this is needed: ``Trainer(optimizer_cls_and_kwargs=(AdamW8bit, {"lr": 3e-4}))``.
Importing this module imports transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from lowmem_adam import agreement
from lowmem_adam.optimizer import Adam8bit, AdamW8bit
from lowmem_adam.shard import World


def with_arguments(
    args: Any, optimizer: type[Adam8bit] = AdamW8bit, **keywords: Any
) -> tuple[type[Adam8bit], dict[str, Any]]:
    """``optimizer_cls_and_kwargs`` for a Trainer, with the learning rate, betas and eps of its ``TrainingArguments``.

    Trainer hands a class given to it the keywords beside it and nothing of ``learning_rate``, ``adam_beta1``,
    ``adam_beta2`` and ``adam_epsilon``, and says nothing of that. It makes two param groups, of which the first gets
    ``weight_decay``, and the second, with biases and norms, none.

    Args:
        args: the ``TrainingArguments``.
        optimizer: ``AdamW8bit`` or ``Adam8bit``.
        keywords: more of the optimizer's arguments; they come before those of ``args``.

    Raises:
        ValueError: ``weight_decay`` among the keywords, which Trainer's param groups would override; a DeepSpeed config
            with an ``optimizer`` block, beside which Trainer ignores ``optimizer_cls_and_kwargs``.
    """
    block = _deepspeed_config(args).get("optimizer")
    if block is not None:
        raise ValueError(
            f"the DeepSpeed config has optimizer {block!r}, with which Trainer steps instead; accepted: a config "
            "without that block, or AdamW8bit by name there and no optimizer_cls_and_kwargs"
        )
    if "weight_decay" in keywords:
        raise ValueError(
            f"weight_decay is {keywords['weight_decay']!r}, which Trainer's param groups override; accepted: "
            "TrainingArguments(weight_decay=...)"
        )
    own = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return optimizer, {**own, **keywords}


def _deepspeed_config(args: Any) -> Mapping[str, Any]:
    """The config that Trainer goes by, its own or accelerate's; an empty one without DeepSpeed."""
    plugin = getattr(args, "deepspeed_plugin", None)
    return {} if plugin is None else plugin.hf_ds_config.config


class ConsolidateState(TrainerCallback):  # type: ignore[misc]
    """Has moments that ranks share put together before a Trainer saves them: ``callbacks=[ConsolidateState()]``.

    Trainer asks the saving rank alone for ``optimizer.state_dict()``. Once it is known that a save comes, after a step,
    at the end of an epoch or, with ``save_strategy="best"``, after an evaluation, all ranks send their parts to the
    ranks that save. Where a callback behind this one asks for a save, the others join the one that saves after it has
    written the model. An optimizer that shares nothing is left alone, and so are those of DeepSpeed's ZeRO and of FSDP,
    which save on all ranks.

    It also warns of a training that goes on from a checkpoint in which Trainer has found no state of the optimizer.
    """

    def __init__(self) -> None:
        self._savers: list[int] = []
        """Ranks of the shard group that write a checkpoint."""

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Find out which ranks save; a collective.

        Raises:
            ValueError: ``enable_jit_checkpoint``, whose saves no callback is told of.
        """
        own = _ours(optimizer)
        if own is None:
            return
        if state.global_step > 0 and not args.save_only_model and not any(own.state.values()):
            warnings.warn(
                f"training goes on after step {state.global_step}, but its checkpoint had no state of the optimizer "
                "(optimizer.pt and scheduler.pt), so moments begin at zero",
                RuntimeWarning,
                stacklevel=2,
            )
        world = _world(own)
        if world is None:
            return
        if args.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint is True and moments are shared: each rank would begin to save at a moment of "
                "its own; accepted with shard_group: enable_jit_checkpoint=False"
            )
        flags: list[bool] = [False] * world.size
        dist.all_gather_object(flags, bool(args.should_save), group=world.group)
        self._savers = [rank for rank, saves in enumerate(flags) if saves]

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Consolidate if a save comes."""
        if control.should_save:
            self._consolidate(args, state, optimizer)

    def on_epoch_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Consolidate if a save comes."""
        if control.should_save:
            self._consolidate(args, state, optimizer)

    def on_evaluate(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Consolidate if a save may come: the best is told from others after this, and a search of Ray's may save."""
        if args.save_strategy == "best" or state.is_hyper_param_search:
            self._consolidate(args, state, optimizer)

    def on_save(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Join the rank that saves, if it has not been known that it would.

        Raises:
            RuntimeError: several ranks save, of which only one has got the whole; all ranks raise.
        """
        own = _ours(optimizer)
        if own is None or args.save_only_model or not self._savers or _world(own) is None or own.consolidated:
            return
        if not args.should_save:
            own.state_dict()
        if self._savers != [0]:
            raise RuntimeError(
                f"a callback behind ConsolidateState asked for the save at step {state.global_step}, and ranks "
                f"{self._savers} save: their optimizer.pt is not whole; accepted: ConsolidateState as the last callback"
            )

    def _consolidate(self, args: Any, state: Any, optimizer: Any) -> None:
        own = _ours(optimizer)
        if own is None or args.save_only_model or not self._savers or own.consolidated:
            return
        world = _world(own)
        if world is None or not any(own.state.values()):
            return
        accepted = "control.should_save set on all ranks alike"
        agreement.meet([f"a save at step {state.global_step}"], world, "ConsolidateState", accepted)
        own.consolidate_state_dict(to=self._savers)


def _ours(optimizer: Any) -> Adam8bit | None:
    """The optimizer itself, which accelerate has wrapped; None if it is another, such as DeepSpeed's around ours."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, Adam8bit) else None


def _world(optimizer: Adam8bit) -> World | None:
    """The ranks that share the moments, if there are several."""
    world = optimizer._cut().world
    return world if world.size > 1 else None
