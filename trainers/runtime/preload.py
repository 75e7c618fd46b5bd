"""What any training stage imports; a worker imports this once, and forks its runs from there."""

import importlib

import transformers.utils

MODULES = (
    "trainers.tasks.language_model",
    "trainers.engine.deepspeed",
    "torch._dynamo",  # what torch imports when it makes an optimiser
    "transformers.models.llama.modeling_llama",
    "peft",
)

# Losses of object detection alone use SciPy, and importing it takes half a second.
has_scipy, transformers.utils.is_scipy_available = transformers.utils.is_scipy_available, lambda: False
try:
    importlib.import_module("transformers.loss.loss_utils")
finally:
    transformers.utils.is_scipy_available = has_scipy

for name in MODULES:
    importlib.import_module(name)
