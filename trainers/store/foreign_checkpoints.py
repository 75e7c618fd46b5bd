"""Checkpoints of transformers' Trainer, DeepSpeed and FSDP: what they hold besides a model, how parts become one."""

import json
from pathlib import Path

from recipes.errors import RequestError

STATE = "trainer_state.json"
_BESIDES = {
    "optimizer.pt": "the optimiser's moments",
    "optimizer.bin": "the optimiser's moments",
    "scheduler.pt": "the learning rate's place in its schedule",
    "scaler.pt": "the scale of losses in fp16",
    "rng_state.pth": "the state of random generators",
    "rng_state_0.pth": "the state of random generators",
}
"""Files that torch pickled, which are never opened here."""


def refuse_shards(folder: Path) -> None:
    """Raise RequestError with the command that makes a model of a checkpoint whose weights are split over ranks."""
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("global_step*")) or any(folder.glob("zero_pp_rank_*")):
        command = f"python {folder}/zero_to_fp32.py {folder} OUT --safe_serialization"
        raise RequestError(f"{folder} is a checkpoint of DeepSpeed in parts; make a model of it first: {command}")
    if any(folder.glob("pytorch_model_fsdp_*")):
        command = f"accelerate merge-weights {folder}/pytorch_model_fsdp_0 OUT"
        raise RequestError(f"{folder} is a checkpoint of FSDP in parts; make a model of it first: {command}")


def left_behind(folder: Path) -> list[str]:
    """Return what of a Trainer's checkpoint an import does not take, a line each; none for other folders."""
    if not (folder / STATE).is_file():
        return []
    try:
        state = json.loads((folder / STATE).read_bytes())
        steps = f"step {state['global_step']} of {state['max_steps']}"
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{folder}/{STATE}: not the state of a Trainer ({error})") from None
    found = {what: name for name, what in _BESIDES.items() if (folder / name).is_file()}
    lost = [f"{what} ({name})" for what, name in found.items()]
    listed = f"not taken: {', '.join(lost)}" if lost else "nothing else is in it"
    return [f"a Trainer's checkpoint at {steps}: its weights are taken in; {listed}"]
