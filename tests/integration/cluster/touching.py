"""A module whose import calls the GPU driver, as far as `torch` can tell afterwards."""

import os
import sys
from types import ModuleType, SimpleNamespace

importer = os.getpid()
torch = ModuleType("torch")
torch.cuda = SimpleNamespace(_is_in_bad_fork=lambda: os.getpid() != importer)  # type: ignore[attr-defined]
sys.modules["torch"] = torch
