"""What any training stage imports; a worker imports this once, and forks its runs from there."""

import importlib

MODULES = (
    "trainers.tasks.language_model",
    "trainers.engine.deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # what DeepSpeed imports when it builds an engine: torch's compiler
    "transformers.models.llama.modeling_llama",
    "peft",
)

for name in MODULES:
    importlib.import_module(name)
