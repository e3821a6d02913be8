"""Train and evaluate the classifier with accelerate, on one process or on several with the same result."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from image_data import ImageSet, Normalizer, Split
from image_model import SmallCNN, augment
from optimizers import OptimizerSettings, build_optimizer, check_optimizer_name, check_seed
from reporting import optimizer_state_bytes
from schedules import warmup_cosine
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

SCHEDULES = ("cosine", "plateau", "constant")


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides a run besides the data; written into summary.json as it is."""

    optimizer: str = "adamw8bit"
    schedule: str = "plateau"
    lr: float = 2e-3
    weight_decay: float = 1e-2
    epochs: int = 15
    batch_size: int = 64
    plateau_factor: float = 0.5
    plateau_patience: int = 2
    augment: bool = False
    width: int = 32
    dropout: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check_optimizer_name(self.optimizer)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule '{self.schedule}' is not accepted: give one of {', '.join(SCHEDULES)}")
        if not (math.isfinite(self.lr) and self.lr > 0.0):
            raise ValueError(f"learning rate {self.lr} is not accepted: give a number above 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0.0):
            raise ValueError(f"weight decay {self.weight_decay} is not accepted: give a number, 0 or more")
        if self.width < 8 or self.width % 8:
            raise ValueError(f"width {self.width} is not accepted: give a multiple of 8, 8 or more")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout {self.dropout} is not accepted: give a number from 0 to below 1")
        if self.epochs < 1:
            raise ValueError(f"epochs {self.epochs} is not accepted: give 1 or more")
        if self.batch_size < 1:
            raise ValueError(f"batch size {self.batch_size} is not accepted: give 1 or more")
        if not 0.0 < self.plateau_factor < 1.0:
            raise ValueError(f"plateau factor {self.plateau_factor} is not accepted: give a number between 0 and 1")
        if self.plateau_patience < 0:
            raise ValueError(f"plateau patience {self.plateau_patience} is not accepted: give 0 or more epochs")
        check_seed(self.seed)


@dataclass(frozen=True)
class EpochMetrics:
    """One line of metrics.jsonl."""

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    optimizer_step_ms: float
    seconds: float


@dataclass
class Evaluation:
    """Predictions on one part of the split, in its order, the same on every process."""

    loss: float
    predictions: torch.Tensor
    labels: torch.Tensor

    @property
    def accuracy(self) -> float:
        return (self.predictions == self.labels).double().mean().item()

    def confusion(self, classes: int) -> torch.Tensor:
        """Row: true class; column: predicted class; each cell: number of images."""
        cells = torch.bincount(self.labels * classes + self.predictions, minlength=classes * classes)
        return cells.view(classes, classes)


@dataclass
class TrainResult:
    """What a run leaves: its history, the weights of its best epoch and the optimizer's cost."""

    settings: TrainSettings
    model: torch.nn.Module
    normalizer: Normalizer
    parameters: int
    state_bytes: int
    optimizer_step_ms: float
    diverged: bool
    history: list[EpochMetrics] = field(default_factory=list)

    @property
    def best(self) -> EpochMetrics | None:
        """The epoch of the lowest finite validation loss."""
        finite = [metrics for metrics in self.history if math.isfinite(metrics.validation_loss)]
        return min(finite, key=lambda metrics: metrics.validation_loss) if finite else None

    def summary(self) -> dict[str, Any]:
        best = self.best
        return {
            "settings": asdict(self.settings),
            "diverged": self.diverged,
            "epochs_run": len(self.history),
            "best_epoch": best.epoch if best else None,
            "validation_loss": best.validation_loss if best else None,
            "validation_accuracy": best.validation_accuracy if best else None,
            "final_lr": self.history[-1].lr,
            "parameters": self.parameters,
            "state_bytes": self.state_bytes,
            "state_bytes_per_parameter": self.state_bytes / self.parameters,
            "optimizer_step_ms": self.optimizer_step_ms,
            "seconds": sum(metrics.seconds for metrics in self.history),
        }


EpochCallback = Callable[[EpochMetrics], None]


def check_batch_size(batch_size: int, train_images: int, processes: int) -> None:
    """The batch is the one of all processes together: it must be divisible by them and be there at least once."""
    if batch_size % processes:
        raise ValueError(f"batch size {batch_size} is not accepted: with {processes} processes give a multiple of it")
    if batch_size > train_images:
        raise ValueError(f"batch size {batch_size} is not accepted: there are {train_images} training images")


def check_optimizer(name: str) -> None:
    """Build one for a single number, so that a missing package is known before the images are read."""
    build_optimizer(name, [torch.nn.Parameter(torch.zeros(1))], OptimizerSettings())


def make_loader(images: ImageSet, indices: torch.Tensor, batch_size: int, *, train: bool) -> DataLoader[Any]:
    """Batches of uint8 images and labels; training batches in an order drawn anew each epoch."""
    dataset = TensorDataset(images.images[indices], images.labels[indices])
    # An incomplete training batch would be filled up with repeated images on several processes only. Dropping it
    # keeps the runs equal; the order is drawn anew each epoch, so every image is still used.
    return DataLoader(dataset, batch_size=batch_size, shuffle=train, drop_last=train)


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: Any, normalizer: Normalizer) -> Evaluation:
    """Loss and predictions over all processes; the images that even out the last batch are counted once."""
    model.eval()
    parts: tuple[list[torch.Tensor], ...] = ([], [], [])
    for images, targets in loader:
        logits = model(normalizer(images)).float()
        loss = functional.cross_entropy(logits, targets, reduction="none")
        gathered = accelerator.gather_for_metrics((loss, logits.argmax(dim=1), targets))
        for collected, part in zip(parts, gathered, strict=True):
            collected.append(part.cpu())
    losses, predictions, labels = map(torch.cat, parts)
    result = Evaluation(losses.double().mean().item(), predictions, labels)
    expected = len(loader.dataset)
    assert len(result.labels) == expected, f"gathered {len(result.labels)} of {expected} images"
    return result


def evaluate_part(accelerator: Accelerator, result: TrainResult, images: ImageSet, indices: torch.Tensor) -> Evaluation:
    """Evaluate a finished run's best weights on one part of the split."""
    loader = accelerator.prepare(make_loader(images, indices, result.settings.batch_size, train=False))
    return evaluate(accelerator, result.model.to(accelerator.device), loader, result.normalizer)


def make_scheduler(
    optimizer: torch.optim.Optimizer, settings: TrainSettings, steps: int
) -> LambdaLR | ReduceLROnPlateau | None:
    """``cosine`` moves every step, ``plateau`` after every epoch, ``constant`` never."""
    if settings.schedule == "constant":
        return None
    if settings.schedule == "plateau":
        return ReduceLROnPlateau(optimizer, factor=settings.plateau_factor, patience=settings.plateau_patience)
    warmup_steps = max(1, steps // 20)
    return LambdaLR(optimizer, lambda step: warmup_cosine(step, steps=steps, warmup_steps=warmup_steps))


class Trainer:
    """One run: builds model, optimizer and loaders from the settings, then trains epoch by epoch."""

    def __init__(self, accelerator: Accelerator, images: ImageSet, split: Split, settings: TrainSettings) -> None:
        check_batch_size(settings.batch_size, len(split.train), accelerator.num_processes)
        # The same seed on every process: same initial weights and, in a sweep, the same ones for every rate.
        set_seed(settings.seed)
        self.accelerator, self.settings = accelerator, settings
        self.normalizer = Normalizer.fit(images.images[split.train])
        network = SmallCNN(
            channels=images.channels,
            classes=len(images.class_names),
            image_size=images.size,
            width=settings.width,
            dropout=settings.dropout,
        )
        self.parameters = sum(parameter.numel() for parameter in network.parameters())
        self.optimizer = build_optimizer(
            settings.optimizer,
            network.to(accelerator.device).parameters(),
            OptimizerSettings(lr=settings.lr, weight_decay=settings.weight_decay, seed=settings.seed),
        )
        train_loader = make_loader(images, split.train, settings.batch_size, train=True)
        validation_loader = make_loader(images, split.validation, settings.batch_size, train=False)
        self.model, self.prepared, self.train_loader, self.validation_loader = accelerator.prepare(
            network, self.optimizer, train_loader, validation_loader
        )
        self.scheduler = make_scheduler(self.optimizer, settings, settings.epochs * len(self.train_loader))
        # From here on each process draws its own dropout masks and distortions: the images it sees are others.
        process_seed = settings.seed + 1_000_003 * (accelerator.process_index + 1)
        torch.manual_seed(process_seed)
        self.augmentation = torch.Generator().manual_seed(process_seed)
        self.step_ms: list[float] = []

    def run(self, on_epoch: EpochCallback | None = None) -> TrainResult:
        """Train all epochs, or stop at the first whose loss is not finite; keep the weights of the best epoch."""
        history: list[EpochMetrics] = []
        network = self.accelerator.unwrap_model(self.model)
        best_loss, best_weights = math.inf, copy.deepcopy(network.state_dict())
        diverged = False
        for epoch in range(1, self.settings.epochs + 1):
            metrics = self._epoch(epoch)
            history.append(metrics)
            if on_epoch is not None:
                on_epoch(metrics)
            # Both losses are the same number on every process, so all of them leave or stay together.
            diverged = not (math.isfinite(metrics.train_loss) and math.isfinite(metrics.validation_loss))
            if diverged:
                break
            if metrics.validation_loss < best_loss:
                best_loss, best_weights = metrics.validation_loss, copy.deepcopy(network.state_dict())
        network.load_state_dict(best_weights)
        state_bytes = optimizer_state_bytes(self.optimizer)
        self.accelerator.free_memory()
        return TrainResult(
            settings=self.settings,
            model=network,
            normalizer=self.normalizer,
            parameters=self.parameters,
            state_bytes=state_bytes,
            optimizer_step_ms=statistics.median(self.step_ms),
            diverged=diverged,
            history=history,
        )

    def _epoch(self, epoch: int) -> EpochMetrics:
        started, first_step = time.perf_counter(), len(self.step_ms)
        lr = float(self.optimizer.param_groups[0]["lr"])  # torchao keeps it in a tensor, changed in place
        train_loss, train_accuracy = self._train_epoch()
        validation = evaluate(self.accelerator, self.model, self.validation_loader, self.normalizer)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(validation.loss)
        return EpochMetrics(
            epoch=epoch,
            lr=lr,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            validation_loss=validation.loss,
            validation_accuracy=validation.accuracy,
            optimizer_step_ms=statistics.median(self.step_ms[first_step:]),
            seconds=time.perf_counter() - started,
        )

    def _train_epoch(self) -> tuple[float, float]:
        """One pass; the mean loss and accuracy over all processes, measured while the weights move."""
        self.model.train()
        totals = torch.zeros(3, dtype=torch.float32, device=self.accelerator.device)
        for images, targets in self.train_loader:
            inputs = self.normalizer(images)
            if self.settings.augment:
                inputs = augment(inputs, self.augmentation)
            logits = self.model(inputs)
            loss = functional.cross_entropy(logits, targets)
            self.prepared.zero_grad()
            self.accelerator.backward(loss)
            self._timed_step()
            if isinstance(self.scheduler, LambdaLR):
                self.scheduler.step()
            correct = (logits.argmax(dim=1) == targets).sum()
            totals += torch.stack([loss.detach() * len(targets), correct.float(), correct.new_tensor(len(targets))])
        loss_sum, correct_sum, count = self.accelerator.reduce(totals, reduction="sum").tolist()
        return loss_sum / count, correct_sum / count

    def _timed_step(self) -> None:
        self._wait_for_device()
        started = time.perf_counter()
        self.prepared.step()
        self._wait_for_device()
        self.step_ms.append((time.perf_counter() - started) * 1e3)

    def _wait_for_device(self) -> None:
        # Work on an accelerator is queued: without waiting, the clock would see only the queueing.
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
