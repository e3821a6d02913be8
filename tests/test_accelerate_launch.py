"""launch/accelerate_lm.py under every configuration, started for real in two processes on the CPU; and bad launches."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="the launches are accelerate's")
pytest.importorskip("transformers", reason="the script takes its model from transformers")

import torch

from lowmem_adam import kernels
from lowmem_adam.cores import usable_cores
from tests.launching import (
    NEEDS_DEEPSPEED,
    accelerate_launch,
    cpu_environment,
    deepspeed_environment,
    extensions_folder,
    free_port,
)
from tests.ranks import NEEDS_GLOO

from tests.lm_cases import LAUNCH, ROOT, write_text  # isort: skip

pytestmark = [NEEDS_GLOO, pytest.mark.slow]

SCRIPT = str(LAUNCH / "accelerate_lm.py")
FSDP_SCRIPT = str(ROOT / "tests" / "fsdp_on_cpu.py")
TINY = "--warmup-steps 1 --batch-size 4 --seq-len 32 --hidden-size 64 --layers 1"
STEPS, SAVED = 4, 2
"""Of a run, and when its checkpoint is taken."""


def config(name: str) -> list[str]:
    return ["--config_file", str(LAUNCH / "configs" / f"{name}.yaml")]


def run(folder: Path, launcher: list[str], *options: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """The file that a run of the script leaves; its text lies in the folder."""
    output = folder / "run.json"
    output.unlink(missing_ok=True)
    script = [] if launcher[-1] == SCRIPT else [SCRIPT]
    told = ["--output", str(output), "--data", str(folder / "text"), "--steps", str(STEPS), *TINY.split(), *options]
    finished = accelerate_launch(*launcher, *script, *told, environment=environment)
    assert finished.returncode == 0, finished.stderr
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


def saving(folder: Path) -> list[str]:
    return ["--checkpoint-dir", str(folder / "saved"), "--checkpoint-every", str(SAVED)]


def resuming(folder: Path) -> list[str]:
    return ["--resume", str(folder / "saved" / f"step-{SAVED:06d}")]


def check_losses(whole: dict[str, Any], resumed: dict[str, Any] | None = None) -> None:
    """A run learns, and resumed from its checkpoint goes on with the same losses, to the bit."""
    losses = whole["losses"]
    assert list(losses) == [str(step) for step in range(1, STEPS + 1)]
    assert losses[str(STEPS)] < losses["1"] - 0.3
    if resumed is not None:
        assert resumed["losses"] == {step: loss for step, loss in losses.items() if int(step) > SAVED}


def check_facts(found: dict[str, Any], **expected: Any) -> None:
    """That it was our optimizer that stepped, on the CPU, with decay and no-decay groups and 8-bit state."""
    backend = kernels.choose(None, torch.device("cpu"))  # "cpu", or "reference" without the library
    expected = {"optimizer": "AdamW8bit", "backend": backend, "weight_decay": [0.01, 0.0], "world_size": 2} | expected
    assert {name: found[name] for name in expected} == expected
    # Rows of 64 and 96 elements take 2 bytes of metadata each, and norms are in 32 bits.
    assert 2.0 < found["state_bytes_per_parameter_all_ranks"] < 2.05


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path / "text")
    return tmp_path


def test_data_parallel(folder: Path) -> None:
    """Two processes save. Two go on, and one, with as many micro-batches a step as there were processes."""
    whole = run(folder, config("cpu_2"), *saving(folder))
    check_facts(whole, distributed_type="MULTI_CPU", zero_stage=None, threads=1)
    check_losses(whole, run(folder, config("cpu_2"), *resuming(folder)))
    environment = cpu_environment() | {"CUDA_VISIBLE_DEVICES": ""}
    del environment["OMP_NUM_THREADS"]  # of which accelerate then makes 1
    alone = [*config("gpu_1"), "--gpu_ids", "all", "--mixed_precision", "no"]
    more = ["--gradient-accumulation-steps", "2"]
    one = run(folder, alone, *resuming(folder), *more, environment=environment)
    check_facts(one, distributed_type="NO", world_size=1, threads=usable_cores())
    check_losses(whole, one)


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed(folder: Path, stage: int) -> None:
    """The optimizer named by the config, with state on the device and on the host, and one that the script makes."""
    offload, environment = f"deepspeed_zero{stage}_offload", deepspeed_environment()
    two = ["--num_processes", "2"]
    accumulating = ["--gradient-accumulation-steps", "2", "--seed", "1"]
    facts = {"distributed_type": "DEEPSPEED", "zero_stage": stage, "parameters_stepped_on": "cpu"}
    whole = run(folder, [*config(offload), *two], *saving(folder), *accumulating, environment=environment)
    check_facts(whole, **facts, threads=1)
    resumed = run(folder, [*config(offload), *two], *resuming(folder), *accumulating, environment=environment)
    check_facts(resumed, **facts)
    check_losses(whole, resumed)
    del environment["OMP_NUM_THREADS"]
    told = [*two, "--num_cpu_threads_per_process", "3"]  # which DeepSpeed's launcher passes over
    plain = run(folder, [*config(f"deepspeed_zero{stage}"), *told], *accumulating, environment=environment)
    check_facts(plain, **facts, threads=3)
    check_losses(plain)
    # The same steps but for the dtype in which stages 1 and 2 add up micro-batches, with and without offload.
    assert list(plain["losses"].values()) == pytest.approx(list(whole["losses"].values()), rel=1e-3)
    if stage == 2:
        own = [*config(offload), *two, "--deepspeed_config_file", str(LAUNCH / "configs" / "deepspeed_client.json")]
        client = run(folder, own, *accumulating, environment=environment)
        check_facts(client, **facts)
        assert client["losses"] == whole["losses"]


def test_fsdp2(folder: Path) -> None:
    fsdp = [*config("fsdp2"), "--num_processes", "2", FSDP_SCRIPT, SCRIPT]
    accumulating = ["--gradient-accumulation-steps", "2"]
    whole = run(folder, fsdp, *saving(folder), *accumulating)
    check_facts(whole, distributed_type="FSDP", zero_stage=None)
    check_losses(whole, run(folder, fsdp, *resuming(folder), *accumulating))


@pytest.mark.parametrize("kind", [pytest.param("deepspeed_zero2_offload", marks=NEEDS_DEEPSPEED), "fsdp2"])
def test_two_machines(folder: Path, kind: str) -> None:
    """Two launchers on this machine stand for two machines, with one process each."""
    address = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    address += ["--main_process_port", str(free_port()), "--machine_rank"]
    environment = cpu_environment() if kind == "fsdp2" else deepspeed_environment()
    told = ["--data", str(folder / "text"), "--steps", "1", *TINY.split(), "--expect-world-size", "2"]
    script = [FSDP_SCRIPT, SCRIPT] if kind == "fsdp2" else [SCRIPT]

    def machine(rank: str) -> Any:
        output = ["--output", str(folder / rank / "run.json")]
        return accelerate_launch(*config(kind), *address, rank, *script, *output, *told, environment=environment)

    with ThreadPoolExecutor(2) as pool:
        for finished in pool.map(machine, "01"):
            assert finished.returncode == 0, finished.stderr
    found = json.loads((folder / "0" / "run.json").read_text(encoding="utf-8"))
    stage = {"fsdp2": None}.get(kind, 2)
    check_facts(found, distributed_type="FSDP" if kind == "fsdp2" else "DEEPSPEED", zero_stage=stage)
    assert list(found["losses"]) == ["1"]
    assert not (folder / "1" / "run.json").exists()  # the first of all processes writes


# What silently starts something else


# A process that ends while the other is still on its way into the process group would be missed there.
CHECK = """
import os, sys, time
from pathlib import Path
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from lowmem_adam.integrations.accelerate import check_launch

accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if "gloo" in sys.argv else [])
try:
    check_launch(accelerator)
except RuntimeError as error:
    os.write(1, f"refused: {error}\\n".encode())
else:
    os.write(1, b"accepted\\n")
folder, end = Path(__file__).parent, time.monotonic() + 60
(folder / f"{os.getpid()}.done").touch()
while len(list(folder.glob("*.done"))) < int(os.environ.get("WORLD_SIZE") or 1) and time.monotonic() < end:
    time.sleep(0.02)
accelerator.end_training()
"""


@pytest.mark.parametrize(
    ("launcher", "variables", "argument", "words"),
    [
        pytest.param(
            ["--cpu", "--num_processes", "2"],
            {},
            "as it is",
            "was asked for several processes and has started a single one",
            id="--cpu",
        ),
        pytest.param(
            ["--multi_gpu", "--num_processes", "2"],
            {"ACCELERATE_USE_CPU": "false"},
            "as it is",
            "started 2 processes, of which accelerate has joined 1",
            id="--multi_gpu",
        ),
        pytest.param(
            ["--multi_gpu", "--num_processes", "2"],
            {"ACCELERATE_USE_CPU": "false"},
            "gloo",
            "2 processes have joined, and accelerate takes each for one alone",
            id="--multi_gpu, gloo",
        ),
        pytest.param(
            [*config("fsdp2"), "--num_processes", "2"], {}, "as it is", "accelerate has no FSDP on the CPU", id="fsdp"
        ),
        pytest.param(
            [*config("deepspeed_zero1"), "--num_processes", "2"],
            {"ACCELERATE_USE_CPU": "true"},
            "as it is",
            "asks for DEEPSPEED and accelerate runs MULTI_CPU",
            id="deepspeed",
            marks=NEEDS_DEEPSPEED,
        ),
        pytest.param(
            [*config("deepspeed_zero1"), "--num_processes", "2"],
            {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(extensions_folder())},
            "as it is",
            "started 2 processes, of which accelerate has joined 1",
            id="deepspeed, not over gloo",
            marks=NEEDS_DEEPSPEED,
        ),
    ],
)
def test_launches_that_start_something_else(
    tmp_path: Path, launcher: list[str], variables: dict[str, str], argument: str, words: str
) -> None:
    script = tmp_path / "check.py"
    script.write_text(CHECK, encoding="utf-8")
    environment = cpu_environment() | {"CUDA_VISIBLE_DEVICES": ""} | variables
    port = [] if "--config_file" in launcher or "--cpu" in launcher else ["--main_process_port", str(free_port())]
    finished = accelerate_launch(*port, *launcher, str(script), argument, environment=environment)
    assert finished.returncode == 0, finished.stderr
    processes = 1 if "--cpu" in launcher else 2
    lines = [line for line in finished.stdout.splitlines() if line.startswith(("refused: ", "accepted"))]
    assert len(lines) == processes
    assert all(line.startswith("refused: ") and words in line for line in lines)
