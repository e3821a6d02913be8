"""What the quickstart shows: the same language model trained with torch's AdamW and with AdamW8bit, in two processes.

    python -m benchmarks.bench_quickstart [--quick]

Runs launch/quickstart.sh as it is (--quick: 20 steps) and keeps the summaries of both runs, their table and picture.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import harness

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "quickstart"
QUICK_STEPS = 20


def main(
    quick: Annotated[bool, typer.Option(help="A few steps, to see that everything works.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the JSON, Markdown and PNG files.")] = harness.RESULTS,
) -> None:
    """Run the quickstart and keep what it left."""
    arguments = ["--steps", str(QUICK_STEPS)] if quick else []
    subprocess.run(["bash", "launch/quickstart.sh", *arguments], cwd=ROOT, check=True)
    runs: dict[str, Any] = {}
    for name in ("torch", "adamw8bit"):
        runs[name] = json.loads((RUNS / name / "summary.json").read_text())
    page = (RUNS / "comparison.md").read_text()
    path = harness.write_results("quickstart", {"quick": quick, "runs": runs}, page, output)
    shutil.copyfile(RUNS / "comparison.png", path.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
