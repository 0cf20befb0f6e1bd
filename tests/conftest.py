"""Nothing here downloads: an attempt is an error. (This file also puts `tests/` on the import path.)"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
