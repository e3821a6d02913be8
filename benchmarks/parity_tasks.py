"""The training tasks of the benchmarks of final losses: each is a function of a seed and an optimizer factory.

A seed fixes the initial weights, the order of the data and the dropout masks, so two runs with one seed differ in
nothing but the optimizer. All parameters form one group: no embedding and no norm is exempted by hand. Losses are
computed in float32 from the logits, whatever the model's dtype.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

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
    return functional.cross_entropy(logits.flatten(0, -2).float(), batch[1].flatten())


def llama_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits = model(input_ids=batch[0]).logits
    return functional.cross_entropy(logits.flatten(0, -2).float(), batch[1].flatten())


def byte_windows(sources: Sequence[Path], lr: float, steps: int, length: int = 64) -> Task:
    """A small Llama on the bytes of a text; validation files are never trained on. No sources: the standard library."""
    from launch.lm_data import WindowSampler, cut_windows, load_corpus, validation_starts

    corpus = load_corpus(sources)
    starts = validation_starts(corpus.validation, length, 256)
    validation = tuple(cut_windows(corpus.validation, starts[i : i + 64], length) for i in range(0, len(starts), 64))

    def batches(seed: int) -> Iterable[tuple[Tensor, Tensor]]:
        sampler = WindowSampler(corpus.train, length, 16, 0, 1, seed)
        return (sampler.batch(step) for step in range(steps))

    return Task(lr, steps, lambda: harness.build_byte_llama(96, 2, length), batches, llama_loss, validation)


def byte_language_model(quick: bool) -> Task:
    return byte_windows([], 2e-3, 40 if quick else 300)


VOCABULARY = 8192
WORD_TEXT = 6 << 20
"""Bytes of text that words are taken from."""


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


def words_of(text: bytes) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.decode("utf-8", "replace"))


def vocabulary_of(*texts: Sequence[str]) -> dict[str, int]:
    """The most frequent words; the last index is left for all others."""
    counts = Counter(word for text in texts for word in text)
    return {word: i for i, (word, _) in enumerate(counts.most_common(VOCABULARY - 1))}


def word_windows(words: Sequence[str], known: Mapping[str, int], lr: float, steps: int, batch: int = 128) -> Task:
    """The next word of a text, the last twentieth of which is held out."""
    ids = torch.tensor([known.get(word, VOCABULARY - 1) for word in words])
    windows = ids.unfold(0, WordModel.context + 1, 1)
    cut = len(windows) * 19 // 20
    held_out = windows[cut + WordModel.context :][:: max(1, (len(windows) - cut) // 4096)]

    def batches(seed: int) -> Iterable[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            rows = windows[torch.randint(0, cut, (batch,), generator=generator)]
            yield rows[:, :-1], rows[:, -1]

    validation = tuple((rows[:, :-1], rows[:, -1]) for rows in held_out.split(512))
    return Task(lr, steps, lambda: WordModel(VOCABULARY), batches, cross_entropy, validation)


def word_language_model(quick: bool) -> Task:
    """Words of the standard library's sources, one of 8,192; most rows of the embedding get a gradient rarely."""
    words = words_of(harness.standard_library_text(WORD_TEXT).numpy().tobytes())
    return word_windows(words, vocabulary_of(words), 2e-3, 60 if quick else 300)


def images(
    name: str, epochs: int, lr: float = 2e-3, size: int | None = None, dtype: torch.dtype = torch.float32
) -> Task:
    """The image job's network and data; the split is fixed, so that the seeds differ in training alone.

    With ``size`` images are enlarged to it first; ``dtype`` is that of the model's inputs.
    """
    from launch.image_data import Normalizer, load_images, stratified_split
    from launch.image_model import SmallCNN

    data = load_images(name)
    if size is not None:
        enlarged = functional.interpolate(data.images.float(), size=size, mode="bilinear")
        data = replace(data, images=enlarged.round().to(torch.uint8))
    split = stratified_split(data, validation=0.2, test=0.1, seed=0)
    normalizer = Normalizer.fit(data.images[split.train])
    inputs, labels = normalizer(data.images[split.train]).to(dtype), data.labels[split.train]
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

    held_out = (normalizer(data.images[split.validation]).to(dtype), data.labels[split.validation])
    return Task(lr, epochs * per_epoch, model, batches, cross_entropy, (held_out,))


TASKS: dict[str, Callable[[bool], Task]] = {
    "bytes": byte_language_model,
    "words": word_language_model,
    "digits": lambda quick: images("digits", 2 if quick else 8),
    "mnist5k": lambda quick: images("mnist5k", 1 if quick else 3),
}
