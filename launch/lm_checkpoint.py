"""Checkpoints of a language-model run: accelerate's own state and a marker that says whose they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm_job import Job

# Written last, so a folder without it is a checkpoint that was interrupted.
CHECKPOINT_MARKER = "training.json"
# Settings that a resumed run may change; any other difference would not continue the same run.
FREE_ON_RESUME = frozenset(
    {
        "output_dir",
        "log_every",
        "eval_every",
        "checkpoint_dir",
        "checkpoint_every",
        "resume",
        # Compared by what they lead to: the text itself, the world size, the precision in use.
        "data",
        "expect_world_size",
        "precision",
    }
)


def save_checkpoint(job: Job, checkpoint_dir: Path) -> None:
    """Write a folder step-NNNNNN; the marker comes last, when every rank has written its part."""
    folder = checkpoint_dir / f"step-{job.progress.step:06d}"
    if job.accelerator.is_main_process:
        (folder / CHECKPOINT_MARKER).unlink(missing_ok=True)
    job.accelerator.wait_for_everyone()
    job.accelerator.save_state(str(folder))
    job.accelerator.wait_for_everyone()
    if job.accelerator.is_main_process:
        marker = {"step": job.progress.step, "run": run_identity(job)}
        (folder / CHECKPOINT_MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


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
    job.accelerator.load_state(str(folder))
    if job.progress.step >= job.settings.steps:
        raise ValueError(
            f"the checkpoint {folder} is at step {job.progress.step} of {job.settings.steps}: nothing left"
        )
    job.accelerator.print(f"resumed from {folder} at step {job.progress.step}")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the latest complete one in a folder of checkpoints."""
    if (path / CHECKPOINT_MARKER).is_file():
        return path
    complete = sorted(marker.parent for marker in path.glob(f"step-*/{CHECKPOINT_MARKER}"))
    if not complete:
        raise ValueError(
            f"--resume {path}: neither a complete checkpoint nor a folder with one (step-*/{CHECKPOINT_MARKER})"
        )
    return complete[-1]


def run_identity(job: Job) -> dict[str, Any]:
    """What must agree for a checkpoint to continue a run: settings, world size and the text itself."""
    identity = {name: value for name, value in job.settings.as_json().items() if name not in FREE_ON_RESUME}
    identity["precision"] = job.accelerator.mixed_precision
    identity["world_size"] = job.accelerator.num_processes
    identity["text"] = job.corpus.digest()
    return identity
