"""Checkpoints of a language-model run: accelerate's own state and a marker that says whose they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from lm_job import Job
from lm_settings import IMMATERIAL
from reporting import write_json
from safetensors import SafetensorError

# Written last, so a folder without it is a checkpoint that was interrupted.
CHECKPOINT_MARKER = "training.json"
CHECKPOINT_NAME = re.compile(r"step-(\d+)")


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


def load_checkpoint(job: Job, path: Path) -> None:
    """Restore a checkpoint of the same run. What does not match is said before anything is loaded."""
    folder = find_checkpoint(path)
    saved = json.loads((folder / CHECKPOINT_MARKER).read_text(encoding="utf-8"))["run"]
    wanted = run_identity(job)
    different = [
        f"{name}: {saved.get(name)!r} there, {wanted.get(name)!r} here"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if different:
        raise ValueError(f"the checkpoint {folder} belongs to another run ({'; '.join(different)})")
    try:
        job.accelerator.load_state(str(folder))
    except (RuntimeError, EOFError, OSError, UnpicklingError, SafetensorError) as error:
        # What torch and safetensors say of a damaged file does not name it.
        raise ValueError(f"the checkpoint {folder} cannot be read: {type(error).__name__}: {error}") from error
    if job.progress.step >= job.settings.steps:
        raise ValueError(
            f"the checkpoint {folder} is at step {job.progress.step} of {job.settings.steps}: nothing left"
        )
    job.accelerator.print(f"resumed from {folder} at step {job.progress.step}")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the latest complete one in a folder of checkpoints."""
    if (path / CHECKPOINT_MARKER).is_file():
        return path
    complete = [
        (int(name[1]), marker.parent)
        for marker in path.glob(f"step-*/{CHECKPOINT_MARKER}")
        if (name := CHECKPOINT_NAME.fullmatch(marker.parent.name))
    ]
    if not complete:
        raise ValueError(
            f"--resume {path}: neither a complete checkpoint nor a folder with one (step-*/{CHECKPOINT_MARKER})"
        )
    # By number: past a million steps the names no longer sort as text.
    return max(complete)[1]


def run_identity(job: Job) -> dict[str, Any]:
    """What must agree for a checkpoint to continue a run: settings, world size and the text itself."""
    identity = {name: value for name, value in job.settings.as_json().items() if name not in IMMATERIAL}
    identity["precision"] = job.accelerator.mixed_precision
    identity["world_size"] = job.accelerator.num_processes
    identity["text"] = job.corpus.digest()
    return identity
