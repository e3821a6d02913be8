"""Checkpoint files converted without a model: as an optimizer with the model would have loaded or exported them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.nn import Parameter

from lowmem_adam import Adam8bit, AdamW8bit, checkpoint, foreign, stored
from lowmem_adam.converting import OWN, convert
from lowmem_adam.spool import Spool
from tests.cases import SHAPES, OptimizerClass, assert_same_bits, copied, make_params, params_of, train
from tests.ranks import NEEDS_GLOO, on_ranks
from tests.shard_jobs import in_order, small, take
from tests.test_foreign import SETTINGS, SOURCES, trained

CONTIGUOUS = tuple(shape._replace(memory="contiguous") for shape in SHAPES)


def saved_in(kind: str, shapes: Any = SHAPES) -> dict[str, Any]:
    """State of an optimizer that has taken steps, of one of the formats."""
    if kind == "bitsandbytes":
        return SOURCES["bitsandbytes AdamW8bit"].saved(shapes)
    params = make_params(shapes)
    if kind == "torch":
        opt: torch.optim.Optimizer = torch.optim.AdamW(params, **SETTINGS)
    else:
        opt = AdamW8bit(params, moments=kind, **SETTINGS)
    train(opt, params, 3)
    saved: dict[str, Any] = copied(opt.state_dict())
    return saved


def written(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def converted(value: Any, folder: Path, to: str | None, **options: Any) -> Any:
    """What comes out of a file of this."""
    source, target = written(value, folder / "source.pt"), folder / "target.pt"
    before = source.read_bytes()
    convert([source], target, to, force=True, **options)
    assert source.read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["source.pt", "target.pt"]
    return read(target)


def loaded(state_dict: dict[str, Any], cls: OptimizerClass = AdamW8bit, **settings: Any) -> Adam8bit:
    opt = cls(make_params(SHAPES), **settings)
    opt.load_state_dict(state_dict)
    return opt


# ---------------------------------------------------------------- every pair of formats


@pytest.mark.parametrize("to", OWN)
@pytest.mark.parametrize("name", SOURCES)
def test_a_file_of_others_becomes_what_a_load_of_it_makes(name: str, to: str, tmp_path: Path) -> None:
    source = SOURCES[name]
    saved = source.saved(SHAPES)
    got = converted(saved, tmp_path, to, optimizer=source.ours.__name__)
    direct, through = (loaded(state, source.ours, moments=to) for state in (saved, got))
    assert_same_bits(through.state_dict(), direct.state_dict())
    assert_same_bits(got["state"], direct.state_dict()["state"])
    for opt in (direct, through):
        train(opt, params_of(opt), 2, start=3)
    assert_same_bits(copied(params_of(through)), copied(params_of(direct)))
    assert_same_bits(through.state_dict(), direct.state_dict())


@pytest.mark.parametrize("to", foreign.FORMATS)
@pytest.mark.parametrize("kind", OWN)
def test_a_file_of_ours_becomes_what_an_export_makes(kind: str, to: str, tmp_path: Path) -> None:
    opt = loaded(saved_in(kind), moments=kind)
    assert_same_bits(converted(opt.state_dict(), tmp_path, to), checkpoint.export(opt, to))


@pytest.mark.parametrize("to", OWN)
@pytest.mark.parametrize("kind", OWN)
def test_a_file_of_ours_under_another_setting_of_moments(kind: str, to: str, tmp_path: Path) -> None:
    saved = saved_in(kind)
    got = converted(saved, tmp_path, to)
    if kind == to:
        assert_same_bits(got, saved)
        return
    assert got["param_groups"] == [{**saved["param_groups"][0], "moments": to}]
    exported = checkpoint.export(loaded(saved, moments=kind))  # exact, in float32
    assert exported is not None
    assert_same_bits(got["state"], loaded(exported, moments=to).state_dict()["state"])


@pytest.mark.parametrize(("kind", "to"), [("torch", "bitsandbytes"), ("bitsandbytes", "torch"), ("torch", "torch")])
def test_files_of_others_for_one_another(kind: str, to: str, tmp_path: Path) -> None:
    saved = saved_in(kind, CONTIGUOUS)
    between = loaded(saved, moments={"bitsandbytes": "bnb8bit", "torch": "32bit"}[to])
    assert_same_bits(converted(saved, tmp_path, to), checkpoint.export(between, to))
    if kind == to:
        assert_same_bits(converted(saved, tmp_path, to)["state"], saved["state"])


@pytest.mark.parametrize(
    ("kind", "through", "classes"),
    [("8bit", "torch", CLASS_PAIR := (AdamW8bit, Adam8bit)), ("8bit", "32bit", CLASS_PAIR)]
    + [("32bit", to, CLASS_PAIR) for to in ("torch",)]
    + [("bnb8bit", "bitsandbytes", (AdamW8bit,))],
)
def test_there_and_back_changes_no_bit(kind: str, through: str, classes: Any, tmp_path: Path) -> None:
    for cls in classes:
        saved = copied(trained(cls, moments=kind).state_dict())
        there = converted(saved, tmp_path, through)
        assert_same_bits(converted(there, tmp_path, kind)["state"], saved["state"])


def test_flat_and_full_state_of_bitsandbytes_is_rewritten_as_it_is_today(tmp_path: Path) -> None:
    nested = SOURCES["bitsandbytes AdamW8bit"].saved(CONTIGUOUS)
    old = SOURCES["bitsandbytes AdamW8bit flat"].saved(CONTIGUOUS)
    assert_same_bits(converted(old, tmp_path, "bitsandbytes"), nested)


def test_16_bit_moments_of_torch_leave_as_float32(tmp_path: Path) -> None:
    saved = SOURCES["torch AdamW"].saved(CONTIGUOUS, torch.bfloat16)
    got = converted(saved, tmp_path, "torch")
    for key, state in saved["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(got["state"][key][name], state[name].float())


@pytest.mark.parametrize("update", ["split", "fp32"])
def test_what_is_kept_of_weights_stays_with_ours_and_is_told_of_otherwise(update: str, tmp_path: Path) -> None:
    opt = trained(AdamW8bit, torch.bfloat16, low_precision_update=update)
    saved, name = opt.state_dict(), {"split": "weight_correction", "fp32": "master_weight"}[update]
    got = converted(saved, tmp_path, "32bit")
    for key, state in saved["state"].items():
        assert_same_bits(got["state"][key][name], copied(state[name]))
    other = AdamW8bit(make_params(SHAPES, torch.bfloat16), moments="32bit", low_precision_update=update)
    other.load_state_dict(got)
    source = written(saved, tmp_path / "source.pt")
    done = convert([source], tmp_path / "torch.pt", "torch")
    assert done.left_out == {name: len(SHAPES)}
    exact = checkpoint.export(opt)
    assert exact is not None
    for key, state in read(tmp_path / "torch.pt")["state"].items():
        assert_same_bits(state["exp_avg"].bfloat16(), exact["state"][key]["exp_avg"])


def test_parameters_without_state_have_none_afterwards(tmp_path: Path) -> None:
    params = make_params(SHAPES)
    groups: list[dict[str, Any]] = [{"params": params[:4], "lr": 0.5}, {"params": params[4:]}]
    theirs = torch.optim.AdamW(groups)
    assert converted(theirs.state_dict(), tmp_path, "8bit")["state"] == {}
    for param in params[:6:2]:
        param.grad = torch.ones_like(param)
    theirs.step()
    theirs.state[params[1]]  # leaves an empty one
    for to in ("8bit", "bitsandbytes", "torch", None):
        got = converted(theirs.state_dict(), tmp_path, to)
        assert [key for key, state in got["state"].items() if state] == [0, 2, 4]
        assert [group["params"] for group in got["param_groups"]] == [[*range(4)], [*range(4, len(SHAPES))]]
        assert got["param_groups"][0]["lr"] == 0.5


def test_settings_and_the_class_for_state_that_does_not_say(tmp_path: Path) -> None:
    saved = saved_in("torch")
    got = converted(saved, tmp_path, "8bit", given={"seed": 7, "nonfinite": "error"})
    assert (got["param_groups"][0]["seed"], got["param_groups"][0]["nonfinite"]) == (7, "error")
    for group in saved["param_groups"]:
        del group["decoupled_weight_decay"]  # as torch wrote it before 2.7
    with pytest.raises(ValueError, match=r"optimizer is None.*accepted: 'AdamW8bit', 'Adam8bit'"):
        converted(saved, tmp_path, "8bit")
    for cls in (AdamW8bit, Adam8bit):
        got = converted(saved, tmp_path, "8bit", optimizer=cls.__name__)
        loaded(got, cls)


# ---------------------------------------------------------------- larger dictionaries, several files


def test_the_optimizer_in_a_larger_dictionary(tmp_path: Path) -> None:
    saved, weights = saved_in("torch"), {"layer.weight": torch.arange(5.0)}
    want = converted(saved, tmp_path, "8bit")
    lightning = {"state_dict": weights, "optimizer_states": [saved, saved], "epoch": 3}
    for key, whole in (("optimizer", {"optimizer": saved, "model": weights}), ("optimizer_states.1", lightning)):
        got = converted(whole, tmp_path, "8bit", key=key)
        assert_same_bits(
            got, {**whole, **({"optimizer": want} if key == "optimizer" else {"optimizer_states": [saved, want]})}
        )
        assert_same_bits(converted(whole, tmp_path, "8bit", key=key, alone=True), want)
    assert_same_bits(converted({"a.b": {"c": saved}}, tmp_path, "8bit", key="a.b.c"), {"a.b": {"c": want}})
    for wrong in (None, "optimzer", "optimizer_states", "optimizer_states.2", "epoch"):
        with pytest.raises(
            stored.NotACheckpointError,
            match=r"accepted: ('optimizer_states\.0', 'optimizer_states\.1'|a dictionary made by state_dict)",
        ):
            converted(lightning, tmp_path, "8bit", key=wrong)


def by_name(value: Any) -> Any:
    """Dictionaries in the order of their keys' names."""
    if not isinstance(value, dict):
        return value
    return {key: by_name(value[key]) for key in sorted(value, key=str)}


def shard_job(rank: int, folder: Path) -> Any:
    """Each rank's own part, each part's whole, and a folder of torch.distributed.checkpoint."""
    for moments in OWN:
        opt = small("world", SHAPES, moments=moments)
        take(opt, range(2))
        for to in (0, 1):
            whole = opt.consolidate_state_dict(to=to)
            torch.save(opt.state_dict(), folder / f"{moments}-{'whole' if rank == to else 'part'}-{rank}.pt")
            assert (whole is None) == (rank != to)
        opt._forget_consolidated()
        dcp_save({"optim": opt, "model": {"w": torch.ones(3)}, "epoch": 4}, checkpoint_id=folder / f"{moments}-dcp")


@NEEDS_GLOO
def test_parts_become_one_whole(tmp_path: Path) -> None:
    on_ranks(2, shard_job, tmp_path)
    for moments in OWN:
        parts = [tmp_path / f"{moments}-part-{rank}.pt" for rank in (1, 0)]
        want = in_order(read(tmp_path / f"{moments}-whole-0.pt"))
        convert(parts, tmp_path / "out.pt", force=True)
        assert_same_bits(in_order(read(tmp_path / "out.pt")), want)
        convert([tmp_path / f"{moments}-dcp"], tmp_path / "dcp.pt", key="optim", force=True)
        got = read(tmp_path / "dcp.pt")
        assert (got["epoch"], got["model"]["w"].tolist()) == (4, [1.0] * 3)
        trimmed = {key: state for key, state in got["optim"]["state"].items() if int(state["step"])}
        assert_same_bits(by_name({**got["optim"], "state": trimmed}), by_name(want))
        convert(parts, tmp_path / "torch.pt", "torch", force=True)
        convert([tmp_path / "out.pt"], tmp_path / "torch2.pt", "torch", force=True)
        assert_same_bits(read(tmp_path / "torch.pt"), read(tmp_path / "torch2.pt"))
    out, (one, other) = tmp_path / "never.pt", parts
    for sources, words in (
        ([one], r"ranks \[1\] of 2; accepted: all of them, missing: \[0\]"),
        ([one, one], "shard_1_of_2, and so is .*accepted: a file of each rank"),
        ([one, tmp_path / "bnb8bit-whole-0.pt"], "is whole state; accepted: one rank's part"),
        ([one, tmp_path / "8bit-part-0.pt"], "other param groups"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(sources, out)
    for edit, words in (
        (lambda part: part.pop("shapes"), "does not have dictionaries.*'shapes'"),
        (lambda part: part["state"][0]["step"].add_(1), "accepted: parts of one step"),
        (lambda part: part["spans"].__setitem__(0, [1, part["spans"][0][1]]), "parameter 0"),
        (lambda part: part["shapes"].__setitem__(0, [1, 2]), "parameter 0 has shape"),
    ):
        changed = read(other)
        edit(changed["shard_0_of_2"])
        with pytest.raises(ValueError, match=words):
            convert([one, written(changed, tmp_path / "changed.pt")], out)
    assert not out.exists()
    (tmp_path / "8bit-dcp" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(stored.NotACheckpointError, match="8bit-dcp cannot be read"):
        convert([tmp_path / "8bit-dcp"], out, key="optim")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_of_torch_distributed_checkpoint_of_torchs_optimizer(tmp_path: Path) -> None:
    """With settings that are tensors and parameters known by names, as its functions for models write them."""
    saved = saved_in("torch")
    names = [shape.name for shape in SHAPES]
    saved["state"] = {names[key]: state for key, state in saved["state"].items()}
    saved["param_groups"][0].update(params=names, lr=torch.tensor(0.25))
    dcp_save({"optim": saved}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    convert([tmp_path / "dcp"], tmp_path / "dcp.pt", "8bit", key="optim", alone=True)
    (tmp_path / "dcp").rename(tmp_path.with_name("dcp"))
    got = read(tmp_path / "dcp.pt")
    (tmp_path / "dcp.pt").unlink()
    assert_same_bits(by_name(got), by_name(converted(saved, tmp_path, "8bit")))


# ---------------------------------------------------------------- what is refused


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"to": "numpy"}, r"to is 'numpy'; accepted: 'torch', 'bitsandbytes', '8bit', '32bit', 'bnb8bit'"),
    ({"to": "8bit", "optimizer": "AdamW"}, "optimizer is 'AdamW'; accepted: 'AdamW8bit', 'Adam8bit'"),
    ({"to": "8bit", "given": {"lr": 1.0}}, "settings have 'lr'; accepted: 'seed'"),
    ({"to": "8bit", "given": {"low_precision_update": "split"}}, "accepted here: 'nearest', 'stochastic'"),
    ({"to": "8bit", "given": {"nonfinite": "no"}}, "nonfinite is 'no'; accepted"),
    ({"to": "8bit", "optimizer": "AdamW8bit"}, "decoupled_weight_decay is False; accepted: True"),
    ({"to": "bitsandbytes"}, "weight_decay is 0.03 as L2; accepted: 0"),
    ({"to": None, "given": {"seed": 3}}, "seed is 3; accepted: None"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_arguments_that_are_not_accepted(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = written(SOURCES["torch Adam"].saved(), tmp_path / "source.pt")  # whose decay is not decoupled
    with pytest.raises(ValueError, match=words):
        convert([source], tmp_path / "target.pt", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]


def test_a_file_that_is_there_stays_unless_told(tmp_path: Path) -> None:
    source, target = written(saved_in("8bit"), tmp_path / "source.pt"), tmp_path / "target.pt"
    target.write_text("mine")
    with pytest.raises(FileExistsError, match="which exists; accepted: a new file, or force"):
        convert([source], target, "torch")
    before = source.read_bytes()
    (tmp_path / "link.pt").symlink_to(source)
    for same in (source, tmp_path / "link.pt"):
        with pytest.raises(FileExistsError, match="a source; accepted: another file"):
            convert([source], same, "torch", force=True)
    with pytest.raises(FileExistsError, match="a folder"):
        convert([source], tmp_path, "torch", force=True)
    with pytest.raises(FileNotFoundError):
        convert([source], tmp_path / "absent" / "target.pt", "torch")
    with pytest.raises(FileNotFoundError):
        convert([tmp_path / "absent.pt"], tmp_path / "new.pt", "torch")
    assert (target.read_text(), source.read_bytes() == before) == ("mine", True)
    convert([source], target, "torch", force=True)
    assert foreign.kind_of(read(target)) == "torch"


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="asks the system for room in another way")
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(saved_in("8bit"), tmp_path / "source.pt")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("posix_fallocate", "fsync"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, full)
            with pytest.raises(OSError, match="No space left"):
                convert([source], tmp_path / "target.pt", "torch")
        assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]


def nan_moment(saved: dict[str, Any]) -> None:
    saved["state"][17]["exp_avg"][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (nan_moment, "parameter 17: exp_avg has a value nan"),
        (lambda saved: saved["state"][3].pop("exp_avg_sq"), r"parameter 3 has state \['exp_avg', 'step'\]"),
        (lambda saved: saved["state"][0].update(exp_avg_sq=torch.ones(3)), "parameter 0: exp_avg_sq has shape"),
        (lambda saved: saved["state"].update({99: saved["state"][0]}), "99 that is in none of its param groups"),
        (lambda saved: saved["param_groups"][0].update(amsgrad=True), "no AMSGrad variant"),
    ],
)
def test_altered_state_leaves_nothing_behind(edit: Callable[[Any], object], words: str, tmp_path: Path) -> None:
    saved = saved_in("torch")
    edit(saved)
    source = written(saved, tmp_path / "source.pt")
    with pytest.raises(ValueError, match=words):
        convert([source], tmp_path / "target.pt", "8bit")
    assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]


def not_checkpoints() -> Iterator[tuple[str, bytes]]:
    def as_bytes(value: Any) -> bytes:
        file = io.BytesIO()
        torch.save(value, file)
        return file.getvalue()

    whole = as_bytes(saved_in("8bit"))
    yield from ((f"{size} bytes of it", whole[:size]) for size in (0, 1, 1000, len(whole) // 2, len(whole) - 1))
    yield "weights", as_bytes({"w": torch.ones(3)})
    yield "SGD", as_bytes(torch.optim.SGD(make_params(SHAPES), momentum=0.5).state_dict())
    yield "no groups", as_bytes({"state": {}, "param_groups": 3})
    yield "unhashable ids", as_bytes({"state": {}, "param_groups": [{"params": [[1]], "amsgrad": False}]})
    yield "an object", as_bytes(torch.nn.Linear(1, 1))


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    for name, content in not_checkpoints():
        (tmp_path / "source.pt").write_bytes(content)
        with pytest.raises(stored.NotACheckpointError, match=r"source\.pt.*accepted"):
            print(name, convert([tmp_path / "source.pt"], tmp_path / "target.pt", "8bit"))
        assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]


# ---------------------------------------------------------------- memory


def test_a_spool_keeps_what_is_put_in_and_is_gone_afterwards(tmp_path: Path) -> None:
    values = [torch.randn(1 << 20), torch.arange(7, dtype=torch.uint8), torch.empty(0, 3), torch.tensor(3)]
    values += [torch.randn(1 << 24), torch.randn(50, 30).t().bfloat16()]
    with Spool(tmp_path) as spool:
        held = [spool.put(value) for value in values]
    assert_same_bits(held, values)
    assert [t.untyped_storage().nbytes() for t in held] == [v.nbytes for v in values]
    assert list(tmp_path.iterdir()) == []


SIDE = 2048
COUNT = 6
LIMITED = """
import re, resource, sys
from pathlib import Path
import torch
from lowmem_adam import AdamW8bit, converting, foreign, stored
from lowmem_adam.checkpoint import read, write

folder, to, room, whole = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "whole"
torch.set_num_threads(1)
converting.convert([folder / "small.pt"], folder / "small-out.pt", to, force=True)
held = int(re.search(r"VmData:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + room, held + room))
if whole:
    saved = read(folder / "large.pt")
    groups = stored.new_stand_ins(saved, to, None, {})
    write(foreign.to_own(saved, groups), folder / "large-out.pt")
else:
    converting.convert([folder / "large.pt"], folder / "large-out.pt", to, force=True)
print("peak RSS", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts mapped memory on Linux only")
def test_memory_is_that_of_one_parameter(tmp_path: Path) -> None:
    """The kernel refuses any more private memory: the source's mapping, what one parameter takes, and a slack."""
    for name, count, side in (("small", 1, 64), ("large", COUNT, SIDE)):
        theirs = torch.optim.AdamW([Parameter(torch.zeros(side, side)) for _ in range(count)])
        for param in params_of(theirs):
            param.grad = torch.ones_like(param)
        theirs.step()
        torch.save(theirs.state_dict(), tmp_path / f"{name}.pt")
    size, numel = (tmp_path / "large.pt").stat().st_size, SIDE**2
    assert size >= 200e6
    slack = 24 * 2**20  # tiles of a million elements, an import, what the allocator keeps
    # Freed memory goes back to the system, so that the limit is one on what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "1"}

    def run(to: str, each: int, way: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, str(tmp_path), to, str(size + each * numel + slack), way]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    # Bytes an element: fp32 moments of ours, and of torch beside them; codes.
    for to, each in (("torch", 16), ("8bit", 2)):
        finished = run(to, each, "streaming")
        assert finished.returncode == 0, finished.stderr
    control = run("8bit", 2, "whole")
    assert control.returncode != 0
    assert "DefaultCPUAllocator" in control.stderr or "MemoryError" in control.stderr
