"""The training tasks of the parity benchmark: each is a function of a seed and an optimizer factory.

A seed fixes the initial weights, the order of the data and the dropout masks, so two runs with one seed differ in
nothing but the optimizer. All parameters form one group: no embedding and no norm is exempted by hand.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import harness

OptimizerFactory = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]


@dataclass
class Outcome:
    """Validation loss along a run; the last one counts. Infinite where the run diverged."""

    final: float
    curve: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """What one training run needs: a fresh model, batches, a training loss and a validation loss."""

    lr: float
    steps: int
    model: Callable[[], nn.Module]
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]]
    loss: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]
    validation: tuple[tuple[Tensor, Tensor], ...]


def train(task: Task, seed: int, make_optimizer: OptimizerFactory, evaluations: int = 6) -> Outcome:
    """Warm up over a twentieth of the steps, then a cosine down to a tenth of the learning rate."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = make_optimizer(model.parameters(), task.lr)
    warmup = max(1, task.steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / task.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    outcome = Outcome(math.inf)
    for step, batch in enumerate(task.batches(seed), start=1):
        model.train()
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        if not math.isfinite(loss.item()):
            outcome.curve.append((step, math.inf))
            return outcome
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, task.steps // evaluations) == 0 or step == task.steps:
            outcome.curve.append((step, validate(task, model)))
    outcome.final = outcome.curve[-1][1]
    return outcome


@torch.no_grad()
def validate(task: Task, model: nn.Module) -> float:
    model.eval()
    value = sum(task.loss(model, batch).item() for batch in task.validation) / len(task.validation)
    return value if math.isfinite(value) else math.inf


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits = model(batch[0])
    return functional.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def llama_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits = model(input_ids=batch[0]).logits
    return functional.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def byte_language_model(quick: bool) -> Task:
    """A small Llama on the bytes of the standard library's sources; validation files are never trained on."""
    from launch.lm_data import WindowSampler, cut_windows, load_corpus, validation_starts

    length, steps = 64, 40 if quick else 300
    corpus = load_corpus([])
    starts = validation_starts(corpus.validation, length, 256)
    validation = tuple(cut_windows(corpus.validation, starts[i : i + 64], length) for i in range(0, len(starts), 64))

    def batches(seed: int) -> Iterable[tuple[Tensor, Tensor]]:
        sampler = WindowSampler(corpus.train, length, 16, 0, 1, seed)
        return (sampler.batch(step) for step in range(steps))

    return Task(2e-3, steps, lambda: harness.build_byte_llama(96, 2, length), batches, llama_loss, validation)


class WordModel(nn.Module):
    """Next word from the four before it: an embedding whose rows are used as rarely as Zipf's law says."""

    context = 4

    def __init__(self, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.body = nn.Sequential(
            nn.Linear(self.context * width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, words: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.embedding(words).flatten(1)))
        return logits


def word_language_model(quick: bool) -> Task:
    """Words of the standard library's sources, one of 8,192; most rows of the embedding get a gradient rarely."""
    vocabulary, batch, steps = 8192, 128, 60 if quick else 300
    words = re.findall(
        r"\w+|[^\w\s]", harness.standard_library_text(6 << 20).numpy().tobytes().decode("utf-8", "replace")
    )
    known = {word: i for i, (word, _) in enumerate(Counter(words).most_common(vocabulary - 1))}
    ids = torch.tensor([known.get(word, vocabulary - 1) for word in words])
    windows = ids.unfold(0, WordModel.context + 1, 1)
    cut = len(windows) * 19 // 20
    held_out = windows[cut + WordModel.context :][:: max(1, (len(windows) - cut) // 4096)]

    def batches(seed: int) -> Iterable[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            rows = windows[torch.randint(0, cut, (batch,), generator=generator)]
            yield rows[:, :-1], rows[:, -1]

    validation = tuple((rows[:, :-1], rows[:, -1]) for rows in held_out.split(512))
    return Task(2e-3, steps, lambda: WordModel(vocabulary), batches, cross_entropy, validation)


def images(name: str, epochs: int) -> Task:
    """The image job's network and data; the split is fixed, so that the seeds differ in training alone."""
    from launch.image_data import Normalizer, load_images, stratified_split
    from launch.image_model import SmallCNN

    data = load_images(name)
    split = stratified_split(data, validation=0.2, test=0.1, seed=0)
    normalizer = Normalizer.fit(data.images[split.train])
    inputs, labels = normalizer(data.images[split.train]), data.labels[split.train]
    batch = 64
    per_epoch = len(labels) // batch

    def batches(seed: int) -> Iterable[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(labels), generator=generator)[: per_epoch * batch]
            for rows in order.split(batch):
                yield inputs[rows], labels[rows]

    def model() -> nn.Module:
        return SmallCNN(
            channels=data.channels, classes=len(data.class_names), image_size=data.size, width=16, dropout=0.2
        )

    held_out = (normalizer(data.images[split.validation]), data.labels[split.validation])
    return Task(2e-3, epochs * per_epoch, model, batches, cross_entropy, (held_out,))


TASKS: dict[str, Callable[[bool], Task]] = {
    "bytes": byte_language_model,
    "words": word_language_model,
    "digits": lambda quick: images("digits", 2 if quick else 8),
    "mnist5k": lambda quick: images("mnist5k", 1 if quick else 3),
}
