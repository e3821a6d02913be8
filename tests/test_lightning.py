"""The optimizers under PyTorch Lightning: its loop, its checkpoints, its ranks, its wrappers, and the example."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("lightning", reason="what is tested is how the optimizers do under Lightning")

import lightning
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from typer.testing import CliRunner

import lowmem_adam
from lowmem_adam import AdamW8bit, agreement
from tests.cases import assert_same_bits, everything, params_of
from tests.launching import SECONDS, kill_tree
from tests.lightning_cases import ACCUMULATED, BATCHES, CLIP, STEPS, Model, batch, fit, own, trainer_of
from tests.ranks import NEEDS_GLOO, on_ranks

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


# ---------------------------------------------------------------- one process


def batches(rank: int = 0) -> list[Tensor]:
    return [batch(rank, index) for index in range(BATCHES)]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_resumed_fit_is_the_same_fit_bit_for_bit(precision: str, tmp_path: Path) -> None:
    whole, resumed = Model(), Model()
    fit(trainer_of(tmp_path, precision=precision), whole, batches())
    again = trainer_of(precision=precision)
    fit(again, resumed, batches(), ckpt_path=tmp_path / "epoch-0.ckpt", weights_only=True)
    assert again.global_step == 2 * STEPS
    assert resumed.losses == whole.losses[BATCHES:]
    assert whole.losses[-1] < whole.losses[0] - 0.1
    assert_same_bits(everything(own(whole)), everything(own(resumed)))
    assert {int(state["step"]) for state in own(whole).state.values()} == {2 * STEPS}
    assert sum("exp_avg_code" in state for state in own(whole).state.values()) == 2


def test_fit_takes_the_steps_of_a_loop_written_by_hand() -> None:
    """Closure, accumulation, clipping, schedule and param groups in Lightning's order."""
    fitted, looped = Model(), Model()
    fit(trainer_of(), fitted, batches())
    configured = looped.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for index, inputs in enumerate(2 * batches()):
        (looped.training_step(inputs, index) / ACCUMULATED).backward()
        if index % ACCUMULATED == ACCUMULATED - 1:
            norm = torch.nn.utils.clip_grad_norm_(looped.parameters(), CLIP)
            assert norm > CLIP
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    assert_same_bits(everything(own(fitted)), everything(optimizer))


class ClippedInTheStep(Model):
    """Clips by the optimizer, and notes the gradients' norm as the hook before a step sees it."""

    norms: tuple[float, ...] = ()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert type(optimizer) is AdamW8bit  # itself, not its wrapper
        grads = [param.grad for param in params_of(optimizer) if param.grad is not None]
        self.norms += (float(torch.nn.utils.get_total_norm(grads)),)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        assert float(optimizer.clip_grad_norm_(gradient_clip_val)) == self.norms[-1]


def test_clipping_within_the_step_is_lightnings_clipping() -> None:
    inside, before, never = ClippedInTheStep(moments="32bit"), Model(moments="32bit"), Model(moments="32bit")
    fit(trainer_of(), inside, batches())
    fit(trainer_of(), before, batches())
    fit(trainer_of(gradient_clip_val=None), never, batches())
    assert len(inside.norms) == 2 * STEPS
    # The product is taken at another place, and so rounded differently.
    assert inside.losses == pytest.approx(before.losses, rel=1e-6)
    assert inside.losses != pytest.approx(never.losses, rel=1e-3)


# ---------------------------------------------------------------- wrappers


class ByHand(Model):
    """Manual optimization: what it calls is the wrapper's."""

    def __init__(self, **keywords: Any):
        super().__init__(**keywords)
        self.automatic_optimization = False

    def training_step(self, inputs: Tensor, _: int) -> Tensor:
        optimizer: Any = self.optimizers()
        assert type(optimizer) is not AdamW8bit
        assert isinstance(optimizer, AdamW8bit)
        optimizer.zero_grad()
        loss = super().training_step(inputs, 0)
        self.manual_backward(loss)
        optimizer.clip_grad_norm_(CLIP)
        optimizer.step()
        self.lr_schedulers().step()
        return loss


def test_wrapper_of_manual_optimization_is_the_optimizer() -> None:
    by_hand = ByHand()
    fit(trainer_of(gradient_clip_val=None, accumulate_grad_batches=1), by_hand, batches())
    # Clipped by the wrapper: the same as a fit that clips in the step.
    hooked = ClippedInTheStep()
    fit(trainer_of(accumulate_grad_batches=1), hooked, batches())
    assert by_hand.losses == hooked.losses
    wrapper: Any = by_hand.optimizers()
    assert_same_bits(everything(wrapper), everything(own(by_hand)))
    assert wrapper.memory_report() == own(by_hand).memory_report()
    assert wrapper.stats() == own(by_hand).stats()
    assert wrapper.param_groups is own(by_hand).param_groups


@pytest.fixture
def wrapped() -> tuple[Any, AdamW8bit, Tensor]:
    """An optimizer as Fabric wraps it, and its parameter, with a gradient."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    param = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = AdamW8bit([param], lr=1e-2)
    wrapper = fabric.setup_optimizers(optimizer)
    param.grad = torch.full_like(param, 2.0)
    return wrapper, optimizer, param


def test_clipping_through_a_wrapper_reaches_the_step(wrapped: tuple[Any, AdamW8bit, Tensor]) -> None:
    wrapper, optimizer, param = wrapped
    wrapper.clip_grad_norm_(1.0)
    wrapper.step()
    # First moments are (1 - beta1) of the clipped gradient, whose norm is 1.
    assert float(optimizer.state[param]["step"]) == 1
    other = torch.nn.Parameter(torch.ones(64, 64))
    alone = AdamW8bit([other], lr=1e-2)
    other.grad = torch.full_like(other, 2.0)
    alone.clip_grad_norm_(1.0)
    alone.step()
    assert_same_bits(everything(alone), everything(optimizer))


def test_attributes_of_a_wrapper_are_the_optimizers(wrapped: tuple[Any, AdamW8bit, Tensor]) -> None:
    wrapper, optimizer, param = wrapped
    wrapper.step()
    assert wrapper._partition is optimizer._partition is not None
    assert wrapper.master_weight(param).equal(param)
    assert set(vars(wrapper)).isdisjoint(vars(optimizer))
    wrapper.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == 2
    wrapper.param_groups = optimizer.param_groups[:1]
    assert len(optimizer.param_groups) == 1


def test_subclass_that_is_no_wrapper_is_left_alone() -> None:
    class Own(AdamW8bit):
        """A user's."""

    assert "clip_grad_norm_" not in vars(Own)
    assert Own([torch.nn.Parameter(torch.ones(3))])._partition is None


# ---------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def saved_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """epoch-0.ckpt of one process without shards."""
    folder = tmp_path_factory.mktemp("alone")
    fit(trainer_of(folder), Model(), batches())
    return folder


def of_two(rank: int, folder: Path | None = None, **keywords: Any) -> lightning.Trainer:
    """A Trainer of the two ranks that there are, as under torchrun."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment())
    return trainer_of(folder, devices=2, strategy=strategy, **keywords)


def resumes(rank: int, folder: Path) -> dict[str, Any]:
    """Sharded and not, in each precision: a fit, the same resumed in its middle, and what they end with."""
    ends = {}
    for precision in PRECISIONS:
        for shard in (None, "world"):
            saved = folder / f"{precision}-{shard}"
            whole, resumed = Model(shard_group=shard), Model(shard_group=shard)
            fit(of_two(rank, saved, precision=precision), whole, batches(rank))
            again = of_two(rank, precision=precision)
            fit(again, resumed, batches(rank), ckpt_path=saved / "epoch-0.ckpt", weights_only=True)
            assert again.global_step == 2 * STEPS
            assert resumed.losses == whole.losses[BATCHES:]
            end = everything(own(whole))
            assert_same_bits(end, everything(own(resumed)))
            own(resumed).check_replicas()
            ends[f"{precision}, {shard}"] = {"end": end, "losses": whole.losses}
            held = own(whole).memory_report()
            assert len(held["ranks"]) == (2 if shard else 1)
    return ends


def from_one(rank: int, saved: Path, folder: Path) -> dict[str, Any]:
    model = Model(shard_group="world")
    fit(of_two(rank, max_epochs=1), model, batches(rank), ckpt_path=saved / "epoch-0.ckpt")  # nothing left to fit
    return everything(own(model))


class SavedByOne(Model):
    """After a step rank 0 saves alone, which is refused; after the last one all of them save."""

    def __init__(self, folder: Path, **keywords: Any):
        super().__init__(**keywords)
        self.folder = folder
        self.refused = False

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == 1 and self.trainer.is_global_zero and not self.refused:
            self.refused = True
            words = r"consolidate_state_dict\(to=0\) of a sharded optimizer waited 1 s for the other ranks"
            with mock.patch.object(agreement, "MEETING_SECONDS", 1.0), pytest.raises(RuntimeError, match=words):
                self.trainer.save_checkpoint(self.folder / "alone.ckpt")
        if self.trainer.global_step == 2 * STEPS:
            self.trainer.save_checkpoint(self.folder / "together.ckpt")


def saves_alone(rank: int, folder: Path) -> dict[str, Any]:
    model = SavedByOne(folder, shard_group="world")
    fit(of_two(rank), model, batches(rank))
    assert model.refused == (rank == 0)
    return everything(own(model))


class ReducedToShards(ClippedInTheStep):
    """Gradients go only where they are stepped, so Lightning's own clipping would see NaN."""

    def on_train_start(self) -> None:
        ddp: Any = self.trainer.strategy.model
        ddp.register_comm_hook(own(self), lowmem_adam.reduce_scatter_hook)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert any(bool(p.grad.isnan().any()) for p in params_of(optimizer) if p.grad is not None)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        assert float(optimizer.clip_grad_norm_(gradient_clip_val)) > CLIP


def reduces(rank: int, folder: Path) -> dict[str, Any]:
    models = [kind(shard_group="world", moments="32bit") for kind in (ReducedToShards, ClippedInTheStep)]
    for model in models:
        fit(of_two(rank), model, batches(rank))
    assert own(models[0]).stats() == {"skipped_blocks": 0}
    # Norms are summed by shards, in another order, and clip by a hair's breadth less or more.
    for reduced, whole in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(reduced, whole, rtol=1e-5, atol=1e-6)
    return {}


def all_on_two(rank: int, folder: Path, saved: Path) -> dict[str, Any]:
    """One start of the ranks for all that is asked of them."""
    return {
        "resumes": resumes(rank, folder),
        "from one": from_one(rank, saved, folder),
        "saves alone": saves_alone(rank, folder),
        "reduces": reduces(rank, folder),
    }


@pytest.fixture(scope="module")
def two_ranks(saved_alone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, on_ranks(2, partial(all_on_two, saved=saved_alone), folder)


@NEEDS_GLOO
@pytest.mark.slow
def test_two_ranks_resume_with_the_same_bits_with_and_without_shards(
    two_ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, results = two_ranks
    for precision in PRECISIONS:
        whole, sharded = (results[0]["resumes"][f"{precision}, {shard}"] for shard in (None, "world"))
        assert_same_bits(whole, sharded)
        files = [
            torch.load(folder / f"{precision}-{shard}" / "epoch-1.ckpt", weights_only=True) for shard in (None, "world")
        ]
        assert_same_bits(*(file["optimizer_states"] for file in files))
        assert_same_bits(files[0]["optimizer_states"][0]["state"], whole["end"]["state"])


@NEEDS_GLOO
@pytest.mark.slow
def test_saved_on_two_ranks_resumed_on_one(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, results = two_ranks
    saved = folder / "32-true-world"
    state = torch.load(saved / "epoch-0.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    model = Model(shard_group="world")
    restored: list[Any] = []
    model.on_train_start = lambda: restored.append(everything(own(model)))
    # Twice as many batches of one rank are one batch of two.
    dealt = [batch(rank, index) for pair in range(STEPS) for rank in (0, 1) for index in (2 * pair, 2 * pair + 1)]
    trainer = trainer_of(accumulate_grad_batches=2 * ACCUMULATED)
    fit(trainer, model, dealt, ckpt_path=saved / "epoch-0.ckpt", weights_only=True)
    assert_same_bits(restored[0]["state"], state)
    assert trainer.global_step == 2 * STEPS
    on_two = results[0]["resumes"]["32-true, world"]["end"]["params"]
    # Sums over batches are taken in another order.
    torch.testing.assert_close(params_of(own(model)), on_two, rtol=0, atol=2e-3)


@NEEDS_GLOO
@pytest.mark.slow
def test_saved_on_one_resumed_on_two_ranks(two_ranks: tuple[Path, list[dict[str, Any]]], saved_alone: Path) -> None:
    saved = torch.load(saved_alone / "epoch-0.ckpt", weights_only=True)
    loaded = two_ranks[1][0]["from one"]
    assert_same_bits(loaded["state"], saved["optimizer_states"][0]["state"])


@NEEDS_GLOO
@pytest.mark.slow
def test_rank_that_saves_alone_is_refused_and_loses_nothing(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, results = two_ranks
    assert not (folder / "alone.ckpt").exists()
    assert_same_bits(results[0]["saves alone"], results[0]["resumes"]["32-true, world"]["end"])
    together = torch.load(folder / "together.ckpt", weights_only=True)["optimizer_states"][0]
    assert_same_bits(together["state"], results[0]["saves alone"]["state"])


# ---------------------------------------------------------------- the example


def run_example(*options: str) -> str:
    """The command of docs/lightning.md with other options, of which the last ones count; what it prints."""
    page = (ROOT / "docs" / "lightning.md").read_text(encoding="utf-8")
    command = shlex.split(next(line for line in page.splitlines() if line.startswith("python launch/lightning_lm.py")))
    assert f"`{shlex.join(command)}`" in (ROOT / "README.md").read_text(encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, *command[1:], *options]
    with subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=SECONDS)
        finally:
            kill_tree(process)
    assert process.returncode == 0, output
    return output


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@NEEDS_GLOO
@pytest.mark.slow
def test_example_trains_two_processes_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the example takes model and text from the job that runs under accelerate")
    pytest.importorskip("transformers", reason="the example takes its model from transformers")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    text = ["--data", str(ROOT / "lowmem_adam"), "--validation-every", "5"]
    small = [*text, "--hidden-size", "64", "--intermediate-size", "96", "--layers", "1", "--steps", "12"]
    options = [*small, "--warmup-steps", "2", "--checkpoint-every", "6"]
    output = run_example(*options, "--output-dir", str(whole))
    assert "2 processes, optimizer state of the largest: 1.0" in output
    checkpoint = whole / "checkpoints" / "step=000006.ckpt"
    run_example(*options, "--output-dir", str(resumed), "--resume", str(checkpoint))
    written = records(whole)
    assert [record["step"] for record in written if record["kind"] == "train"] == list(range(1, 13))
    losses = [record["loss"] for record in written if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    assert [record["step"] for record in written if record["kind"] == "validation"] == [6, 12]
    assert records(resumed) == [record for record in written if record["step"] > 6]
    summaries = [json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in (whole, resumed)]
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]
    assert sum(summaries[0]["optimizer_state_bytes"]) / summaries[0]["parameters"] < 2.1


def test_example_refuses_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the example takes model and text from the job that runs under accelerate")
    pytest.importorskip("transformers", reason="the example takes its model from transformers")
    from tests import lm_cases  # noqa: F401 (puts launch/ on the path)

    import lightning_lm  # isort: skip

    for options, words in (
        (["--processes", "3"], "total_batch_size is 16; accepted with 3 processes: multiples of them"),
        (["--resume", str(tmp_path / "absent.ckpt")], "no such file"),
        (["--lr", "0"], "lr must be a finite number above 0"),
    ):
        result = CliRunner().invoke(lightning_lm.app, ["--output-dir", str(tmp_path / "run"), *options])
        assert result.exit_code == 2
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
