"""What a stage that starts from an adapter sees of it: opened unmerged, as stages do, and from the merged files.

    python benchmarks/unmerged.py ARTIFACT ROWS.jsonl [--columns instruction output] [--rows 16] [--store URI]

ARTIFACT (RUN/STAGE, an address or a name) has an adapter; ROWS are texts that it did not learn from. `live` is the
model that the artifact's stage ended with: the whole model below and every adapter on it, by stock peft in fp32. It is
compared with what stages open in fp32 and in bf16, with the merged files, and with the start, which lacks the last
adapter. Printed are the perplexity, and the distance of the logits from the live ones over the distance of the start's:
1 has lost all that was learned.
"""

import argparse
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from launch.records.artifacts import find_artifact
from trainers.data.tokenizer import load_tokenization
from trainers.models.load import load_model
from trainers.models.stack import load_exact
from trainers.store.adapters import Weights, weights_of, whole_part
from trainers.store.hf_loaders import open_adapter
from trainers.store.store import Store

CPU = torch.device("cpu")
MAX_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("rows_file", type=Path)
    parser.add_argument("--columns", nargs="+", default=["instruction", "output"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--store")
    chosen = parser.parse_args()
    store = Store.open(chosen.store)
    manifest = find_artifact(store, chosen.artifact)
    merged, weights = store.folder(manifest, whole_part(manifest)), weights_of(store, manifest)
    if not weights.adapters:
        raise SystemExit(
            f"{chosen.artifact} is opened by its own files: {weights.note or 'they keep its updates whole'}"
        )
    with chosen.rows_file.open() as lines:
        records = [json.loads(line) for line in islice(lines, chosen.rows)]
    tokenization = load_tokenization(merged)
    texts = ["\n".join(record[column] for column in chosen.columns) for record in records]
    rows = [torch.tensor([tokenization.encode(text)[:MAX_TOKENS]]) for text in texts]
    sides: dict[str, Callable[[], nn.Module]] = {
        "opened in fp32": lambda: load_exact(weights, "language_model", device=CPU),
        "opened in bf16": lambda: load_exact(weights, "language_model", device=CPU, dtype=torch.bfloat16),
        "merged files in fp32": lambda: load_model(merged, "language_model", device=CPU),
        "merged files in bf16": lambda: load_model(merged, "language_model", device=CPU, dtype=torch.bfloat16),
        "start": lambda: by_stock_peft(weights, len(weights.adapters) - 1),
    }
    live = forward(by_stock_peft(weights, len(weights.adapters)), rows)
    distances = {}
    print(f"{'':22} perplexity")
    print(f"{'live':22} {perplexity(live, rows):10.4f}")
    for name, build in sides.items():
        logits = forward(build(), rows)
        distances[name] = distance(logits, live)
        print(f"{name:22} {perplexity(logits, rows):10.4f}", flush=True)
    for name, value in distances.items():
        print(f"{name:22} lost {value / distances['start']:.2g} of what was learned")


def by_stock_peft(weights: Weights, count: int) -> Any:
    """The whole model in the precision that the adapters were trained on, and the first of these, by stock classes."""
    model: Any = AutoModelForCausalLM.from_pretrained(weights.folder, dtype=getattr(torch, weights.dtype)).float()
    for folder in weights.adapters[:count]:
        model = open_adapter(model, folder).merge_and_unload()
    return model


@torch.no_grad()
def forward(model: Any, rows: list[Tensor]) -> list[Tensor]:
    """Each row's logits."""
    model.eval()
    return [model(input_ids=row, use_cache=False).logits[0].float() for row in rows]


def perplexity(logits: list[Tensor], rows: list[Tensor]) -> float:
    """Over all tokens of the rows."""
    losses = [
        nn.functional.cross_entropy(own[:-1], row[0, 1:], reduction="none")
        for own, row in zip(logits, rows, strict=True)
    ]
    return float(torch.cat(losses).double().mean().exp())


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Root of the mean squared difference of logits."""
    squares = [(a - b).double().square().mean(dim=-1) for a, b in zip(one, other, strict=True)]
    return float(torch.cat(squares).mean().sqrt())


if __name__ == "__main__":
    main()
