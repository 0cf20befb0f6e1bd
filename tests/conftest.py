"""Nothing here downloads: an attempt is an error. (This file also puts `tests/` on the import path.)"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Triton's kernels run in its interpreter here, on CPU tensors; it decides when they are imported. Products of other
# tests never take them, because the paths of a CPU do not.
os.environ.setdefault("TRITON_INTERPRET", "1")
