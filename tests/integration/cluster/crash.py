"""A module whose import ends the process."""

import os

print("crashed on import", flush=True)
os._exit(7)
