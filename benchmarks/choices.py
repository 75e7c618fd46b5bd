"""Multiple choice by log-likelihood: rows per CPU second of the shared forward, against a loop over every choice.

    python -m benchmarks.choices MODEL_FOLDER ROWS.jsonl --layout arc [--count 40]

Both sides read the same rows on one thread of the same process; the largest difference of a log-likelihood is printed.
"""

import argparse
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from recipes.stages.benchmarks.multiple_choice import LAYOUTS
from trainers.data.sources.json_lines import read_json_lines
from trainers.data.tokenizer import load_tokenization
from trainers.inference.likelihood import Scored, log_likelihoods, tokenized


@torch.no_grad()
def one_by_one(model: Any, cases: list[list[Scored]]) -> list[list[float]]:
    """Each choice in a separate forward pass, the straightforward way."""
    found = []
    for texts in cases:
        values = []
        for text in texts:
            ids = torch.tensor([text.tokens])
            logprobs = model(ids).logits[0].float().log_softmax(-1)
            places = range(text.start, len(text.tokens))
            values.append(sum(float(logprobs[place - 1, text.tokens[place]]) for place in places))
        found.append(values)
    return found


def main() -> None:
    """Measure both sides and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--layout", default="arc", choices=LAYOUTS)
    parser.add_argument("--count", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenization = load_tokenization(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    rows = islice(read_json_lines(arguments.rows), arguments.count)
    asked = [LAYOUTS[arguments.layout](row.columns) for row in rows]
    cases = [[tokenized(option.context, option.text, tokenization) for option in case.options] for case in asked]
    began = time.process_time()
    plain = one_by_one(model, cases)
    between = time.process_time()
    shared = {place: values for done in log_likelihoods(model, cases) for place, values in done.items()}
    ended = time.process_time()
    difference = max(
        abs(a.nats - b) for place, values in shared.items() for a, b in zip(values, plain[place], strict=True)
    )
    rates = [len(cases) / (between - began), len(cases) / (ended - between)]
    print(f"one by one {rates[0]:.2f} rows/s, shared {rates[1]:.2f} rows/s: {rates[1] / rates[0]:.2f} times")
    print(f"largest difference of a log-likelihood: {difference:.2g}")


if __name__ == "__main__":
    main()
