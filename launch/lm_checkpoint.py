"""Checkpoints of a language-model run: accelerate's own state and a marker that says whose they are."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate.utils import broadcast_object_list
from lm_job import Job
from lm_settings import IMMATERIAL
from reporting import write_json
from safetensors import SafetensorError

# Written last, so a folder without it is a checkpoint that was interrupted.
CHECKPOINT_MARKER = "training.json"
CHECKPOINT_NAME = re.compile(r"step-\d+")
# What the windows of a step are the product of.
SHARES = ("batch_size", "gradient_accumulation_steps", "world_size")


class NothingLeftError(ValueError):
    """A checkpoint is at the last step of its run."""


def save_checkpoint(job: Job, checkpoint_dir: Path) -> None:
    """Write a folder step-NNNNNN; the marker comes last, when every rank has written its part."""
    folder = checkpoint_dir / f"step-{job.progress.step:06d}"
    if job.accelerator.is_main_process:
        (folder / CHECKPOINT_MARKER).unlink(missing_ok=True)
    job.accelerator.wait_for_everyone()
    job.accelerator.save_state(str(folder))
    job.accelerator.wait_for_everyone()
    if job.accelerator.is_main_process:
        write_json(folder / CHECKPOINT_MARKER, {"step": job.progress.step, "run": run_identity(job)})


def resume(job: Job) -> None:
    """Go on from the checkpoint that the settings ask for; the main process says to all of them which one that is.

    Raises:
        NothingLeftError: its run is finished.
        ValueError: there is none, or it cannot be gone on from.
    """
    said: list[Any] = [None, None]
    if job.accelerator.is_main_process:
        try:
            said[0] = _asked_for(job)
        except ValueError as error:
            said[1] = str(error)
    broadcast_object_list(said)
    folder, refusal = said
    if refusal is not None:
        raise ValueError(refusal)
    if folder is not None:
        load_checkpoint(job, folder)


def _asked_for(job: Job) -> Path | None:
    """The checkpoint to go on from; None where the latest one was asked for and there is none."""
    settings = job.settings
    if settings.resume is not None:
        return find_checkpoint(settings.resume)
    assert settings.checkpoint_dir is not None
    for folder in _checkpoints(settings.checkpoint_dir):
        if not (folder / CHECKPOINT_MARKER).is_file():
            job.accelerator.print(f"--resume-latest: passing over {folder}, the saving of which was interrupted")
    complete = complete_checkpoints(settings.checkpoint_dir)
    if not complete:
        job.accelerator.print(f"--resume-latest: no checkpoint in {settings.checkpoint_dir}, starting at step 0")
        return None
    return complete[-1]


def load_checkpoint(job: Job, folder: Path) -> None:
    """Restore a checkpoint of the same run. What does not match is said before anything is loaded."""
    saved = json.loads((folder / CHECKPOINT_MARKER).read_text(encoding="utf-8"))
    check_identity(saved["run"], job, folder)
    if saved["step"] >= job.settings.steps:
        raise NothingLeftError(
            f"the checkpoint {folder} is at step {saved['step']} of {job.settings.steps}: nothing left"
        )
    try:
        job.accelerator.load_state(str(folder))
    except (RuntimeError, EOFError, OSError, UnpicklingError, SafetensorError) as error:
        # What torch and safetensors say of a damaged file does not name it.
        raise ValueError(f"the checkpoint {folder} cannot be read: {type(error).__name__}: {error}") from error
    there, here = saved["run"]["world_size"], job.accelerator.num_processes
    others = "" if there == here else f", which {there} processes saved, with {here}"
    job.accelerator.print(f"resumed from {folder}{others} at step {job.progress.step}")


def check_identity(saved: dict[str, Any], job: Job, folder: Path) -> None:
    """Refuse a checkpoint that another run has saved.

    With a total batch size any number of processes reads the same windows in a step, so that batches alone are compared
    then: of so many windows, whoever reads them. Sums over them are taken in another order.
    """
    wanted = run_identity(job)
    if job.settings.total_batch_size is not None:
        saved, wanted = with_total_batch(saved), with_total_batch(wanted)
    different = [
        f"{name}: {saved.get(name)!r} there, {wanted.get(name)!r} here"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if different:
        hint = "; --total-batch-size lets any number of processes go on" if "world_size" in different[-1] else ""
        raise ValueError(f"the checkpoint {folder} belongs to another run ({'; '.join(different)}){hint}")


def with_total_batch(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity with the windows of a step in place of what they are shared out by."""
    rest = {name: value for name, value in identity.items() if name not in SHARES}
    return {**rest, "total_batch_size": math.prod(identity[name] for name in SHARES)}


def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the latest complete one in a folder of checkpoints."""
    if (path / CHECKPOINT_MARKER).is_file():
        return path
    complete = complete_checkpoints(path)
    if not complete:
        raise ValueError(
            f"--resume {path}: neither a complete checkpoint nor a folder with one (step-*/{CHECKPOINT_MARKER})"
        )
    return complete[-1]


def complete_checkpoints(checkpoint_dir: Path) -> list[Path]:
    """The checkpoints in a folder whose saving came to its end, by their steps."""
    folders = [folder for folder in _checkpoints(checkpoint_dir) if (folder / CHECKPOINT_MARKER).is_file()]
    # By number: past a million steps the names no longer sort as text.
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")))


def _checkpoints(checkpoint_dir: Path) -> list[Path]:
    """Those that were begun."""
    return sorted(folder for folder in checkpoint_dir.glob("step-*") if CHECKPOINT_NAME.fullmatch(folder.name))


def run_identity(job: Job) -> dict[str, Any]:
    """What must agree for a checkpoint to continue a run: settings, world size and the text itself."""
    identity = {name: value for name, value in job.settings.as_json().items() if name not in IMMATERIAL}
    identity["precision"] = job.accelerator.mixed_precision
    identity["world_size"] = job.accelerator.num_processes
    identity["text"] = job.corpus.digest()
    return identity
