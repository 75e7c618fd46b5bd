"""What stages commit opens with stock transformers and peft: ZeRO 0-3, tied and not, full and LoRA, LM and reward."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.small_chain import Case, SmallChain
from trainers.models.verification import Probe
from trainers.store.export import export
from trainers.store.store import Store

LIMIT = 1e-5
STEPS = 2
ALL = list(itertools.product((0, 1, 2, 3), (True, False), (True, False), ("chat", "judge")))
COVERING = [(0, True, True, "judge"), (1, False, False, "chat"), (2, True, False, "judge"), (3, False, True, "chat")]
"""Every value of every axis; the default tier opens what the quickstart exports (tests/e2e/test_exports.py)."""

Cell = tuple[int, bool, bool, str]


def name_of(cell: Cell) -> str:
    """A cell's name in the store."""
    zero, tied, lora, stage = cell
    return f"{stage}-zero{zero}-{'tied' if tied else 'untied'}-{'lora' if lora else 'full'}"


def cases(cells: list[Cell]) -> list[Case]:
    """The two bases, a model to put the reward heads on, and a case for each cell."""
    train = {"steps": STEPS, "global_batch": 4, "sequence_length": 32, "optimizer": {"lr": 1e-2}, "evaluation_rows": 4}
    made: list[Case] = []
    for number, tied in enumerate(sorted({tied for _, tied, _, _ in cells})):
        architecture = {
            "family": "decoder", "type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 128, "tie_word_embeddings": tied,
        }  # fmt: skip
        base = "base-tied" if tied else "base-untied"
        settings = {"architecture": architecture, "train": train, "shard": {}}
        plain = {"engine": "plain", "precision": "fp32"}
        fingerprint = f"{100 + number:064x}"
        made.append(
            Case(
                base, "base", base, workers=[1], shards=[plain], settings=settings, fingerprint=fingerprint,
                name_as=base,
            )
        )  # fmt: skip
    for number, cell in enumerate(cells):
        zero, tied, lora, stage = cell
        settings = {"train": train, "shard": {"engine": "deepspeed", "zero": zero}, "lora": {"r": 4} if lora else None}
        inputs, name = {"init_from": "base-tied" if tied else "base-untied"}, name_of(cell)
        fingerprint = f"{1000 + number:064x}"
        made.append(Case(name, stage, name, settings=settings, inputs=inputs, fingerprint=fingerprint, name_as=name))
    return made


@torch.no_grad()
def difference(model: torch.nn.Module, expected: Probe) -> float:
    """Largest difference of a stock model's logits from those of the model that was trained."""
    ids = torch.tensor([expected.token_ids])
    logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float().reshape(-1)
    wanted = torch.tensor(expected.outputs).reshape(-1)
    return float((logits[-wanted.numel() :] - wanted).abs().max())


def check(folder: Path, cells: list[Cell]) -> float:
    """Make every cell, export it, open it with the stock class; returns the largest difference."""
    found = SmallChain(folder).run(cases(cells))
    store = Store.open(str(folder / "store"))
    differences: list[float] = []
    for cell in cells:
        name, (_, tied, lora, stage) = name_of(cell), cell
        stock: Any = AutoModelForCausalLM if stage == "chat" else AutoModelForSequenceClassification
        manifest = store.resolve(name)
        probes = [
            Probe.from_bytes(store.objects.get_bytes(item["probe"]["sha256"])) for item in found[name].result.checks
        ]
        whole = export(store, manifest, folder / f"{name}-whole", merge=lora)
        opened = stock.from_pretrained(whole, dtype=torch.float32)
        assert json.loads((whole / "config.json").read_text())["tie_word_embeddings"] is tied
        if stage == "chat" and tied:
            assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight
        differences.append(difference(opened, probes[0]))
        if lora:
            adapter = export(store, manifest, folder / f"{name}-adapter")
            on = stock.from_pretrained(
                adapter / "base", dtype=torch.float32, **({} if stage == "chat" else {"num_labels": 1})
            )
            differences.append(difference(PeftModel.from_pretrained(on, str(adapter)), probes[0]))
        assert all(value < LIMIT for value in differences), f"{name}: {differences[-2:]}"
    return max(differences)


@pytest.mark.long
def test_a_covering_part_of_the_matrix_opens(tmp_path: Path, say: Callable[[str], None]) -> None:
    largest = check(tmp_path, COVERING)
    say(f"{len(COVERING)} of {len(ALL)} cells open with stock classes; largest logit difference {largest:.1e}")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_whole_matrix_opens(tmp_path: Path, say: Callable[[str], None]) -> None:
    largest = check(tmp_path, ALL)
    say(f"{len(ALL)} cells open with stock classes; largest logit difference {largest:.1e}")
