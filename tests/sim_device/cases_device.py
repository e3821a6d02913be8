"""What torch can do with the simulated device, and what the device tells about itself."""

from __future__ import annotations

import copy
import io
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests import sim_device as sim
from tests.sim_device.cases_waits import DEVICE, new_stream, recorded, zeros_pinned

MIB = 1 << 20


def trained(model: torch.nn.Module, device: str, inputs: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """The parameters after five steps of AdamW."""
    model, inputs = copy.deepcopy(model).to(device), inputs.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4, **options)
    for _ in range(5):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return [parameter.detach().cpu() for parameter in model.parameters()]


def case_training_equals_training_on_the_cpu_to_the_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).to(dtype)
        inputs = torch.randn(32, 8, dtype=dtype)
        for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
            expected = trained(model, "cpu", inputs, **options)
            for held in (False, True):
                (sim.hold if held else sim.release)()
                result = trained(model, DEVICE, inputs, **options)
                assert all(map(torch.equal, result, expected)), (dtype, options, held)


def case_a_transformer_is_trained_as_on_the_cpu() -> None:
    # Without biases: the gradient of a key's is 0 but for rounding, which Adam makes as large as any other.
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, bias=False)
    model = torch.nn.Sequential(torch.nn.Embedding(16, 8), layer, torch.nn.Linear(8, 16))
    tokens = torch.randint(0, 16, (4, 6))
    # Not to the bit: torch chooses other kernels of attention for the CPU.
    torch.testing.assert_close(trained(model, DEVICE, tokens), trained(model, "cpu", tokens))


def case_gradients_reach_hooks_on_the_device() -> None:
    model = torch.nn.Linear(4, 2).to(DEVICE)
    seen: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
    side = new_stream()
    side.wait_stream(torch.accelerator.current_stream())
    with side:  # backward runs on the stream of forward, and ends with this thread's stream waiting for it
        model(torch.ones(3, 4, device=DEVICE)).sum().backward()
    side.synchronize()
    assert seen["weight"].device == torch.device(DEVICE, 0)
    assert (seen["weight"].tolist(), seen["bias"].tolist()) == ([[3.0] * 4] * 2, [3.0] * 2)


def case_device_is_torchs_accelerator() -> None:
    assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator() == torch.device(DEVICE)
    assert (torch.accelerator.device_count(), torch.accelerator.current_device_index()) == (1, 0)
    assert torch.get_device_module(DEVICE).device_count() == 1
    assert torch.ones(1).to(DEVICE).device == torch.ones(1, device="sim:0").device
    with pytest.raises(RuntimeError, match="there is one device"):
        torch.accelerator.set_device_index(1)
    sim.load()  # once more does nothing


def case_streams_and_events_are_the_generic_ones() -> None:
    default, side = torch.accelerator.current_stream(), new_stream()
    assert (default.stream_id, default.device) == (0, torch.device(DEVICE, 0))
    assert side != default
    with side:
        assert torch.accelerator.current_stream() == side
    torch.accelerator.set_stream(side)
    assert torch.accelerator.current_stream() == side
    torch.accelerator.set_stream(default)
    assert torch.accelerator.current_stream() == default
    event = torch.Event(DEVICE)
    assert event.query()  # never recorded: nothing to wait for
    event.synchronize()
    side.wait_event(event)
    event.record(side)
    event.wait(default)
    default.wait_event(side.record_event())
    default.wait_stream(side)
    default.synchronize()
    assert event.query()
    assert side.query()
    assert len({new_stream().stream_id for _ in range(100)}) == 32


def case_events_measure_the_copies_between_them() -> None:
    sim.set_delay("to_host", 0.05)
    first, second = torch.Event(DEVICE, enable_timing=True), torch.Event(DEVICE, enable_timing=True)
    first.record()
    zeros_pinned(4).copy_(torch.ones(4, device=DEVICE), non_blocking=True)
    second.record()
    second.synchronize()
    assert first.elapsed_time(second) >= 50


def case_an_event_is_its_last_record() -> None:
    event, buffer = torch.Event(DEVICE), zeros_pinned(2)
    ones = torch.ones(2, device=DEVICE)
    with sim.holding():
        for part in (buffer[:1], buffer[1:]):
            part.copy_(ones[:1], non_blocking=True)
            event.record()
        event.synchronize()
        assert buffer.tolist() == [1.0, 1.0]


def case_copies_follow_one_another_on_a_stream_and_overlap_on_several() -> None:
    sim.set_delay("to_device", 0.4)
    targets = [torch.zeros(4, device=DEVICE) for _ in range(3)]
    for streams in ([new_stream()] * 3, [new_stream() for _ in range(3)]):
        sim.clear_log()
        with sim.holding():  # let go at the same moment
            for target, stream in zip(targets, streams, strict=True):
                with stream:
                    target.copy_(torch.ones(4).pin_memory(), non_blocking=True)
        torch.accelerator.synchronize()
        times = [(c.begin, c.end) for c in sim.copies() if c.begin is not None and c.end is not None]
        assert len(times) == 3
        assert all(end - begin >= 0.4 for begin, end in times)
        if streams[0] == streams[1]:
            assert all(second[0] >= first[1] for first, second in pairwise(times))
        else:
            assert max(begin for begin, _ in times) < min(end for _, end in times)


def case_delays_are_of_a_direction_and_a_size() -> None:
    def delays(size: int) -> list[float]:
        sim.clear_log()
        torch.zeros(size, dtype=torch.uint8).to(DEVICE).cpu()
        return [c.delay for c in sim.copies()]

    sim.set_delay("to_device", 0.01, bytes_per_second=MIB)
    assert delays(MIB // 16) == [0.01 + 1 / 16, 0]
    assert delays(MIB // 32) == [0.01 + 1 / 32, 0]
    sim.set_delay("to_host", bytes_per_second=2 * MIB)
    sim.set_delay("to_device")
    assert delays(MIB // 16) == [0, 1 / 32]
    for bad in (-1.0, -0.001):
        with pytest.raises(ValueError, match="not negative"):
            sim.set_delay("to_host", bad)
        with pytest.raises(ValueError, match="not negative"):
            sim.set_delay("to_host", random_seconds=bad)
    with pytest.raises(ValueError, match="a rate is positive"):
        sim.set_delay("to_host", bytes_per_second=0)


def case_random_delays_come_again_with_their_seed() -> None:
    def delays(seed: int) -> list[float]:
        sim.clear_log()
        sim.set_delay("to_device", 0.01, random_seconds=0.01, seed=seed)
        for _ in range(6):
            torch.zeros(1).to(DEVICE)
        assert all(c.begin is not None and c.end is not None and c.end - c.begin >= c.delay for c in sim.copies())
        return [c.delay for c in sim.copies()]

    assert delays(1) == delays(1) != delays(2)
    assert len(set(delays(1))) == 6
    assert all(0.01 <= delay <= 0.02 for delay in delays(1))


def case_log_tells_every_copy_over_the_bus() -> None:
    before = time.monotonic()
    side = new_stream()
    host = torch.ones(1000, dtype=torch.bfloat16).pin_memory()
    with side:
        device = host.to(DEVICE, non_blocking=True)
    side.synchronize()
    sim.mark("on the device")
    result = (device + device).float().to("cpu")
    assert result[0] == 2
    up, down = sim.copies()
    assert (up.direction, up.bytes, up.stream, up.blocking) == ("to_device", 2000, side.stream_id, False)
    assert (down.direction, down.bytes, down.stream, down.blocking) == ("to_host", 4000, 0, True)
    (mark,) = sim.marks()
    assert up.begin is not None
    assert up.end is not None
    assert down.end is not None
    times = [before, up.queued, up.begin, up.end, mark.time, down.queued, down.end, time.monotonic()]
    assert times == sorted(times)
    assert mark.name == "on the device"
    sim.clear_log()
    assert (sim.copies(), sim.marks()) == ([], [])


def case_log_is_kept_while_copies_are_queued() -> None:
    with sim.holding():
        zeros_pinned(4).copy_(torch.ones(4, device=DEVICE), non_blocking=True)
        assert sim.copies()[-1].end is None
        with pytest.raises(RuntimeError, match="copies are queued"):
            sim.clear_log()


def case_device_memory_is_counted() -> None:
    start = torch.accelerator.memory_allocated()
    assert start == sim.device_bytes()
    first = torch.empty(MIB, dtype=torch.uint8, device=DEVICE)
    second = torch.empty(2 * MIB, dtype=torch.uint8, device=DEVICE)
    assert torch.accelerator.memory_allocated() == start + 3 * MIB
    del second
    assert torch.accelerator.memory_allocated() == start + MIB
    assert torch.accelerator.max_memory_allocated() == sim.peak_device_bytes() == start + 3 * MIB
    torch.accelerator.reset_peak_memory_stats()
    assert torch.accelerator.max_memory_allocated() == start + MIB
    first.add_(1)  # computes in host memory, which is not the device's
    assert torch.accelerator.max_memory_allocated() == start + MIB
    first.untyped_storage().resize_(0)
    assert torch.accelerator.memory_allocated() == start


def case_pinned_memory_is_known_and_counted() -> None:
    start = sim.pinned_bytes()
    buffer = torch.empty(MIB, dtype=torch.uint8, pin_memory=True)
    assert buffer.is_pinned()
    assert buffer[5:7].is_pinned()
    assert torch.ones(3).pin_memory().is_pinned()
    assert not torch.ones(3).is_pinned()
    assert sim.pinned_bytes() == start + MIB
    again = torch.zeros(MIB, dtype=torch.uint8).pin_memory()
    assert again[0] == 0
    del buffer
    assert (sim.pinned_bytes(), sim.peak_pinned_bytes()) == (start + MIB, start + 2 * MIB)
    sim.reset_peaks()
    assert sim.peak_pinned_bytes() == start + MIB


def case_fresh_memory_is_poisoned() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert torch.empty(5, dtype=dtype, device=DEVICE).isnan().all().item()
        assert torch.empty(5, dtype=dtype, pin_memory=True).isnan().all()
    assert sim.poisoned(torch.empty(5, device=DEVICE))
    assert not sim.poisoned(torch.zeros(5, device=DEVICE))


def case_freed_memory_is_poisoned() -> None:
    for make in (lambda: torch.zeros(64, device=DEVICE), lambda: zeros_pinned(64)):
        kept = make()
        torch.accelerator.synchronize()
        address = kept.data_ptr()
        assert not sim.poisoned_at(address, 256)
        del kept
        assert sim.poisoned_at(address, 256)


def case_pinned_buffer_lives_until_its_copy_is_done() -> None:
    start, target = sim.pinned_bytes(), torch.zeros(4, device=DEVICE)
    torch.accelerator.synchronize()
    with sim.holding():
        buffer = torch.full((4,), 5.0).pin_memory()
        target.copy_(buffer, non_blocking=True)
        del buffer
        assert sim.pinned_bytes() == start + 16
        assert target.tolist() == [5.0] * 4


def case_pinned_memory_can_be_refused() -> None:
    sim.limit_pinned(sim.pinned_bytes() + 100)
    first = torch.empty(100, dtype=torch.uint8, pin_memory=True)
    with pytest.raises(RuntimeError, match="no pinned memory to be had"):
        torch.empty(1, pin_memory=True)
    with pytest.raises(RuntimeError, match="no pinned memory to be had"):
        torch.ones(1).pin_memory()
    del first
    assert torch.empty(25, pin_memory=True).is_pinned()
    sim.limit_pinned(0)
    with pytest.raises(RuntimeError, match="no pinned memory to be had"):
        torch.empty(1, pin_memory=True)
    torch.empty(1)
    torch.ones(3, device=DEVICE).cpu()


def case_a_lost_device_refuses_everything() -> None:
    device, buffer, event = torch.ones(4, device=DEVICE), zeros_pinned(4), torch.Event(DEVICE)
    event.record()
    sim.lose(after_copies=2)
    buffer.copy_(device, non_blocking=True)
    device.copy_(buffer, non_blocking=True)
    refused: dict[str, Callable[[], Any]] = {
        "to_host": lambda: buffer.copy_(device, non_blocking=True),
        "to_device": lambda: device.copy_(buffer, non_blocking=True),
        "blocking": device.cpu,
        "on the device": lambda: device.clone(),
        "compute": lambda: device + 1,
        "item": device[0].item,
        "event": event.synchronize,
        "query": event.query,
        "stream": torch.accelerator.current_stream().synchronize,
        "device": torch.accelerator.synchronize,
    }
    for what, action in refused.items():
        with pytest.raises(RuntimeError, match="the device is lost"):
            action()
        assert len(sim.copies()) == 2, what
    sim.find_again()
    assert (device + 1).tolist() == [2.0] * 4


def case_a_failing_operator_leaves_the_device_as_it_was() -> None:
    with pytest.raises(RuntimeError, match="must match"):
        torch.ones(3, device=DEVICE) + torch.ones(4, device=DEVICE)
    sim.clear_log()
    torch.ones(3, device=DEVICE).cpu()
    assert len(sim.copies()) == 1


def case_types_and_layouts_are_copied_and_converted() -> None:
    values = torch.randn(6, 4)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        there = values.to(DEVICE).to(dtype)
        assert torch.equal(there.cpu(), values.to(dtype))
        assert torch.equal(there.to("cpu", torch.float32), values.to(dtype).float())
        assert torch.equal(values.to(DEVICE, dtype).t()[1:, ::2].cpu(), values.to(dtype).t()[1:, ::2])
        pinned = torch.empty(4, 6, dtype=dtype, pin_memory=True)
        pinned.copy_(values.to(DEVICE).t(), non_blocking=True)
        torch.accelerator.synchronize()
        assert torch.equal(pinned, values.t().to(dtype))
    assert torch.equal(torch.zeros(6, 4, device=DEVICE).copy_(values[:, :1]).cpu(), values[:, :1].expand(6, 4))
    assert torch.zeros(0, device=DEVICE).cpu().numel() == 0


def case_views_share_memory() -> None:
    flat = torch.zeros(12, device=DEVICE)
    parts = flat[2:8].view(2, 3), flat.view(torch.int32), flat.unfold(0, 2, 2)
    parts[0].t()[1].fill_(1)
    assert flat.tolist() == [0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0]
    assert all(part.untyped_storage().data_ptr() == flat.data_ptr() for part in parts)
    parameter = torch.nn.Parameter(torch.zeros(2, 2, device=DEVICE))
    parameter.data = flat[8:12].view_as(parameter)
    with torch.no_grad():
        parameter.add_(5)
    assert flat[8:].tolist() == [5.0] * 4


def case_tensors_are_saved_and_copied() -> None:
    model = torch.nn.Linear(3, 2).to(DEVICE)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    for where, device in ((None, "sim:0"), ("cpu", "cpu")):
        file.seek(0)
        weight = torch.load(file, weights_only=True, map_location=where)["weight"]
        assert str(weight.device) == device
        assert torch.equal(weight.cpu(), model.weight.cpu())
    assert torch.equal(copy.deepcopy(model).weight.cpu(), model.weight.cpu())


def case_autocast_and_its_scaler_work() -> None:
    model = torch.nn.Linear(4, 4).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    for factor in (torch.inf, 1.0):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.float16):
            output = model(torch.ones(2, 4, device=DEVICE))
        assert output.dtype == torch.float16
        (scaler.scale(output.float().sum()) * factor).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert bool(optimizer.state) == (factor == 1)
    assert model.bias.grad is not None
    assert (scaler.get_scale(), model.bias.grad.tolist()) == (2.0, [2.0] * 4)


def case_work_recorded_by_one_thread_is_waited_for_by_another() -> None:
    buffer, source, event = zeros_pinned(4), torch.ones(4, device=DEVICE), torch.Event(DEVICE)
    torch.accelerator.synchronize()
    with sim.holding():
        buffer.copy_(source, non_blocking=True)
        event.record()
        seen: list[float] = []

        def wait() -> None:
            event.synchronize()
            seen.extend(buffer.tolist())

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
        assert seen == [1.0] * 4


def case_stream_of_a_thread_is_its_own() -> None:
    ids: list[int] = []
    with new_stream():
        thread = threading.Thread(target=lambda: ids.append(torch.accelerator.current_stream().stream_id))
        thread.start()
        thread.join()
    assert ids == [0]


def case_event_waited_for_by_a_stream_is_not_waited_for_by_the_host() -> None:
    target, side = torch.zeros(4, device=DEVICE), new_stream()
    torch.accelerator.synchronize()
    with sim.holding():
        target.copy_(torch.ones(4).pin_memory(), non_blocking=True)
        event = recorded(torch.accelerator.current_stream())
        side.wait_event(event)
        assert not event.query()
