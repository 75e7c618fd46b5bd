"""GGUF files become model folders."""

from pathlib import Path

import torch

from recipes.errors import RequestError
from trainers.models.gguf_open import open_gguf, read_metadata
from trainers.models.gguf_tokenizer import read_tokenizer
from trainers.store.hf_loaders import open_model

_END_OF_TURN = "tokenizer.ggml.eot_token_id"


def write_folder(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a folder of stock transformers, with its tokenizer and chat template.

    A file of floats keeps their type, quantised weights are stored in bf16. What stock transformers makes of the
    folder gives the logits of what it makes of the file, bit for bit; raises RequestError otherwise.
    """
    from transformers import AutoModelForCausalLM

    file = file.absolute()
    dtype = _stored_type(file)
    model = open_gguf(file, dtype)
    tokenizer = read_tokenizer(file)
    end_of_turn = read_metadata(file).get(_END_OF_TURN)
    if end_of_turn is not None and end_of_turn != tokenizer.eos_id:
        model.generation_config.eos_token_id = [tokenizer.eos_id, end_of_turn]
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    probe = probe_tokens(model.config.vocab_size)
    expected = logits(model.float(), probe)
    del model
    found = logits(open_model(AutoModelForCausalLM, folder, dtype=dtype).float(), probe)
    if not torch.equal(expected, found):
        difference = float((expected - found).abs().max())
        raise RequestError(f"{file}: the folder's logits differ from the file's by up to {difference:.3g}")


def probe_tokens(vocab_size: int, length: int = 64) -> torch.Tensor:
    """Return ids from all of a vocabulary, [2, length], to compare models by."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (2, length), generator=generator)


@torch.inference_mode()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return a model's logits, [rows, length, V], without dropout."""
    found: torch.Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    return found


def _stored_type(file: Path) -> torch.dtype:
    from transformers.integrations.gguf import GgufHeader

    try:
        return GgufHeader.from_file(str(file)).dtype or torch.bfloat16
    except ValueError:  # of a type of blocks that only the package gguf knows
        return torch.bfloat16
