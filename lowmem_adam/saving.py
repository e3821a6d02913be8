"""The part of the optimizers that knows who holds what, saves and loads it: ``state_dict`` in its forms, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from lowmem_adam import agreement, foreign, local, resharding, saved_state, wrapped, zero
from lowmem_adam.layout import Layout
from lowmem_adam.shard import Partition, World
from lowmem_adam.shard_tensor import asked_by_checkpoint
from lowmem_adam.state import home_of, master_dtype, new_state, part_of


class SavedOptimizer(torch.optim.Optimizer):
    """An optimizer whose state is cut into shards, of which there may be only one, and which saves and loads it."""

    _decoupled = False
    _shard_group: Any = None
    _bucket_cap_mb = 64.0
    _offload: str | None = None
    _partition: Partition | None = None
    _known: tuple[int, ...] = ()
    """The parameters that ``_cut`` has found nothing new about, by identity."""
    _agreed = False
    """Whether ranks have compared what they hold since it last changed from outside."""
    _consolidated: dict[str, Any] | None = None
    """What ``consolidate_state_dict`` made, for the next ``state_dict()``: a whole on one rank, {} on others."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        wrapped.ask_the_optimizer(cls)

    # ---------------------------------------------------------------- who holds what

    def _cut(self, needed: Callable[[Tensor], bool] = lambda _: False) -> Partition:
        """Who holds what, parameters included that are new: those with a gradient, about to get one, or needed."""
        params = [param for group in self.param_groups for param in group["params"]]
        known = tuple(map(id, params))
        if known != self._known:
            zero.refuse_shards(self._shard_group)
        if self._partition is None:
            self._partition = Partition(World.of(self._shard_group), int(self._bucket_cap_mb * 2**20))
        elif self._partition.world.group is None and self._shard_group is not None:
            self._look_for_group_again(self._partition)
        partition = self._partition
        if known == self._known:
            return partition
        if partition.world.size == 1 and not {id(p) for p in partition.params} <= set(known):  # some were taken out
            partition = self._partition = Partition(partition.world, partition.bucket_bytes)
        new = [p for p in params if p not in partition and (p.requires_grad or p.grad is not None or needed(p))]
        if new:
            partition.extend(new, self._moments_by_param())
            self._agreed = False
        if all(param in partition for param in params):
            self._known = known
        return partition

    def _look_for_group_again(self, partition: Partition) -> None:
        """Of a copy, whose process group was left behind, or where there was none when it was asked for."""
        world = World.of(self._shard_group)
        if partition.world.size > 1:
            partition.rejoin(world)
        elif world.size > 1:
            self._partition = Partition(world, partition.bucket_bytes)
            moments = self._moments_by_param()
            self._partition.extend(list(partition.params), moments)
            for param, state in self.state.items():
                span = self._partition.span(param) if param in self._partition else (0, 0)
                layout = Layout.of(param.shape, moments[param])
                self.state[param] = {key: v.clone() for key, v in part_of(state, layout, span).items()}
            self._known, self._agreed = (), False

    def _check_owners(self) -> None:
        """Check that parameters that have state were not replaced, by DTensors or by ZeRO's partitions.

        Raises:
            ValueError: they were. Their moments would be lost without a word, and held for nothing.
        """
        zero.refuse_lost_state(self.state)
        params = [param for group in self.param_groups for param in group["params"]]
        if any(map(local.is_dtensor, params)) and not any(self.state.get(param) for param in params):
            plain = sum(bool(state) and not local.is_dtensor(param) for param, state in self.state.items())
            if plain:
                raise ValueError(
                    f"state is of {plain} parameters that are in no param group, where DTensors have taken their "
                    "place, as in accelerate's prepare under FSDP2; accepted: load_state_dict or "
                    "accelerator.load_state after that, or optimizer.state.clear() to begin with new moments"
                )

    def _moments_by_param(self) -> dict[Tensor, str]:
        """The setting of every parameter's group."""
        return {param: group["moments"] for group in self.param_groups for param in group["params"]}

    def _steps_of(self, param: Tensor) -> int:
        """How many steps a parameter has taken."""
        state = self.state.get(param)
        return int(state["step"]) if state else 0

    # ---------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        """The state, as ``torch.optim.Optimizer.state_dict``.

        Of a sharded optimizer: called on all ranks, they put the whole state together on rank 0, and the others get
        their own part, which the same rank of as many can load. After ``consolidate_state_dict`` that rank gets the
        whole without the others. Asked by ``torch.distributed.checkpoint``, every rank gets its own part in a form that
        any number of ranks can load, as ``sharded_state_dict`` returns it. Asked by DeepSpeed's ZeRO, moments have the
        names and types of ``torch.optim.AdamW``'s, see ``zero.for_zero``.

        Raises:
            RuntimeError: not all ranks of ``shard_group`` called it within five minutes.
            ValueError: moments that were written into ``state`` are not accepted, see ``zero.taken_over``.
        """
        self._take_over_written()
        if asked_by_checkpoint():
            # A load writes into what it gets, so it gets a copy: one that fails in the middle has changed nothing.
            return self._sharded(private=asked_by_checkpoint(for_load=True))
        if not any(self.state.values()):
            return super().state_dict()
        partition = self._cut()
        if zero.asked_by_zero():
            return zero.for_zero(super().state_dict())
        if self._consolidated:
            # Settings may have changed since, which takes no step.
            return {**self._consolidated, "param_groups": super().state_dict()["param_groups"]}
        if partition.world.size == 1:
            return super().state_dict()
        if self._consolidated is None:
            accepted = (
                "a call on all ranks of shard_group, or consolidate_state_dict(to=rank) on all of them and then "
                "state_dict() on that rank, as lowmem_adam.integrations.transformers.ConsolidateState does it, a "
                "callback for transformers' Trainer"
            )
            lines = agreement.describe(self.param_groups, partition, self._steps_of)
            agreement.meet(lines, partition.world, "state_dict()", accepted)
            settings = agreement.describe_settings(self.param_groups)
            agreement.agree(settings, partition.world)
            return self._packed(lambda packed, params, partition: self._whole_or_shard(packed, params, partition, 0))
        return self._packed(resharding.as_shard)

    def _take_over_written(self) -> None:
        """Code moments that somebody has written into ``state`` in fp32, as DeepSpeed's loaders do."""
        if self._shard_group is None:
            self.state.update(zero.taken_over(self.param_groups, self.state, self._decoupled, self._offload))

    def consolidate_state_dict(self, to: int | Sequence[int] = 0) -> dict[str, Any] | None:
        """Put the whole state together on one rank, on the CPU; a collective of ``shard_group``.

        For those who call ``state_dict()`` on one rank only: it returns this state there, until the next step.

        Args:
            to: rank in ``shard_group``; where parameters are DTensors, in the default process group. Or several, such
                as one of each machine; they get it one after the other.

        Returns:
            The whole state on rank ``to``, as an optimizer without shards has it; None on others. On every rank its
            own ``state_dict()``, where neither moments are sharded nor parameters are DTensors.

        Raises:
            ValueError: there is no such rank.
            RuntimeError: not all ranks of ``shard_group`` called it, with the same rank, within five minutes.
        """
        self._take_over_written()
        world = self._cut().world
        spread = any(local.is_dtensor(value) for state in self.state.values() for value in state.values())
        ranks = torch.distributed.get_world_size() if spread else world.size
        targets = resharding.check_targets(to, ranks)
        if world.size == 1 and not spread:
            return super().state_dict()
        lines = [f"consolidated on {targets}"]
        if world.size > 1:
            lines += agreement.describe(self.param_groups, self._cut(), self._steps_of)
        everyone, whose = (world, " of shard_group") if world.size > 1 else (World.of("world"), "")  # of DTensors: all
        agreement.meet(lines, everyone, f"consolidate_state_dict(to={to})", f"this call on all ranks{whose}")
        whole = None
        for target in targets:
            whole = self._gathered(world, target) or whole
        self._consolidated = whole or {}
        return whole

    def _gathered(self, world: World, to: int) -> dict[str, Any] | None:
        """The whole state on one rank, None on others."""
        if world.size == 1:
            return resharding.gathered(super().state_dict(), to)
        packed = self._packed(lambda packed, params, partition: self._whole_or_shard(packed, params, partition, to))
        return packed if world.rank == to else None

    @property
    def consolidated(self) -> bool:
        """Whether ``consolidate_state_dict`` has been called since the last step, so that the next save is ready."""
        return self._consolidated is not None

    def _forget_consolidated(self) -> None:
        """Drop what ``consolidate_state_dict`` keeps for the next ``state_dict()``."""
        self._consolidated = None

    def sharded_state_dict(self) -> dict[str, Any]:
        """The state for ``torch.distributed.checkpoint.save`` and ``load``: no rank holds more than its own part.

        Before the first step it makes the state, all zero, since a load fills what is there. Tensors share memory with
        the state. Saved parts can be loaded by any number of ranks, and by an optimizer without shards.
        """
        return self._sharded(private=False)

    def _sharded(self, *, private: bool) -> dict[str, Any]:
        """Parts of what there is, made first if need be; private ones are copies, or made for this alone."""
        self._take_over_written()
        if not private:
            self._make_all_state()

        def form(packed: dict[str, Any], params: list[Tensor], partition: Partition) -> dict[str, Any]:
            if private:
                missing = self._missing_state(partition)
                made = {index: missing[param] for index, param in enumerate(params) if param in missing}
                packed = resharding.copied(packed)
                packed["state"] = {**packed["state"], **made}
            if partition.world.group is None:
                return packed
            return resharding.as_parts(packed, params, partition, private)

        self._cut()
        return self._packed(form)

    def _make_all_state(self) -> None:
        """Zero moments of this rank's blocks for all parameters that have none yet; no step is counted."""
        self.state.update(self._missing_state(self._cut()))

    def _missing_state(self, partition: Partition) -> dict[Tensor, dict[str, Tensor]]:
        return {
            param: new_state(
                param,
                group["moments"],
                partition.span(param),
                master_dtype(param.dtype, group),
                home_of(param, self._offload),
            )
            for group in self.param_groups
            for param in group["params"]
            if param in partition and not self.state.get(param)
        }

    def _packed(self, form: Callable[[dict[str, Any], list[Tensor], Partition], dict[str, Any]]) -> dict[str, Any]:
        """Torch's state_dict of this rank's tensors, brought into a form; the user's own hooks see it so."""
        assert self._partition is not None
        partition = self._partition
        params = [param for group in self.param_groups for param in group["params"]]
        hook = self.register_state_dict_post_hook(lambda _, packed: form(packed, params, partition), prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def _whole_or_shard(
        self, packed: dict[str, Any], params: list[Tensor], partition: Partition, to: int
    ) -> dict[str, Any]:
        return resharding.as_whole(packed, params, partition, to) or resharding.as_shard(packed, params, partition)

    # ---------------------------------------------------------------- loading, copying

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned, bit for bit; the tensors are copied.

        Also state of torch's Adam and AdamW, and of bitsandbytes' in 8 and 32 bits, of the same parameters.

        Settings of the param groups come from the saved state, except ``backend``, which is the machine's. A sharded
        optimizer takes its part of a whole state, whatever number of ranks has saved it; all ranks call it, and what
        one of them refuses none loads.

        Raises:
            ValueError: state that does not fit, see ``saved_state.check`` and ``foreign.to_own``; nothing has changed
                then.
            RuntimeError: of a sharded optimizer: another rank refuses its state, ranks were given state of different
                steps or settings, or not all of them called it within five minutes; nothing has changed then.
        """
        held = {param: dict(state) for param, state in self.state.items()}
        given_away: set[int] = set()

        def check_and_seal(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            return saved_state.seal(self._own_part(given, given_away), self.param_groups)

        def unseal(_: torch.optim.Optimizer) -> None:
            saved_state.unseal(self.state, held, given_away, self._offload)

        # As hooks, so that the user's own hooks see plain tensors on both sides.
        if not isinstance(state_dict, Mapping):  # torch copies it before any hook can look at it
            self._own_part(state_dict, given_away)
        before = self.register_load_state_dict_pre_hook(check_and_seal)
        after = self.register_load_state_dict_post_hook(unseal, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
        self._consolidated = None
        self._agreed = False

    def _own_part(self, given: Any, given_away: set[int]) -> dict[str, Any]:
        """This rank's part of what is to be loaded, checked here and by all other ranks."""
        before = (self._partition and self._partition.copied(), self._known, self._agreed)
        try:
            try:
                saved_state.check_form(given)
                given = zero.from_zero(given)
                given = foreign.to_own(given, self.param_groups)
                partition = self._cut(resharding.has_state(given, self.param_groups))
                own = resharding.local_state(given, self.param_groups, partition, given_away)
            except Exception as error:
                self._refuse_load(error)
                raise
            if partition.world.size > 1:
                _meet_to_load(partition.world)
                agreement.agree(agreement.describe_saved(own), partition.world)
            return own
        except BaseException:
            self._partition, self._known, self._agreed = before
            raise

    def _refuse_load(self, refusal: Exception) -> NoReturn:
        """Raise ``refusal``, after the other ranks, which are about to load, have been told of it."""
        try:
            world = World.of(self._shard_group)
            if world.size > 1:
                _meet_to_load(world)
        except (RuntimeError, ValueError):  # there is nobody to tell
            raise refusal from None
        agreement.agree([], world, refusal)
        raise AssertionError("agree raises what it is given")


def _meet_to_load(world: World) -> None:
    agreement.meet(["load"], world, "load_state_dict()", "a call on all ranks of shard_group")
