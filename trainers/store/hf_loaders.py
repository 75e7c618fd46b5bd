"""The one door to stock loaders: they see the checked files of a folder, and nothing that lies beside them.

`use_safetensors=True` alone does not keep pickle out. transformers also opens shards of any ending that an index names,
the file that `transformers_weights` of config.json names, and an adapter or a distributed checkpoint beside the model;
peft falls back to adapter_model.bin.
"""

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes.errors import RequestError
from trainers.store.untrusted_files import WEIGHTS, linked_file, read_json, refuse_code, weight_files

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def open_model(stock: Any, folder: Path, *, weights: str = WEIGHTS, **options: Any) -> Any:
    """Return what `stock.from_pretrained` makes of a folder; raises RequestError naming a file that it must not see."""
    files = weight_files(folder, linked_file, weights)
    for name in ("config.json", "generation_config.json"):
        if name == "config.json" or (folder / name).exists():
            refuse_code(folder, read_json(folder, name, linked_file), name)
            files[name] = linked_file(folder, name)
    with _alone(files) as place:
        return stock.from_pretrained(place, local_files_only=True, use_safetensors=True, **options)


def open_gguf_file(gguf_class: Any, file: Path, **options: Any) -> Any:
    """Return what transformers makes of a GGUF file: numbers and texts, whatever files are next to it."""
    with _alone({file.name: linked_file(file.parent, file.name)}) as place:
        return gguf_class.from_pretrained(place, gguf_file=file.name, local_files_only=True, **options)


def open_sentencepiece(tokenizer_class: Any, folder: Path, name: str) -> Any:
    """Return what transformers makes of a sentencepiece model, with what the folder's JSON says of it."""
    files = {name: linked_file(folder, name)}
    for text in ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / text).exists():
            refuse_code(folder, read_json(folder, text, linked_file), text)
            files[text] = linked_file(folder, text)
    with _alone(files) as place:
        return tokenizer_class.from_pretrained(place, local_files_only=True, trust_remote_code=False)


def open_adapter(model: Any, folder: Path) -> Any:
    """Return peft's model with a folder's adapter on it; raises RequestError naming a file that it must not see."""
    from peft import PeftModel

    config = read_json(folder, ADAPTER_CONFIG, linked_file)
    refuse_code(folder, config, ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise RequestError(f"{folder}/{ADAPTER_CONFIG}: peft_type is {config.get('peft_type')!r}; only LORA is opened")
    files = weight_files(folder, linked_file, ADAPTER_WEIGHTS)
    shown = {**files, ADAPTER_CONFIG: linked_file(folder, ADAPTER_CONFIG)}
    with _alone(shown) as place, warnings.catch_warnings():
        # Adapters that are there already stay below this one.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        # Of a tied pair the adapter's files hold both.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer")
        return PeftModel.from_pretrained(model, str(place))


@contextmanager
def _alone(files: Mapping[str, Path]) -> Iterator[Path]:
    """Give a folder that shows these files and no other."""
    with tempfile.TemporaryDirectory(prefix="trainwright-open-") as temporary:
        place = Path(temporary)
        for name, path in files.items():
            (place / name).symlink_to(path)
        yield place
