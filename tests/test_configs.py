"""The accelerate configurations: read by accelerate's own loader, and started for real where no GPU is needed.

test_accelerate_launch.py starts those of DeepSpeed and FSDP2.
"""

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="the configurations are accelerate's")

from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType

from tests.launching import accelerate_launch, free_port

CONFIGS = Path(__file__).resolve().parents[1] / "launch" / "configs"

# name: (distributed type, on the CPU, machines, processes of all machines)
EXPECTED = {
    "cpu_2": (DistributedType.MULTI_GPU, True, 1, 2),
    "gpu_1": (DistributedType.NO, False, 1, 1),
    "gpu_multi": (DistributedType.MULTI_GPU, False, 1, 8),
    "multi_node": (DistributedType.MULTI_GPU, False, 2, 16),
    "deepspeed_zero1": (DistributedType.DEEPSPEED, False, 1, 8),
    "deepspeed_zero1_offload": (DistributedType.DEEPSPEED, False, 1, 8),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, False, 1, 8),
    "deepspeed_zero2_offload": (DistributedType.DEEPSPEED, False, 1, 8),
    "fsdp2": (DistributedType.FSDP, False, 1, 8),
}

# One unbuffered write a rank: the lines of two ranks do not mix.
SCRIPT = f"""
import os, sys, torch
sys.path.insert(0, {str(CONFIGS.parent)!r})
from accelerate import Accelerator
from processes import leave

accelerator = Accelerator()
ranks = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()
world, backend = accelerator.num_processes, torch.distributed.get_backend()
os.write(1, f"rank {{accelerator.process_index}} world {{world}} {{backend}} gathered {{ranks}}\\n".encode())
leave(accelerator)
"""


def launch(config: str, script: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return accelerate_launch("--config_file", str(CONFIGS / f"{config}.yaml"), *options, str(script))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "world_size.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def test_every_config_is_described() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_config(name: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.use_cpu, config.num_machines, config.num_processes) == EXPECTED[name]
    assert config.num_processes % config.num_machines == 0


def test_deepspeed_configs_differ_in_stage_and_offload_only() -> None:
    """And name our optimizer, with all that it takes for DeepSpeed and accelerate not to put another in its place."""
    read = {}
    for name in EXPECTED:
        config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
        if config.distributed_type == DistributedType.DEEPSPEED:
            path = Path(config.deepspeed_config["deepspeed_config_file"])
            assert path == Path("launch/configs", f"{name}.json")  # commands are given from the repository's folder
            read[name] = json.loads((CONFIGS / path.name).read_text(encoding="utf-8"))
    read["deepspeed_client"] = json.loads((CONFIGS / "deepspeed_client.json").read_text(encoding="utf-8"))
    # That of DeepSpeed's own engine, without accelerate, has no "auto" (test_deepspeed_example.py).
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(read) | {"deepspeed_engine"}
    kinds = {}
    for name, config in read.items():
        zero = config.pop("zero_optimization")
        kinds[name] = (zero["stage"], zero.get("offload_optimizer", {}).get("device", "none"))
        optimizer = {"type": "AdamW8bit", "params": {"lr": "auto", "weight_decay": "auto"}}
        assert config.pop("optimizer", None) == (None if name == "deepspeed_client" else optimizer)
        assert config["zero_allow_untested_optimizer"] is True
        assert config["zero_force_ds_cpu_optimizer"] is False
        assert config == read["deepspeed_zero1"]
    assert kinds == {
        "deepspeed_zero1": (1, "none"),
        "deepspeed_zero1_offload": (1, "cpu"),
        "deepspeed_zero2": (2, "none"),
        "deepspeed_zero2_offload": (2, "cpu"),
        "deepspeed_client": (2, "cpu"),
    }


def test_cpu_2_starts_two_processes_that_know_of_one_another(script: Path) -> None:
    finished = launch("cpu_2", script)
    assert finished.returncode == 0, finished.stderr
    assert sorted(re.findall(r"^rank .*$", finished.stdout, flags=re.MULTILINE)) == [
        "rank 0 world 2 gloo gathered [0, 1]",
        "rank 1 world 2 gloo gathered [0, 1]",
    ]


def test_multi_node_joins_two_launchers(script: Path) -> None:
    """Two launchers on this machine stand for the two machines, with one CPU process each."""
    options = ["--num_processes", "2", "--mixed_precision", "no"]
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()), "--machine_rank"]
    with ThreadPoolExecutor(2) as pool:
        machines = list(pool.map(lambda rank: launch("multi_node", script, *options, *address, rank), "01"))
    for rank, machine in enumerate(machines):
        assert machine.returncode == 0, machine.stderr
        assert f"rank {rank} world 2 gloo gathered [0, 1]" in machine.stdout
