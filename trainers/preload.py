"""What a worker of any training stage imports; spare workers import this module while they wait."""

import importlib

MODULES = (
    "trainers.language_stage",
    "trainers.engine.deepspeed",
    "transformers.models.llama.modeling_llama",
    "peft",
)

for name in MODULES:
    importlib.import_module(name)
