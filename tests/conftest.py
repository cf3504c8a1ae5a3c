"""One thread, and the same examples at every run."""

from __future__ import annotations

import torch
from hypothesis import settings

settings.register_profile("losslab", deadline=None, derandomize=True)
settings.load_profile("losslab")
torch.set_num_threads(1)
