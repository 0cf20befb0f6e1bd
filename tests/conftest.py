"""Nothing here downloads: an attempt is an error. (This file also puts `tests/` on the import path.)"""

import os
import sys
from collections.abc import Iterator

import pytest

# Several processes run tests at a time (pytest-xdist); each takes its share of the cores. The process that starts them
# sets nothing, because they would inherit it.
if _WORKERS := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(_WORKERS))))

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Triton's kernels run in its interpreter here, on CPU tensors; it decides when they are imported. Products of other
# tests never take them, because the paths of a CPU do not.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """What a test does to the number of threads (`svdquant bench --threads`) stays in it: sums depend on it."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    yield
    if torch and torch.get_num_threads() != before:
        torch.set_num_threads(before)
