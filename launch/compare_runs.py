"""Put several runs of train_lm.py side by side: `python launch/compare_runs.py DIR DIR ... --output-dir DIR`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from lm_settings import IMMATERIAL
from plots import draw_comparison
from reporting import METRICS_FILE, SUMMARY_FILE, read_metrics, summary_rows
from rich.console import Console
from rich.table import Table

app = typer.Typer(add_completion=False)

TABLE_FILE = "comparison.md"
PICTURE_FILE = "comparison.png"
# What runs are compared on; every other setting should be the same in all of them.
COMPARED = frozenset({"optimizer"})

READING_NOTE = (
    "Losses are in nats a byte; the training loss is the mean over the last tenth of the logged steps. "
    "State is measured from the tensors the optimizer holds; a sharded one is shared out over the ranks, which changes "
    "no bit of the result."
)

Run = tuple[dict[str, Any], list[dict[str, Any]]]


@app.command()
def main(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of finished runs.")],
    output_dir: Annotated[Path, typer.Option(help="Where comparison.md and comparison.png go.")],
) -> None:
    """Print a table of the runs, write it as Markdown, and draw their curves and state memory."""
    try:
        compare(runs, output_dir)
    except ValueError as error:
        typer.echo(f"compare_runs.py: {error}", err=True)
        raise typer.Exit(2) from error


def compare(folders: Sequence[Path], output_dir: Path) -> None:
    """The whole comparison."""
    loaded = [load_run(folder) for folder in folders]
    labels = run_labels(folders, [summary for summary, _ in loaded])
    differences = differing_settings([summary for summary, _ in loaded])
    rows = comparison_rows([summary for summary, _ in loaded])
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / TABLE_FILE).write_text(markdown(labels, rows, loaded[0][0], differences), encoding="utf-8")
    draw_comparison(output_dir / PICTURE_FILE, labels, loaded)
    console = Console()
    console.print(terminal_table(labels, rows))
    for difference in differences:
        console.print(f"The runs differ in more than the optimizer: {difference}", style="yellow")


def load_run(folder: Path) -> Run:
    """Summary and metrics of a finished run."""
    for name in (SUMMARY_FILE, METRICS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not the folder of a finished run: {name} is missing")
    summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    return summary, read_metrics(folder / METRICS_FILE)


def run_labels(folders: Sequence[Path], summaries: Sequence[dict[str, Any]]) -> list[str]:
    """The optimizer's name and whether it was sharded or offloaded; the folder's name too, where two have the same."""
    ways = {"shard": " sharded", "offload": " offloaded"}
    names = [
        summary["optimizer"] + "".join(word for way, word in ways.items() if summary["settings"].get(way))
        for summary in summaries
    ]
    return [
        name if names.count(name) == 1 else f"{name} ({folder.resolve().name})"
        for name, folder in zip(names, folders, strict=True)
    ]


def differing_settings(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """Whatever besides the optimizer was not the same in all runs: such runs are not a comparison of optimizers."""
    found = []
    conditions = [_conditions(summary) for summary in summaries]
    for name in sorted({name for condition in conditions for name in condition}):
        values = [condition.get(name) for condition in conditions]
        if any(value != values[0] for value in values):
            found.append(f"{name}: {', '.join(str(value) for value in values)}")
    return found


def _conditions(summary: dict[str, Any]) -> dict[str, Any]:
    settings = {k: v for k, v in summary["settings"].items() if k not in COMPARED and k not in IMMATERIAL}
    surroundings = {name: summary["machine"][name] for name in ("device", "threads_per_process", "torch")}
    # The precision that was used, whether an option or the launcher chose it.
    settings["precision"] = summary["precision"]
    return settings | surroundings | {"world_size": summary["world_size"], "text": summary["text"]["digest"]}


def comparison_rows(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each figure, a value for each run."""
    figures = [summary_rows(summary) for summary in summaries]
    return [(rows[0][0], *(value for _, value in rows)) for rows in zip(*figures, strict=True)]


def terminal_table(labels: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(title="Comparison of runs", title_justify="left")
    table.add_column("figure", overflow="fold")
    for label in labels:
        table.add_column(label, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(
    labels: Sequence[str], rows: Sequence[tuple[str, ...]], first: dict[str, Any], differences: Sequence[str]
) -> str:
    """The table with what one needs to read it: model, data, machine, and every difference between the runs."""
    lines = [
        "# Comparison of runs",
        "",
        "| " + " | ".join(("figure", *labels)) + " |",
        "|---|" + "---:|" * len(labels),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        READING_NOTE,
        "",
        _conditions_line(first),
    ]
    if differences:
        lines += ["", "**These runs differ in more than the optimizer:** " + "; ".join(differences) + "."]
    return "\n".join(lines) + "\n"


def _conditions_line(summary: dict[str, Any]) -> str:
    settings, machine, text = summary["settings"], summary["machine"], summary["text"]
    tokens_a_step = summary["tokens"] // summary["steps"]
    return (
        f"Llama with {summary['parameters']:,} parameters, {summary['steps']} steps of {tokens_a_step:,} bytes, "
        f"peak lr {settings['lr']:g}, seed {settings['seed']}, text of {text['train_bytes'] / 1e6:.1f} MB in "
        f"{text['train_files']} files ({text['validation_files']} more held out); world size {summary['world_size']} "
        f"on {machine['device']}, {machine['threads_per_process']} threads a process, torch {machine['torch']}, "
        f"{machine['platform']}."
    )


if __name__ == "__main__":
    app()
