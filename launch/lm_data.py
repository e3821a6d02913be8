"""Text for the language-model job: which files, which of them are held out, which windows a rank sees at a step.

Tokens are the bytes themselves (a vocabulary of 256), so nothing is downloaded and nothing is trained beforehand.
A zero byte separates two files; files that contain one are not text and are left out.

The order of the data is a pure function of (seed, position), and the position a pure function of
(step, micro-batch, rank, row). So two runs with the same seed see the same windows whatever optimizer they use,
and a resumed run needs nothing but the number of its step.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

VOCABULARY_SIZE = 256
SEPARATOR = b"\0"
# Folders that hold no sources of the text itself: installed packages, caches, version control.
IGNORED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "node_modules"})

ByteArray: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint8]]


@dataclass(frozen=True)
class Corpus:
    """Two byte streams made of different files, and the names of the files in each."""

    train: ByteArray
    validation: ByteArray
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]

    def digest(self) -> str:
        """Tells whether two runs, wherever their text lies, were given the same text and the same split."""
        return hashlib.sha256(self.train.tobytes() + SEPARATOR + self.validation.tobytes()).hexdigest()[:16]


def standard_library_files() -> list[Path]:
    """The sources of the running Python's standard library: some 30 MB of text that every machine already has."""
    root = Path(sysconfig.get_path("stdlib"))
    return _files_under(root, "*.py")


def find_text_files(data: Sequence[Path]) -> list[Path]:
    """Expand files and folders into a sorted list of files; without any, the standard library's sources."""
    if not data:
        return standard_library_files()
    found: set[Path] = set()
    for path in data:
        if path.is_file():
            found.add(path)
        elif path.is_dir():
            found.update(_files_under(path, "*"))
        else:
            raise ValueError(f"--data {path} does not exist; give files or folders of text")
    return sorted(found, key=lambda path: path.as_posix())


def load_corpus(data: Sequence[Path], validation_every: int = 20) -> Corpus:
    """Read the files and hold every `validation_every`-th one out. A single file is split near its end instead."""
    if validation_every < 2:
        raise ValueError(f"validation_every must be at least 2, got {validation_every}")
    texts = [
        (path, content) for path in find_text_files(data) if (content := path.read_bytes()) and b"\0" not in content
    ]
    if not texts:
        given = ", ".join(str(path) for path in data) or "the standard library's folder"
        raise ValueError(f"no text files in {given}; a text file is not empty and holds no zero byte")
    if len(texts) == 1:
        return _split_one_file(*texts[0], validation_every)
    held_out = {index for index in range(len(texts)) if index % validation_every == validation_every - 1}
    held_out = held_out or {len(texts) - 1}
    train = [text for index, text in enumerate(texts) if index not in held_out]
    validation = [text for index, text in enumerate(texts) if index in held_out]
    return Corpus(
        train=_join([content for _, content in train]),
        validation=_join([content for _, content in validation]),
        train_files=tuple(path.as_posix() for path, _ in train),
        validation_files=tuple(path.as_posix() for path, _ in validation),
    )


class WindowSampler:
    """Windows of a byte stream in a shuffled order, dealt out to the ranks like cards.

    An epoch cuts the stream into windows of `sequence_length` bytes, starting at an offset drawn for that epoch,
    and shuffles them. The ranks take turns along that order, so within an epoch no two ranks, steps or rows
    read the same window, and one process with twice the batch reads what two processes read.
    """

    def __init__(self, stream: ByteArray, sequence_length: int, batch_size: int, rank: int, world_size: int, seed: int):
        if len(stream) < 2 * sequence_length + 1:
            raise ValueError(
                f"the training text has {len(stream)} bytes, windows of {sequence_length} bytes need "
                f"at least {2 * sequence_length + 1}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..{world_size - 1}, got {rank}")
        self.stream = stream
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        # One offset fewer than the window is long, so that every epoch has the same number of windows.
        self.windows_per_epoch = (len(stream) - sequence_length) // sequence_length
        # A batch spans at most a few epochs of a tiny text and nearly always one: two orders are worth keeping.
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def _draw_order(self, epoch: int) -> tuple[int, np.ndarray[tuple[int], np.dtype[np.int64]]]:
        generator = np.random.default_rng((self.seed, epoch))
        offset = int(generator.integers(self.sequence_length))
        return offset, generator.permutation(self.windows_per_epoch)

    def starts(self, micro_step: int) -> list[int]:
        """Where this rank's windows begin in the stream, at the micro_step-th forward pass of the run."""
        first = (micro_step * self.world_size + self.rank) * self.batch_size
        begins = []
        for position in range(first, first + self.batch_size):
            epoch, index = divmod(position, self.windows_per_epoch)
            offset, order = self._order(epoch)
            begins.append(offset + int(order[index]) * self.sequence_length)
        return begins

    def batch(self, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (the inputs one byte later), each (batch_size, sequence_length)."""
        return cut_windows(self.stream, self.starts(micro_step), self.sequence_length)


def validation_starts(stream: ByteArray, sequence_length: int, windows: int) -> list[int]:
    """Starts of evenly spaced windows of the held-out text, without overlap; fewer where the text is short."""
    available = (len(stream) - 1) // sequence_length
    if available < 1:
        raise ValueError(
            f"the held-out text has {len(stream)} bytes, one window needs {sequence_length + 1}; "
            "give more text or a shorter --seq-len"
        )
    count = min(windows, available)
    return [(index * available // count) * sequence_length for index in range(count)]


def cut_windows(stream: ByteArray, starts: Sequence[int], sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy windows out of the stream; targets are the inputs one byte later."""
    rows = np.stack([stream[start : start + sequence_length + 1] for start in starts])
    tokens = torch.from_numpy(rows.astype(np.int64))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _files_under(root: Path, pattern: str) -> list[Path]:
    """Files below a folder in a fixed order, without hidden ones and without other people's packages."""
    files = []
    for path in root.rglob(pattern):
        parts = path.relative_to(root).parts
        ignored = any(part in IGNORED_FOLDERS or part.startswith(".") for part in parts)
        if path.is_file() and not ignored:
            files.append(path)
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _split_one_file(path: Path, content: bytes, validation_every: int) -> Corpus:
    cut = len(content) - len(content) // validation_every
    name = path.as_posix()
    return Corpus(
        train=_join([content[:cut]]),
        validation=_join([content[cut:]]),
        train_files=(f"{name} (first {cut} bytes)",),
        validation_files=(f"{name} (last {len(content) - cut} bytes)",),
    )


def _join(contents: Sequence[bytes]) -> ByteArray:
    return np.frombuffer(SEPARATOR.join(contents), dtype=np.uint8)
