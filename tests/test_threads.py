"""How many threads a process gets: cores as affinity and quotas leave them, a launcher's word, and the kernel's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem_adam import cores
from lowmem_adam.integrations import accelerate as integration
from lowmem_adam.kernels import choose

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}
"""Of a process that accelerate has started."""
CORES = 12
"""Of the machine that these tests pretend to have."""


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: CORES)
    monkeypatch.setattr(integration, "usable_cores", lambda: CORES)
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "ACCELERATE_CPU_AFFINITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def launch(monkeypatch: pytest.MonkeyPatch, *started: tuple[dict[str, str], str], local: int = 2) -> None:
    """Pretend that these processes have launched this one, the nearest first: environments and commands at start."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    psutil = pytest.importorskip("psutil", reason="launchers are looked up with it")
    parent = None
    for environment, command in reversed([(dict(LAUNCHED), "python script.py"), *started]):
        parent = SimpleNamespace(
            environ=lambda found=environment: found,
            cmdline=lambda found=command: found.split(),
            parent=lambda found=parent: found,
            cpu_affinity=lambda: list(range(2 * CORES)),
        )
    monkeypatch.setattr(psutil, "Process", lambda: parent)


@pytest.mark.parametrize(
    ("started", "threads"),
    [
        pytest.param([({}, "accelerate launch script.py")], 6, id="told nothing"),
        pytest.param([({"OMP_NUM_THREADS": "1"}, "accelerate launch script.py")], 1, id="told one"),
        pytest.param([({"OMP_NUM_THREADS": "4,2"}, "accelerate launch script.py")], 4, id="told for each level"),
        pytest.param([({"OMP_NUM_THREADS": ""}, "accelerate launch script.py")], 6, id="an empty word"),
        pytest.param([({}, "accelerate launch --num_cpu_threads_per_process 3 script.py")], 3, id="option"),
        pytest.param([({}, "accelerate launch --num-cpu-threads-per-process=5 script.py")], 5, id="option with a dash"),
        pytest.param([(LAUNCHED, "torchrun script.py"), ({}, "accelerate launch -m torchrun")], 6, id="two launchers"),
        pytest.param(
            [(LAUNCHED, "torchrun script.py"), ({"OMP_NUM_THREADS": "1"}, "accelerate launch -m torchrun")],
            1,
            id="two launchers, told one",
        ),
    ],
)
def test_what_launchers_were_told(
    monkeypatch: pytest.MonkeyPatch, started: list[tuple[dict[str, str], str]], threads: int
) -> None:
    launch(monkeypatch, *started)
    assert integration.set_threads() == threads == torch.get_num_threads()


def test_where_launchers_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then 1 is taken for a launcher's own."""
    monkeypatch.setattr(integration, "_launchers", list)
    for launched, variable, threads in ((True, "1", 6), (True, "4", 4), (False, "1", 1), (False, "", CORES)):
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
        if launched:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
            monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        else:
            monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
            monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        assert integration.set_threads() == threads


def test_a_launcher_of_another_user_is_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = pytest.importorskip("psutil")
    launch(monkeypatch, ({}, "accelerate launch script.py"))

    def denied() -> Any:
        raise psutil.AccessDenied

    process = psutil.Process()
    process.parent().environ = denied
    assert integration._launchers() == []
    process.parent = lambda: None  # it has ended
    assert integration._launchers() == []


def test_processes_bound_to_some_cores_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """With accelerate's enable_cpu_affinity a process may use a part already, which is not divided once more."""
    launch(monkeypatch, ({}, "accelerate launch script.py"), local=4)
    assert integration.set_threads() == 3
    monkeypatch.setenv("ACCELERATE_CPU_AFFINITY", "1")
    assert integration.set_threads() == 6
    monkeypatch.setattr(integration, "usable_cores", lambda: 5)
    assert integration.set_threads() == 5


def test_a_number_that_is_given_holds() -> None:
    assert integration.set_threads(3) == 3
    for bad in (0, -1, True, 2.0, "4"):
        with pytest.raises(ValueError, match=r"threads is .*; accepted: whole numbers from 1, or None"):
            integration.set_threads(bad)  # type: ignore[arg-type]
    assert torch.get_num_threads() == 3


def test_a_share_is_at_least_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    for local, share in (("", CORES), ("1", CORES), ("5", 2), ("12", 1), ("40", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert cores.share_of_cores() == share


# Quotas


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n", encoding="utf-8")


def test_quotas_of_the_unified_hierarchy(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/user/job\n", encoding="utf-8")
    write(tmp_path / "cgroups" / "user" / "job", cpu__max="max 100000")
    assert list(cores.quotas(tmp_path / "cgroups", own)) == []
    write(tmp_path / "cgroups" / "user", cpu__max="250000 100000")
    assert list(cores.quotas(tmp_path / "cgroups", own)) == [2.5]
    write(tmp_path / "cgroups" / "user" / "job", cpu__max="50000 100000")
    assert list(cores.quotas(tmp_path / "cgroups", own)) == [0.5, 2.5]
    # A container may see its own cgroup as the root, by a path that does not exist there.
    own.write_text("0::/elsewhere\n", encoding="utf-8")
    write(tmp_path / "cgroups", cpu__max="400000 100000")
    assert list(cores.quotas(tmp_path / "cgroups", own)) == [4.0]
    assert list(cores.quotas(tmp_path / "cgroups", tmp_path / "absent")) == []


def test_quotas_of_hierarchies_by_controller(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("4:memory:/job\n3:cpuset:/job\n2:cpu,cpuacct:/job\n1:name=systemd:/job\n0::/\n", encoding="utf-8")
    folder = tmp_path / "cgroups" / "cpu,cpuacct"
    write(folder, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert list(cores.quotas(tmp_path / "cgroups", own)) == []
    write(folder / "job", cpu__cfs_quota_us="350000", cpu__cfs_period_us="100000")
    assert list(cores.quotas(tmp_path / "cgroups", own)) == [3.5]


def test_usable_cores_are_whole_and_one_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    for found, usable in (([], 8), ([2.5], 2), ([0.5, 4.0], 1), ([64.0], 8)):
        monkeypatch.setattr(cores, "quotas", lambda *_, found=found: iter(found))
        assert cores.usable_cores() == usable


# A real launch


SCRIPT = """
import os, torch
from lowmem_adam import AdamW8bit
from lowmem_adam.integrations.accelerate import set_threads

before = torch.get_num_threads()
torch.set_num_threads(1)  # torch's own work is to start none
param = torch.nn.Parameter(torch.zeros(1024, 1024))
param.grad = torch.full((1024, 1024), 1e-3)
opt = AdamW8bit([param])
threads = set_threads()
running = len(os.listdir("/proc/self/task"))
opt.step()
started = len(os.listdir("/proc/self/task")) - running
os.write(1, f"of {before} made {threads} and started {started}\\n".encode())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not show a process's threads")
@pytest.mark.skipif(choose(None, torch.device("cpu")) != "cpu", reason="the native library steps, and is not there")
def test_the_kernel_runs_with_them(tmp_path: Path) -> None:
    """DeepSpeed's launcher leaves a process one thread, whatever it is told; the kernel is to have what it was told."""
    pytest.importorskip("accelerate", reason="its launcher is started")
    from tests.launching import accelerate_launch, deepspeed_environment, why_no_deepspeed

    kind = "cpu_2" if why_no_deepspeed() else "deepspeed_zero2_offload"
    script = tmp_path / "threads.py"
    script.write_text(SCRIPT, encoding="utf-8")
    told = ["--config_file", f"launch/configs/{kind}.yaml", "--num_processes", "2", "--num_cpu_threads_per_process"]
    environment = deepspeed_environment()
    del environment["OMP_NUM_THREADS"]
    finished = accelerate_launch(*told, "3", str(script), environment=environment)
    assert finished.returncode == 0, finished.stderr
    of = 3 if kind == "cpu_2" else 1
    assert finished.stdout.splitlines() == [f"of {of} made 3 and started 2"] * 2
