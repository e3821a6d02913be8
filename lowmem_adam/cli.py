"""The command line, ``lowmem-adam``: what a step runs on and takes, what configs and models do, checkpoint files."""

from __future__ import annotations

from typing import Annotated

try:
    import rich  # noqa: F401
    import typer
except ImportError as error:
    raise SystemExit(f"lowmem-adam: {error}; the command line needs: pip install 'lowmem-adam[cli]'") from error

from lowmem_adam.commands import info as about
from lowmem_adam.commands.check_config import check_config
from lowmem_adam.commands.convert import convert
from lowmem_adam.commands.outcome import Commands, epilog
from lowmem_adam.commands.plan import plan
from lowmem_adam.commands.profile import profile
from lowmem_adam.commands.verify import verify

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    epilog=epilog(),
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

BEFORE, DURING, FILES = "Before a run", "During a run", "Checkpoint files"


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=about.version)
    ] = False,
) -> None:
    """Adam for models whose optimizer state does not fit.

    Each command answers one question; COMMAND --help says more, with examples.
    """


app.command(
    short_help="What do steps on this machine run on?",
    rich_help_panel=BEFORE,
    epilog=epilog("lowmem-adam info", "lowmem-adam info --json"),
)(about.info)
app.command(
    short_help="Does my model fit, and what is the cheapest setting that does?",
    rich_help_panel=BEFORE,
    epilog=epilog(
        "lowmem-adam plan Llama-3.1-8B/config.json --fits 80",
        "lowmem-adam plan --parameters 8B --world-size 4 --fits 40",
        "lowmem-adam plan --shape 50257x768 --shape 12*768x3072 --moments 32bit --json",
    ),
)(plan)
app.command(
    short_help="Would this DeepSpeed config step with our optimizer?",
    rich_help_panel=BEFORE,
    epilog=epilog("lowmem-adam check-config ds_config.json", "lowmem-adam check-config ds.json --client-optimizer"),
)(check_config)
app.command(
    short_help="How long does a step take, for what, and how many bytes?",
    rich_help_panel=DURING,
    epilog=epilog(
        "lowmem-adam profile --hidden-size 512 --layers 8 --compare",
        'lowmem-adam profile --shapes "4096x4096,4096" --dtype bfloat16 --json',
        "lowmem-adam profile --offload cpu --output-dir runs/profile",
    ),
)(profile)
app.command(
    short_help="How does another optimizer load this checkpoint?",
    rich_help_panel=FILES,
    epilog=epilog(
        "lowmem-adam convert adamw.pt -o ours.pt --to 8bit",
        "lowmem-adam convert last.ckpt --key optimizer_states.0 --to torch -o t.ckpt",
        "lowmem-adam convert rank0.pt rank1.pt -o whole.pt",
    ),
)(convert)
app.command(
    short_help="Is this checkpoint whole, and what is in it?",
    rich_help_panel=FILES,
    epilog=epilog("lowmem-adam verify optimizer.pt", "lowmem-adam verify last.ckpt --key optimizer_states.0 --json"),
)(verify)
