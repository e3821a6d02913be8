"""State in files and for other optimizers, with shards and without."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_adam import Adam8bit, AdamW8bit, checkpoint
from lowmem_adam.foreign import FORMATS
from lowmem_adam.shard_tensor import ShardTensor
from tests.cases import FEW, assert_same_bits, copied, differ, everything, make_params, params_of, train
from tests.ranks import NEEDS_GLOO, on_ranks


def trained(seed: int = 0, **settings: Any) -> AdamW8bit:
    opt = AdamW8bit(make_params(FEW, seed=seed), lr=0.01, **settings)
    train(opt, params_of(opt), 2, seed)
    return opt


def test_a_file_holds_the_state_to_the_bit(tmp_path: Path) -> None:
    opt, other = trained(), trained(seed=1)
    checkpoint.save(opt, tmp_path / "state.pt")
    assert differ(opt.state_dict(), other.state_dict())
    checkpoint.load(other, tmp_path / "state.pt")
    assert_same_bits(opt.state_dict(), other.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opt, path = trained(), tmp_path / "state.pt"
    checkpoint.save(opt, path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    train(opt, params_of(opt), 1)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, full)
            with pytest.raises(OSError, match="No space left"):
                checkpoint.save(opt, path)
        assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]
    with pytest.raises(FileNotFoundError):
        checkpoint.save(opt, tmp_path / "absent" / "state.pt")


@pytest.mark.parametrize("size", [0, 1, 100, 0.5, 0.999])
def test_a_truncated_file_is_named_and_changes_nothing(tmp_path: Path, size: float) -> None:
    opt, path = trained(), tmp_path / "state.pt"
    checkpoint.save(opt, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: size if isinstance(size, int) else int(size * len(whole))])
    before = everything(opt)
    with pytest.raises(ValueError, match=r"state\.pt cannot be read: .*; accepted: a whole file made by save"):
        checkpoint.load(opt, path)
    assert_same_bits(everything(opt), before)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    opt, path = trained(), tmp_path / "state.pt"
    before = everything(opt)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(opt, path)
    torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="state_dict has no 'state'"):
        checkpoint.load(opt, path)
    torch.save(opt, path)  # more than tensors
    with pytest.raises(ValueError, match=r"state\.pt cannot be read"):
        checkpoint.load(opt, path)
    assert_same_bits(everything(opt), before)


def test_state_goes_to_torch_and_comes_back() -> None:
    opt = trained()
    theirs = torch.optim.AdamW(copied_params(opt))
    given = checkpoint.export(opt)
    assert given is not None
    theirs.load_state_dict(copied(given))  # which it does not copy itself
    train(theirs, params_of(theirs), 1)
    back = AdamW8bit(copied_params(opt))
    back.load_state_dict(given)
    assert_same_bits(back.state_dict(), opt.state_dict())
    l2 = checkpoint.export(Adam8bit(make_params(FEW)), format="torch")
    assert l2 is not None
    torch.optim.Adam(make_params(FEW)).load_state_dict(l2)
    with pytest.raises(ValueError, match="format is 'numpy'; accepted: 'torch', 'bitsandbytes'"):
        checkpoint.export(opt, format="numpy")


def copied_params(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [torch.nn.Parameter(copied(param)) for param in params_of(opt)]


def test_one_ranks_part_of_a_tensor_is_copied_and_nothing_else() -> None:
    part = ShardTensor(torch.arange(4.0), (2, 3), 1)
    for other in (part.clone(), copy.deepcopy(part)):
        assert isinstance(other, ShardTensor)
        assert_same_bits(other.local, part.local)
    calls: tuple[Callable[[], object], ...] = (
        lambda: part + 1,
        lambda: torch.cat([part, part]),
        lambda: torch.zeros(2, 3).add_(part),
        lambda: part.sum(),
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match="one rank's part of a tensor; accepted: copies"):
            call()
    with pytest.raises(RuntimeError, match="cannot be pickled; accepted"):
        pickle.dumps(part)


# ---------------------------------------------------------------- two ranks


def job(rank: int, folder: Path) -> Any:
    """Files and other formats, of sharded moments."""
    opt = trained(shard_group="world")
    checkpoint.save(opt, folder / "state.pt", to=1)
    exported = {kind: checkpoint.export(opt, format=kind, to=1) for kind in FORMATS}
    assert all((value is None) == (rank == 0) for value in exported.values())
    torch.distributed.barrier()
    other = trained(seed=1, shard_group="world")
    checkpoint.load(other, folder / "state.pt")
    if rank == 1:
        torch.save(exported, folder / "exported.pt")
    torch.distributed.barrier()
    imported = {}
    for kind, state in torch.load(folder / "exported.pt", weights_only=True).items():
        fresh = AdamW8bit(make_params(FEW), shard_group="world")
        fresh.load_state_dict(state)
        imported[kind] = fresh.consolidate_state_dict()
        assert (
            sum(v.nbytes for s in fresh.state.values() for v in s.values())
            < 0.7 * opt.memory_report()["total_bytes"] * 2
        )
    # A rank that writes nothing learns of a write that fails, and a copy saves as what it was copied from.
    with pytest.raises((FileNotFoundError, RuntimeError), match=r"absent|refuses"):
        checkpoint.save(opt, folder / "absent" / "state.pt")
    assert_same_bits(copy.deepcopy(opt).state_dict(), opt.state_dict())
    # Settings that have come apart are named, and nobody waits.
    opt.param_groups[0]["lr"] = 0.1 * (rank + 1)
    with pytest.raises(RuntimeError, match=r"lr 0\.1; rank 1 has param group 0: lr 0\.2"):
        opt.state_dict()
    plain = trained()
    plain.check_replicas()
    with torch.no_grad():
        params_of(plain)[0].view(-1)[0] += rank
    with pytest.raises(RuntimeError, match="replicas differ"):
        plain.check_replicas()
    return {"loaded": other.consolidate_state_dict(), "imported": imported}


@NEEDS_GLOO
def test_files_and_other_formats_of_sharded_moments(tmp_path: Path) -> None:
    first, second = on_ranks(2, job, tmp_path)
    assert second == {"loaded": None, "imported": dict.fromkeys(FORMATS)}
    opt = trained()
    assert_same_bits(first["loaded"], opt.state_dict())
    exported = torch.load(tmp_path / "exported.pt", weights_only=True)
    for kind in FORMATS:
        assert_same_bits(exported[kind], checkpoint.export(opt, format=kind))
        fresh = AdamW8bit(make_params(FEW))
        fresh.load_state_dict(exported[kind])
        assert_same_bits(first["imported"][kind], fresh.state_dict())
