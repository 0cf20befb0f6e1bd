"""The paths that this CPU has, one after the other."""

import cpu_truth
import pytest


@pytest.fixture(params=cpu_truth.PATHS)
def path(request):
    """A variant of the native library, or "dequantize" where there is none; the products of the test run on it."""
    with cpu_truth.running(request.param):
        yield request.param


@pytest.fixture
def threads():
    """Sets torch's number of threads; afterwards it is as before."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
