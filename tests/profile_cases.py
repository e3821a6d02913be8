"""Profiles on the simulated device (tests/sim_device): cases for a process that has it; each asserts."""

from __future__ import annotations

import torch

import lowmem_adam
from lowmem_adam import AdamW8bit
from lowmem_adam.profiling import Profile
from tests import sim_device as sim
from tests.cases import FEW, assert_same_bits, copied, make_params, params_of, tensors_held
from tests.offload_cases import BUCKET, WIDE, on_device, optimizer, pair, random_delays, set_gradients, take, values


def check(prof: Profile, steps: int) -> None:
    assert [record.step for record in prof.records] == list(range(1, steps + 1))
    for record in prof.records:
        assert sum(record.parts_ns.values()) == record.total_ns
        assert record.transfer_ns > 0
        assert record.step_ns > 0
        assert record.gather_ns == 0


def case_offloaded_steps_keep_their_bits() -> None:
    for taken in (False, True):
        _, alone = pair(FEW, torch.bfloat16)
        offloaded = optimizer(
            on_device(make_params(FEW, torch.bfloat16)), offload="cpu", bucket_cap_mb=BUCKET, offload_gradients=taken
        )
        with random_delays(), lowmem_adam.profile(offloaded) as prof:
            take(offloaded, range(5))
        take(alone, range(5))
        assert_same_bits(values(offloaded), values(alone), "parameters")
        assert_same_bits(copied(offloaded.state_dict()), copied(alone.state_dict()), "state")
        check(prof, 5)
        summary = prof.summary()
        assert summary["pinned_bytes"] == offloaded.memory_report()["pinned_bytes"] > 0
        sim.clear_races()


def case_a_stage_is_fetched_awaited_stepped_and_sent_back() -> None:
    """In the trace the kernel's calls are as many as buffers were filled, each between two transfers."""
    offloaded, _ = pair(WIDE)
    with lowmem_adam.profile(offloaded) as prof:
        take(offloaded, range(2))
    for segments in prof._segments:
        phases = [phase for phase, _, _ in segments]
        kernels = [index for index, phase in enumerate(phases) if phase == "step"]
        assert len(kernels) > 4
        for index in kernels[:-1]:  # the last one is of no buffer, and has nothing to send back
            assert phases[index - 2 : index + 2] == ["transfer", "check", "step", "transfer"], phases
    check(prof, 2)


def case_a_step_ends_when_its_copies_have_arrived() -> None:
    offloaded, _ = pair(WIDE, torch.bfloat16)
    numel = sum(param.numel() for param in params_of(offloaded))
    take(offloaded, range(1))
    with lowmem_adam.profile(offloaded) as prof:
        set_gradients(offloaded, 1)
        torch.accelerator.synchronize()
        sim.clear_log()
        sim.set_delay("to_device", 0.05)  # far longer than what is done after a step
        offloaded.step()
        arrived = sum(copy.bytes for copy in sim.copies() if copy.direction == "to_device" and copy.end is not None)
    assert arrived == 2 * numel
    check(prof, 1)


def case_parameters_in_the_devices_memory_and_one_profile_after_another() -> None:
    """A device that is waited for is that of the parameters; one without any is not asked for."""
    params = on_device(make_params(WIDE[:1]))
    opt = AdamW8bit([*params, *make_params(WIDE[2:])], offload="cpu")
    for _ in range(2):
        with lowmem_adam.profile(opt) as prof:
            take(opt, range(2))
        check(prof, 2)
        assert prof._devices == [params[0].device]


def case_steps_on_the_device_itself_are_waited_for() -> None:
    """Without offload; the reference's step, in torch's operators."""
    runs = []
    for watched in (True, False):
        opt = optimizer(on_device(make_params(WIDE[:1])), backend="reference")
        if watched:
            with lowmem_adam.profile(opt) as prof, random_delays():
                for step in range(3):
                    set_gradients(opt, step)
                    opt.step()
                    assert torch.accelerator.current_stream().query()
            assert all(sum(record.parts_ns.values()) == record.total_ns for record in prof.records)
            assert all(record.step_ns > 0 and record.transfer_ns == 0 for record in prof.records)
            assert len(prof.records) == 3
        else:
            take(opt, range(3))
        runs.append([*values(opt), *(tensor.cpu() for tensor in tensors_held(opt))])
    assert_same_bits(runs[0], runs[1])
