"""Opens exported folders with the libraries' own classes and runs them: nothing of this project is imported here.

Usage: python -I stock_outputs.py REQUEST; REQUEST is a JSON list of {"folder", "what", "given", "output"}: `what` the
kind of model, `given` an npz of the inputs by name, `output` where the outputs go as .npy. A folder with an adapter
holds its base in `base`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

LANGUAGE = {
    "language_model": "AutoModelForCausalLM",
    "masked_model": "AutoModelForMaskedLM",
    "seq2seq_model": "AutoModelForSeq2SeqLM",
    "text_classifier": "AutoModelForSequenceClassification",
    "vision_language_model": "AutoModelForImageTextToText",
}
"""transformers' class of each kind; the others are `rnn` (torch's layers) and `ddpm` (diffusers' network)."""


def outputs(folder: Path, what: str, given: dict[str, np.ndarray]) -> np.ndarray:
    """Return the outputs of a folder's model on the inputs."""
    tensors = {name: torch.from_numpy(array) for name, array in given.items()}
    with torch.no_grad():
        if what == "rnn":
            found = _recurrent(folder, tensors["input_ids"])
        elif what == "ddpm":
            found = _network(folder)(**tensors).sample
        else:
            found = _language_model(folder, what)(**tensors).logits
    return found.float().numpy()


def _language_model(folder: Path, what: str) -> Any:
    import transformers

    is_adapter = (folder / "adapter_config.json").is_file()
    place = folder / "base" if is_adapter else folder
    assert transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)("The")["input_ids"]
    model = getattr(transformers, LANGUAGE[what]).from_pretrained(place, local_files_only=True, dtype=torch.float32)
    return _with_adapter(model, folder) if is_adapter else model.eval()


def _network(folder: Path) -> Any:
    import diffusers

    is_adapter = (folder / "adapter_config.json").is_file()
    place = folder / "base" if is_adapter else folder
    assert diffusers.DDPMScheduler.from_pretrained(place / "scheduler").config.num_train_timesteps == 50
    kind = json.loads((place / "unet" / "config.json").read_bytes())["_class_name"]
    network = getattr(diffusers, kind).from_pretrained(place / "unet", local_files_only=True)
    return _with_adapter(network, folder) if is_adapter else network.eval()


def _with_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).eval()


def _recurrent(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Run torch's own layers on a document, which starts with the end token (docs/families.md)."""
    from safetensors.torch import load_file

    config, tensors = json.loads((folder / "config.json").read_bytes()), load_file(folder / "model.safetensors")
    layers = torch.nn.LSTM(
        config["embedding_size"], config["hidden_size"], num_layers=config["num_hidden_layers"], batch_first=True
    )
    layers.load_state_dict({key.removeprefix("backbone.layers."): t for key, t in tensors.items() if ".layers." in key})
    embedding = tensors["backbone.embedding.weight"]
    start = torch.full((1, 1), config["eos_token_id"])
    hidden, _ = layers(embedding[torch.cat([start, ids], dim=1)])
    return hidden[:, 1:] @ tensors["backbone.projection.weight"].T @ embedding.T


def answer(asked: dict[str, str]) -> None:
    """Answer one item of a request."""
    with np.load(asked["given"]) as given:
        np.save(asked["output"], outputs(Path(asked["folder"]), asked["what"], dict(given)))


def main() -> None:
    """Answer a request."""
    for asked in json.loads(Path(sys.argv[1]).read_text()):
        answer(asked)
    own = {"recipes", "cluster", "trainers", "rlhf", "launch"} & set(sys.modules)
    assert not own, own


if __name__ == "__main__":
    main()
