"""The native library: found, checked, chosen or missed; refusals before anything changes; threads, forks, OpenMP."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_adam import AdamW8bit, kernels
from lowmem_adam.kernels import cpu
from tests import kernel_refusals as refusals
from tests.cases import FEW, assert_same_bits, everything, make_params, set_gradients, train
from tests.kernel_cases import BIG, isas, results, scalars, snapshot, without_library
from tests.kernel_refusals import FIELDS, call, fake_library_source, good_fragment

ROOT = Path(__file__).resolve().parents[1]
# The first call is an error, of the whole file, where a library could have been built and is missing.
needs_library = pytest.mark.skipif(without_library() is not None, reason=without_library() or "")
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture(autouse=True)
def loads_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was loaded before, and what the test loads, is forgotten: the environment decides anew."""

    def forget() -> None:
        cpu.load.cache_clear()
        kernels._native_or_warning.cache_clear()

    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No library where one is looked for."""
    path = tmp_path / "liblowmem_adam.so"
    monkeypatch.setenv("LOWMEM_ADAM_LIBRARY", str(path))
    return path


def run_python(script: str, *, timeout: float = 120) -> str:
    """The output of a Python of its own, one thread to begin with."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stdout}\n{done.stderr}"
    return done.stdout


# ---------------------------------------------------------------- loading


def libm(_: Path) -> str:
    found = re.search(r"/\S*/libm[.-]\S*", Path("/proc/self/maps").read_text())
    assert found is not None
    return found[0]


UNUSABLE: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing": (lambda folder: str(folder / "missing.so"), r"there is no native library at \S*missing\.so: it was not"),
    "a folder": (str, r"there is no native library at \S*: it was not built"),
    "a text file": (lambda _: __file__, r"the native library cannot be loaded: \S*test_cpu_library\.py"),
    "a library of something else": (libm, r"libm\S* is not a library of this package: .*lowmem_adam_abi_version"),
    "switched off": (lambda _: "none", r"the native library is switched off by LOWMEM_ADAM_LIBRARY=none"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_is_no_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    path, said = UNUSABLE[name]
    if path is libm and not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    monkeypatch.setenv("LOWMEM_ADAM_LIBRARY", path(tmp_path))
    with pytest.raises(cpu.LibraryError, match=said):
        cpu.load()


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with interface version FAKE_ABI, the constants of this package but for word FAKE_WORD, and no step."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler, and there is none")
    folder = tmp_path_factory.mktemp("fake")
    (folder / "fake.c").write_text(fake_library_source())
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "fake.so", "fake.c"], cwd=folder, check=True, timeout=60)
    return folder / "fake.so"


WORDS = [field[0] for field in cpu._Format._fields_ for _ in range(ctypes.sizeof(field[1]) // 4)]


@pytest.mark.parametrize(
    ("abi", "word", "flip", "said"),
    [
        (99, 0, 0, f"has interface version 99; accepted: {cpu.ABI_VERSION} "),
        (cpu.ABI_VERSION, 0, 0, r"is not a library of this package: .*lowmem_adam_openmp_library"),
        *((cpu.ABI_VERSION, word, 1, f"was compiled with {name} = ") for word, name in enumerate(WORDS)),
    ],
)
def test_a_library_of_another_interface_or_format_is_refused(
    monkeypatch: pytest.MonkeyPatch, fake: Path, abi: int, word: int, flip: int, said: str
) -> None:
    """Whichever constant differs, and be it by a bit."""
    for name, value in {"ABI": abi, "WORD": word, "FLIP": flip}.items():
        monkeypatch.setenv(f"FAKE_{name}", str(value))
    monkeypatch.setenv("LOWMEM_ADAM_LIBRARY", str(fake))
    with pytest.raises(cpu.LibraryError, match=said):
        cpu.load()


def test_a_library_of_other_dynamic_maps_is_refused(monkeypatch: pytest.MonkeyPatch, fake: Path) -> None:
    for name, value in {"ABI": cpu.ABI_VERSION, "WORD": 0, "FLIP": 0, "MAP": 1}.items():
        monkeypatch.setenv(f"FAKE_{name}", str(value))
    monkeypatch.setenv("LOWMEM_ADAM_LIBRARY", str(fake))
    with pytest.raises(cpu.LibraryError, match="was compiled with other dynamic maps; accepted: dynamic_map's"):
        cpu.load()


# ---------------------------------------------------------------- instruction sets


@needs_library
def test_an_instruction_set_that_is_unknown_or_of_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    there = isas()
    absent = next(name for name in cpu.ISAS if name not in there)
    here = f"accepted on this machine: {', '.join(there)}"
    for isa, everywhere in ((absent, here), ("sse9", f"accepted: {', '.join(cpu.ISAS)}")):
        with pytest.raises(ValueError, match=f"isa is {isa!r}; {here}"):
            cpu.adam_step_([], isa=isa)
        monkeypatch.setenv("LOWMEM_ADAM_ISA", isa)
        cpu.load.cache_clear()
        with pytest.raises(cpu.LibraryError, match=f"LOWMEM_ADAM_ISA is {isa!r}; {everywhere}"):
            cpu.load()
        monkeypatch.delenv("LOWMEM_ADAM_ISA")


@needs_library
@pytest.mark.parametrize("name", isas())
def test_an_instruction_set_can_be_pinned(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("LOWMEM_ADAM_ISA", name)
    assert cpu.describe()["isa"] == cpu.load().isa_name == name


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_what_is_in_use_can_be_asked(threads: int) -> None:
    torch.set_num_threads(threads)
    said = cpu.describe()
    assert said["threads"] == threads
    assert Path(str(said["library"])).is_file()
    assert said["isa"] in isas()


# ---------------------------------------------------------------- without a library


@pytest.mark.parametrize("expected", [1, 0])
def test_without_a_library_there_is_one_warning_and_the_reference(
    monkeypatch: pytest.MonkeyPatch, missing: Path, expected: int
) -> None:
    """None where the library was switched off."""
    if not expected:
        monkeypatch.setenv("LOWMEM_ADAM_LIBRARY", "none")
    made: list[AdamW8bit] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for backend in (None, None, "reference"):
            params = make_params(FEW)
            made.append(AdamW8bit(params, backend=backend))
            train(made[-1], params, 2)
    said = [str(w.message) for w in caught if "native library" in str(w.message)]
    assert len(said) == expected
    assert all(str(missing) in text and "reference backend" in text for text in said)
    assert_same_bits(results(made[0]), results(made[2]))
    assert_same_bits(results(made[1]), results(made[2]))


def test_a_backend_asked_for_must_be_there_at_construction_and_when_a_group_is_added(missing: Path) -> None:
    with pytest.raises(cpu.LibraryError, match=re.escape(str(missing))):
        AdamW8bit(make_params(FEW), backend="cpu")
    opt = AdamW8bit(make_params(FEW), backend="reference")
    with pytest.raises(cpu.LibraryError, match=re.escape(str(missing))):
        opt.add_param_group({"params": make_params(FEW), "backend": "cpu"})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("steps", [0, 2])
def test_a_backend_asked_for_later_must_be_there_at_the_step(missing: Path, steps: int) -> None:
    params = make_params(FEW)
    opt = AdamW8bit([{"params": params[:2]}, {"params": params[2:]}], backend="reference")
    train(opt, params, steps)
    opt.param_groups[1]["backend"] = "cpu"
    set_gradients(params, steps)
    before = everything(opt)
    with pytest.raises(cpu.LibraryError, match=re.escape(str(missing))):
        opt.step()
    assert_same_bits(before, everything(opt))


@needs_library
@pytest.mark.parametrize("shape", [(64, 128), (3,)])
def test_the_native_backend_is_for_parameters_on_the_cpu(shape: tuple[int, ...]) -> None:
    param = torch.nn.Parameter(torch.empty(shape, device="meta"))
    with pytest.raises(ValueError, match=r'backend is "cpu" for a parameter on meta; accepted: parameters on the CPU'):
        AdamW8bit([param], backend="cpu")
    AdamW8bit([param])
    AdamW8bit([param], backend="reference")


@needs_library
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_the_native_backend_gives_the_optimizer_the_same_bits(backend: str | None) -> None:
    made = []
    for name in (backend, "reference"):
        params = make_params(FEW, torch.bfloat16)
        made.append(AdamW8bit(params, lr=0.01, backend=name))
        train(made[-1], params, 3)
    assert kernels.choose(backend, torch.device("cpu")) == "cpu"
    assert_same_bits(results(made[0]), results(made[1]))


# ---------------------------------------------------------------- refusals


@needs_library
@pytest.mark.parametrize("name", refusals.REFUSED)
def test_tensors_that_do_not_fit_are_refused_before_anything_changes(name: str) -> None:
    moments, change = refusals.REFUSED[name]
    first, second = good_fragment(), good_fragment(moments)
    before = snapshot(first), snapshot(second)
    with pytest.raises(ValueError, match="accepted: "):
        cpu.adam_step_([(first, scalars(1)), (change(second), scalars(1))])
    assert_same_bits(before, (snapshot(first), snapshot(second)))


@needs_library
@pytest.mark.parametrize(("field", "value", "status"), FIELDS)
def test_the_library_refuses_a_bad_field_before_anything_changes(field: int, value: int, status: int) -> None:
    fragments = [good_fragment(), good_fragment()]
    work = [(fragment, scalars(1)) for fragment in fragments[:1]]
    work.append((fragments[1], work[0][1]))
    before = [snapshot(fragment) for fragment in fragments]
    assert call(work, (field, value)) == status
    assert_same_bits(before, [snapshot(fragment) for fragment in fragments])


@needs_library
@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"isa": -2}, refusals.BAD_ISA),
        ({"isa": 99}, refusals.BAD_ISA),
        ({"num_threads": 0}, refusals.BAD_THREADS),
        ({"num_threads": -1}, refusals.BAD_THREADS),
        ({"fragments": None}, refusals.BAD_POINTER),
        ({"scalars": None}, refusals.BAD_POINTER),
        ({"skipped": None}, refusals.BAD_POINTER),
        ({"scalars_count": 0}, refusals.BAD_LAYOUT),
    ],
)
def test_the_library_refuses_a_bad_argument_before_anything_changes(given: dict[str, Any], status: int) -> None:
    fragment = good_fragment()
    before = snapshot(fragment)
    assert call([(fragment, scalars(1))], **given) == status
    assert_same_bits(before, snapshot(fragment))
    assert call([(fragment, scalars(1))]) == 0
    assert call([], fragments=None, scalars=None) == 0
    with pytest.raises(RuntimeError, match="refused its arguments: number of threads"):
        cpu.adam_step_([], num_threads=0)


# ---------------------------------------------------------------- processes and threads

STEPS = """
import os, sys, torch
from lowmem_adam import AdamW8bit
from lowmem_adam.kernels import cpu
from tests.cases import *
from tests.kernel_cases import BIG, results

def started(backend="cpu"):
    params = make_params(BIG)
    opt = AdamW8bit(params, lr=0.01, backend=backend)
    train(opt, params, 2)
    return params, opt

def maps():
    return {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
"""


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_steps_with_one_thread_and_refuses_more() -> None:
    run_python(
        STEPS
        + """
torch.set_num_threads(2)
params, opt = started()
if (child := os.fork()) == 0:
    try:
        torch.set_num_threads(1)
        set_gradients(params, 2)
        before = everything(opt)
        torch.set_num_threads(2)
        try:
            opt.step()
        except RuntimeError as error:
            assert "torch.set_num_threads(1)" in str(error) and "'spawn'" in str(error), str(error)
        else:
            os._exit(2)
        torch.set_num_threads(1)
        assert_same_bits(before, everything(opt))
        train(opt, params, 2, start=2)
        again, reference = started("reference")
        train(reference, again, 2, start=2)
        assert_same_bits(results(opt), results(reference))
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
train(opt, params, 1, start=2)  # the parent goes on
"""
    )


@needs_library
def test_optimizers_in_several_python_threads_do_not_disturb_one_another() -> None:
    """Two OpenMP threads each, and torch's own parallel regions before and after every step."""

    def run(seed: int, parallel: bool) -> dict[str, Any]:
        if parallel:
            torch.set_num_threads(2)  # the number belongs to the calling thread
        params = make_params(BIG, torch.bfloat16, seed=seed)
        opt = AdamW8bit(params, lr=0.01, seed=seed, backend="cpu")
        numbers = torch.ones(200, 200)
        for step in range(6):
            set_gradients(params, step, seed)
            assert (numbers @ numbers).sum() == 200.0**3
            opt.step()
            assert numbers.exp().log().sum().isfinite()
        return results(opt)

    wanted = [run(seed, False) for seed in range(4)]
    got: dict[int, dict[str, Any]] = {}
    together = threading.Barrier(4)

    def in_thread(seed: int) -> None:
        together.wait(30)
        got[seed] = run(seed, True)

    threads = [threading.Thread(target=in_thread, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert_same_bits(wanted, [got[seed] for seed in range(4)])


@needs_library
@on_linux
def test_one_openmp_library_that_torch_has_loaded_first() -> None:
    run_python(
        STEPS
        + """
assert "torch" in sys.modules
assert not any("liblowmem_adam" in path for path in maps())  # not before it is needed
torch.set_num_threads(2)
started()
assert os.path.realpath(cpu.load().path) in maps()
names = ("libgomp", "libomp", "libiomp")
runtimes = {os.path.realpath(path) for path in maps() if os.path.basename(path).startswith(names)}
if cpu.load().openmp is not None:
    assert len(runtimes) == 1, runtimes
    assert os.path.realpath(cpu.describe()["openmp"]) in runtimes
"""
    )


@needs_library
@on_linux
def test_a_step_takes_as_many_threads_as_torch_has() -> None:
    run_python(
        STEPS
        + """
if cpu.load().openmp is None:
    sys.exit()  # threads end with the call that starts them
torch.set_num_threads(1)
params, opt = started()
counts = []
for number in (1, 2, 4):
    set_gradients(params, number)
    torch.set_num_threads(number)
    before = len(os.listdir("/proc/self/task"))
    opt.step()
    counts.append(len(os.listdir("/proc/self/task")))
assert counts == [before - 1, before, before + 2], (before, counts)
"""
    )


@needs_library
@pytest.mark.parametrize(
    "move",
    [
        "for p in params: p.data = p.data.clone()",
        "for p in params: p.data.share_memory_()",
        "for s in opt.state.values():\n        for v in s.values(): v.data = v.data.clone()",
        "for s in opt.state.values():\n        for v in s.values(): v.share_memory_()",
    ],
    ids=["new parameters", "shared parameters", "new state", "shared state"],
)
def test_parameters_and_state_may_move_in_memory(move: str) -> None:
    """The same tensors with other memory behind them: nothing may be written to where they were."""
    run_python(
        STEPS
        + f"""
made = []
for backend in ("cpu", "reference"):
    params, opt = started(backend)
    {move}
    kept = [torch.zeros(300, 100) for _ in range(20)]  # takes the memory that became free
    train(opt, params, 2, start=2)
    assert not any(tensor.any() for tensor in kept)
    made.append(results(opt))
assert_same_bits(*made)
"""
    )


@needs_library
def test_state_that_became_another_dtype_in_place_is_refused() -> None:
    script = """
params, opt = started()
opt.state[params[0]]["exp_avg_code"].data = torch.zeros(300, 100)
set_gradients(params, 2)
try:
    opt.step()
except ValueError as error:
    print(error)
"""
    assert "exp_avg_code" in run_python(STEPS + script)
