"""The small convolutional network of the classification job and its augmentation."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


class SmallCNN(nn.Module):
    """Convolution stages down to about 4 x 4, then two linear layers.

    GroupNorm instead of BatchNorm: its result for an image does not depend on which other images share the
    batch, so that a run on two processes computes what a run on one computes.
    """

    def __init__(self, *, channels: int, classes: int, image_size: int, width: int, dropout: float) -> None:
        super().__init__()
        assert width > 0
        assert width % 8 == 0, width
        # Large images are halved right after the first convolution: the wide ones then cost a quarter.
        blocks: list[nn.Module] = [*_stage(channels, width, pool=image_size >= 16)]
        side = image_size // 2 if image_size >= 16 else image_size
        planes = width
        for _ in range(max(2, int(math.log2(max(side, 4) / 4)))):
            wider = min(2 * planes, 4 * width)
            pool = side >= 4
            blocks += _stage(planes, wider, pool=pool)
            planes, side = wider, side // 2 if pool else side
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(planes * 4, 4 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.pool(self.features(images)))
        return logits


def _stage(inputs: int, outputs: int, *, pool: bool) -> list[nn.Module]:
    # No bias: GroupNorm's own shift follows at once.
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.GroupNorm(8, outputs),
        nn.ReLU(),
    ]
    return [*layers, nn.MaxPool2d(2)] if pool else layers


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotate by up to 10 degrees, shift by up to 8 % of the side and scale by up to 8 %, each image on its own.

    No mirroring: a mirrored digit or letter is another class. The draws come from a CPU generator, so they are
    the same on every device.
    """
    draws = torch.rand(4, images.shape[0], generator=generator) * 2.0 - 1.0
    angle, scale = draws[0] * math.radians(10.0), 1.0 + 0.08 * draws[1]
    shift = 0.16 * draws[2:]  # affine_grid counts the side as 2
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = (torch.stack([cosine, -sine, shift[0]], dim=1), torch.stack([sine, cosine, shift[1]], dim=1))
    transform = torch.stack(rows, dim=1).to(images.device, images.dtype)
    grid = functional.affine_grid(transform, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
