"""Windows of a byte stream as a data set with the columns that transformers' Trainer hands to a language model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from lm_data import ByteArray
from torch.utils.data import Dataset


class ByteWindows(Dataset[dict[str, torch.Tensor]]):
    """Windows that begin at given places; a model for causal language modelling shifts the labels itself."""

    def __init__(self, stream: ByteArray, starts: Sequence[int], sequence_length: int) -> None:
        self.stream = stream
        self.starts = starts
        self.sequence_length = sequence_length

    @classmethod
    def of(cls, stream: ByteArray, sequence_length: int) -> ByteWindows:
        """All windows of a stream, without overlap.

        Raises:
            ValueError: it is shorter than one window.
        """
        starts = range(0, len(stream) - sequence_length + 1, sequence_length)
        if not starts:
            raise ValueError(f"the training text has {len(stream)} bytes, a window needs {sequence_length}")
        return cls(stream, starts, sequence_length)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = self.starts[index]
        tokens = torch.from_numpy(self.stream[start : start + self.sequence_length].astype(np.int64))
        return {"input_ids": tokens, "labels": tokens}
