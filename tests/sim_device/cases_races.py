"""Races between streams: reported where a wait is missing, whatever came first, and only there."""

from __future__ import annotations

import torch

from tests import sim_device as sim
from tests.sim_device.cases_waits import DEVICE, losses, new_stream, recorded, zeros_pinned


def found(*words: str) -> bool:
    """Whether there is exactly one race, told with these words; forgets it."""
    races = sim.races()
    sim.clear_races()
    assert len(races) <= 1, races
    assert not races or all(word in races[0] for word in words), (races, words)
    return bool(races)


def case_copy_of_what_another_stream_computes() -> None:
    for waits in (False, True):
        gradient, buffer, side = torch.zeros(4, device=DEVICE), zeros_pinned(4), new_stream()
        side.wait_stream(torch.accelerator.current_stream())
        gradient += 7
        if waits:
            side.wait_stream(torch.accelerator.current_stream())
        with side:
            buffer.copy_(gradient, non_blocking=True)
        side.synchronize()
        assert found("copy to the host on stream", "reads bytes 0 to 16", "aten::add on stream 0", "writes") != waits


def case_use_of_what_another_stream_copies() -> None:
    for waits in (False, True):
        parameter, up = torch.zeros(4, device=DEVICE), new_stream()
        up.wait_stream(torch.accelerator.current_stream())
        with up:
            parameter.copy_(torch.ones(4).pin_memory(), non_blocking=True)
        if waits:
            torch.accelerator.current_stream().wait_event(recorded(up))
        parameter + 1
        assert found("aten::add on stream 0 reads", "copy to the device") != waits
        up.synchronize()  # freeing it before would be another race


def case_copy_over_what_another_stream_still_reads() -> None:
    # Hold mode cannot show this one: what is computed here has read its operands when it is queued.
    for waits in (False, True):
        parameter, up = torch.zeros(4, device=DEVICE), new_stream()
        torch.accelerator.synchronize()
        parameter + 1
        if waits:
            up.wait_stream(torch.accelerator.current_stream())
        with up:
            parameter.copy_(torch.ones(4).pin_memory(), non_blocking=True)
        assert found("copy to the device", "writes", "aten::add on stream 0, which reads") != waits
        up.synchronize()


def case_memory_freed_before_another_stream_copied_it() -> None:
    for how in ("nothing", "record_stream", "wait_stream", "host"):
        gradient, buffer, side = torch.full((4,), 7.0, device=DEVICE), zeros_pinned(4), new_stream()
        side.wait_stream(torch.accelerator.current_stream())
        with side:
            buffer.copy_(gradient, non_blocking=True)
        if how == "record_stream":
            gradient.record_stream(side)
        elif how == "wait_stream":
            torch.accelerator.current_stream().wait_stream(side)
        elif how == "host":
            recorded(side).synchronize()
        del gradient
        assert found("freeing on stream 0", "copy to the host") == (how == "nothing")
        side.synchronize()


def case_order_leads_through_the_host_and_other_streams() -> None:
    target, first, second = torch.zeros(4, device=DEVICE), new_stream(), new_stream()
    default = torch.accelerator.current_stream()
    for wait in ("event", "stream", "device", "blocking copy", "query", "streams"):
        first.wait_stream(default)
        with first:
            target.mul_(2)
            if wait == "blocking copy":
                target.cpu()
        if wait == "event":
            recorded(first).synchronize()
        elif wait == "stream":
            first.synchronize()
        elif wait == "device":
            torch.accelerator.synchronize()
        elif wait == "query":
            event = recorded(first)
            while not event.query():
                pass
        elif wait == "streams":
            second.wait_stream(first)
            default.wait_event(recorded(second))
        target.add_(1)
        assert sim.races() == [], wait


def case_parts_of_one_buffer_and_readers_do_not_meet() -> None:
    flat, side = torch.zeros(8, device=DEVICE), new_stream()
    side.wait_stream(torch.accelerator.current_stream())
    flat[:4].add_(1)
    with side:
        flat[4:].add_(1)
    assert sim.races() == []
    torch.accelerator.synchronize()
    flat + 1
    with side:
        flat + 1
    assert sim.races() == []
    with side:
        flat[3:5].add_(1)
    assert found("writes bytes 12 to 20", "reads bytes 0 to 32")


def case_pinned_buffer_passed_from_copy_to_copy() -> None:
    for waits in (False, True):
        buffer, down, up = zeros_pinned(4), new_stream(), new_stream()
        source, target = torch.ones(4, device=DEVICE), torch.zeros(4, device=DEVICE)
        torch.accelerator.synchronize()
        with down:
            buffer.copy_(source, non_blocking=True)
        if waits:
            up.wait_stream(down)
        with up:
            target.copy_(buffer, non_blocking=True)
        torch.accelerator.synchronize()
        assert found("copy to the device", "pinned memory", "copy to the host") != waits


def case_offloaded_optimizer_races_where_it_forgets_a_stream() -> None:
    for held in (False, True):
        (sim.hold if held else sim.release)()
        losses(DEVICE)
        assert sim.races() == []
        for forgets in ("the computation", "to record the stream", "the parameter"):
            losses(DEVICE, forgets)
            assert sim.races() != [], forgets
            sim.clear_races()
