"""What every test starts from: one thread, a fixed seed, torch's own defaults."""

import os
from collections.abc import Iterator

# Before torch is imported, and inherited by every process a test starts: two gloo ranks with a thread pool each
# on a machine of two cores spend their time waiting for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an accelerator, and there is none")


@pytest.fixture(autouse=True)
def torch_defaults() -> Iterator[None]:
    """Start with seed 0 and one thread, and undo what the test changes in torch's global settings.

    One thread because the tensors of tests are small: starting a parallel region costs more than it saves, and
    sums taken by one thread do not depend on the number of cores. Tests of threading set their own number.
    """
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    grad_enabled, deterministic = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad_enabled)
    torch.use_deterministic_algorithms(deterministic)
