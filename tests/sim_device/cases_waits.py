"""Forgotten waits: what each of them shows in hold mode, and that nothing shows where the wait is there."""

from __future__ import annotations

import time

import torch

from tests import sim_device as sim

DEVICE = "sim"


def new_stream() -> torch.Stream:
    return torch.Stream(device=DEVICE)


def recorded(stream: torch.Stream) -> torch.Event:
    event = torch.Event(DEVICE)
    event.record(stream)
    return event


def zeros_pinned(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, pin_memory=True).zero_()


def held_upload(target: torch.Tensor, value: float) -> tuple[torch.Stream, torch.Event]:
    """A copy to the device on a stream of its own, and the event behind it."""
    stream = new_stream()
    with stream:
        target.copy_(torch.full(target.shape, value).pin_memory(), non_blocking=True)
    return stream, recorded(stream)


def case_host_reads_a_copy_before_its_event() -> None:
    gradient = torch.full((1000,), 3.0, device=DEVICE)
    torch.accelerator.synchronize()
    buffer = zeros_pinned(1000)
    with sim.holding():
        buffer.copy_(gradient, non_blocking=True)
        event = recorded(torch.accelerator.current_stream())
        early = buffer.sum().item()
        event.synchronize()
        assert (early, buffer.sum().item()) == (0.0, 3000.0)


def case_device_uses_a_parameter_before_its_copy_back() -> None:
    for waits in (False, True):
        parameter = torch.zeros(4, device=DEVICE)
        with sim.holding():
            _, event = held_upload(parameter, 3.0)
            if waits:
                torch.accelerator.current_stream().wait_event(event)
            assert (parameter + 1).tolist() == [4.0 if waits else 1.0] * 4


def case_parameter_that_never_held_anything_is_nan_before_its_copy() -> None:
    parameter = torch.empty(4, device=DEVICE)
    with sim.holding():
        _, event = held_upload(parameter, 3.0)
        assert (parameter + 1).isnan().all().item()
        torch.accelerator.current_stream().wait_event(event)
        assert (parameter + 1).tolist() == [4.0] * 4


def case_pinned_buffer_is_written_before_its_copy_to_the_device() -> None:
    for waits in (False, True):
        target, buffer = torch.zeros(4, device=DEVICE), zeros_pinned(4)
        with sim.holding():
            buffer.fill_(5)
            target.copy_(buffer, non_blocking=True)
            if waits:
                recorded(torch.accelerator.current_stream()).synchronize()
            buffer.fill_(9)
            assert target.tolist() == [5.0 if waits else 9.0] * 4


def case_side_stream_does_not_wait_for_the_computation() -> None:
    for waits in (False, True):
        gradient, buffer, side = torch.zeros(4, device=DEVICE), zeros_pinned(4), new_stream()
        with sim.holding():
            gradient += 7  # on the default stream
            if waits:
                side.wait_stream(torch.accelerator.current_stream())
            with side:
                buffer.copy_(gradient, non_blocking=True)
            side.synchronize()
            assert buffer.tolist() == [7.0 if waits else 0.0] * 4


def case_gradient_is_zeroed_before_its_copy_to_the_host() -> None:
    for waits in (False, True):
        gradient, buffer, side = torch.full((4,), 7.0, device=DEVICE), zeros_pinned(4), new_stream()
        default = torch.accelerator.current_stream()
        side.wait_stream(default)
        with sim.holding():
            with side:
                buffer.copy_(gradient, non_blocking=True)
            if waits:
                default.wait_stream(side)
            gradient.zero_()
            assert (gradient + 1).tolist() == [1.0] * 4
            side.synchronize()
            assert buffer.tolist() == [7.0 if waits else 0.0] * 4


def case_memory_is_freed_before_another_stream_copied_it() -> None:
    for recorded_on_side in (False, True):
        gradient, buffer, side = torch.full((4,), 7.0, device=DEVICE), zeros_pinned(4), new_stream()
        side.wait_stream(torch.accelerator.current_stream())
        torch.accelerator.synchronize()
        before = torch.accelerator.memory_allocated()
        with sim.holding():
            with side:
                buffer.copy_(gradient, non_blocking=True)
            if recorded_on_side:
                gradient.record_stream(side)
            del gradient
            assert torch.accelerator.memory_allocated() == before - 16
            side.synchronize()
            assert buffer.isnan().all() if not recorded_on_side else buffer.tolist() == [7.0] * 4


def case_memory_freed_on_its_own_stream_is_safe() -> None:
    buffer = zeros_pinned(4)
    with sim.holding():
        gradient = torch.full((4,), 7.0, device=DEVICE)
        buffer.copy_(gradient, non_blocking=True)
        del gradient
        recorded(torch.accelerator.current_stream()).synchronize()
        assert buffer.tolist() == [7.0] * 4


def case_waits_lead_through_streams() -> None:
    target, first, second, third = torch.zeros(4, device=DEVICE), *(new_stream() for _ in range(3))
    torch.accelerator.synchronize()
    with sim.holding():
        with first:
            target.copy_(torch.ones(4).pin_memory(), non_blocking=True)
        second.wait_stream(first)
        with second:
            target.mul_(3)
        third.wait_stream(second)
        buffer = zeros_pinned(4)
        with third:
            buffer.copy_(target, non_blocking=True)
        assert buffer.tolist() == [0.0] * 4
        recorded(third).synchronize()
        assert buffer.tolist() == [3.0] * 4


def case_every_kind_of_wait_lets_held_work_go_on() -> None:
    def device(stream: torch.Stream) -> None:
        torch.accelerator.synchronize()

    def stream_query(stream: torch.Stream) -> None:
        while not stream.query():
            time.sleep(0.001)

    def event_query(stream: torch.Stream) -> None:
        event = recorded(stream)
        while not event.query():
            time.sleep(0.001)

    def blocking_copy(stream: torch.Stream) -> None:
        with stream:
            torch.ones(1, device=DEVICE).cpu()

    def item(stream: torch.Stream) -> None:
        with stream:
            torch.ones(1, device=DEVICE).item()

    waits = (torch.Stream.synchronize, device, stream_query, event_query, blocking_copy, item)
    for wait in waits:
        gradient, buffer, side = torch.full((4,), 7.0, device=DEVICE), zeros_pinned(4), new_stream()
        torch.accelerator.synchronize()
        with sim.holding():
            with side:
                buffer.copy_(gradient, non_blocking=True)
            assert buffer.tolist() == [0.0] * 4, wait
            wait(side)
            assert buffer.tolist() == [7.0] * 4, wait


def case_waiting_for_one_stream_leaves_the_others_held() -> None:
    gradient, buffer, side = torch.full((4,), 7.0, device=DEVICE), zeros_pinned(4), new_stream()
    torch.accelerator.synchronize()
    with sim.holding():
        with side:
            buffer.copy_(gradient, non_blocking=True)
        assert gradient.tolist() == [7.0] * 4  # a blocking copy on the default stream
        torch.accelerator.current_stream().synchronize()
        assert buffer.tolist() == [0.0] * 4
        assert not recorded(side).query()


def case_release_lets_everything_go_on() -> None:
    buffer = zeros_pinned(4)
    gradient = torch.full((4,), 7.0, device=DEVICE)
    torch.accelerator.synchronize()
    sim.hold()
    buffer.copy_(gradient, non_blocking=True)
    event = recorded(torch.accelerator.current_stream())
    sim.release()
    while not event.query():
        time.sleep(0.001)
    assert buffer.tolist() == [7.0] * 4


def case_copies_from_and_to_memory_that_is_not_pinned_need_no_wait() -> None:
    with sim.holding():
        source = torch.full((4,), 5.0)
        target = source.to(DEVICE, non_blocking=True)
        source.fill_(9)
        assert torch.zeros(4).copy_(target, non_blocking=True).tolist() == [5.0] * 4


def case_non_blocking_to_the_cpu_gives_pinned_memory_which_needs_one() -> None:
    source = torch.full((4,), 5.0, device=DEVICE)
    with sim.holding():
        result = source.to("cpu", non_blocking=True)
        assert result.is_pinned()
        assert result.isnan().all()
        torch.accelerator.synchronize()
        assert result.tolist() == [5.0] * 4


class Offloaded:
    """AdamW on the host with a wait left out on request: what the simulated device is there to test."""

    def __init__(self, model: torch.nn.Module, forgets: str) -> None:
        self.forgets = forgets
        self.parameters = list(model.parameters())
        self.down, self.up = new_stream(), new_stream()
        self.masters = [p.detach().cpu().pin_memory() for p in self.parameters]
        self.gradients = [zeros_pinned(*p.shape) for p in self.parameters]
        self.events = [torch.Event(DEVICE) for _ in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=0.1)
        for index, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(lambda p, index=index: self.fetch(index, p))

    def fetch(self, index: int, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if self.forgets != "the computation":
            self.down.wait_stream(torch.accelerator.current_stream())
        with self.down:
            self.gradients[index].copy_(parameter.grad, non_blocking=True)
        if self.forgets != "to record the stream":
            parameter.grad.record_stream(self.down)
        self.events[index].record(self.down)
        parameter.grad = None

    def step(self) -> None:
        for index, master in enumerate(self.masters):
            if self.forgets != "the gradient":
                self.events[index].synchronize()
            master.grad = self.gradients[index]
        self.up.synchronize()  # it may still read the masters
        self.optimizer.step()
        with self.up, torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(master, non_blocking=True)
        if self.forgets != "the parameter":
            torch.accelerator.current_stream().wait_stream(self.up)


def losses(device: str, forgets: str = "") -> list[float]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).to(device)
    x, y = torch.randn(32, 8).to(device), torch.randn(32, 1).to(device)
    plain = torch.optim.AdamW(model.parameters(), lr=0.1) if device == "cpu" else Offloaded(model, forgets)
    seen = []
    for _ in range(4):
        loss = (model(x) - y).square().mean()
        loss.backward()
        plain.step()
        model.zero_grad()
        seen.append(loss.detach())
    return [loss.item() for loss in seen]


def case_offloaded_optimizer_with_all_its_waits_is_the_plain_one() -> None:
    expected = losses("cpu")
    assert losses(DEVICE) == expected
    with sim.holding():
        assert losses(DEVICE) == expected
    sim.set_delay("to_host", random_seconds=0.01, seed=1)
    sim.set_delay("to_device", random_seconds=0.01)
    assert losses(DEVICE) == expected


def case_offloaded_optimizer_with_a_wait_left_out_is_another_one() -> None:
    expected = losses("cpu")
    for forgets in ("the computation", "the gradient", "to record the stream", "the parameter"):
        with sim.holding():
            assert losses(DEVICE, forgets) != expected, forgets
