"""Whatever a chain makes leaves the store as folders that stock classes open, with the logits that it has here."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from launch.cli.main import app
from recipes.models.model_kinds import ModelKind
from rlhf.text.policy import backbone_states
from rlhf.text.reward_model import ScoreModel
from tests.e2e.shell import SmokeRun
from trainers.data.batches import SequenceBatch
from trainers.models.load import head_name
from trainers.models.stack import load_stack
from trainers.models.token_losses import hidden_states
from trainers.store.adapters import Weights, weights_of
from trainers.store.store import Store

pytestmark = pytest.mark.serial

TOKENS = torch.tensor([list(range(5, 29)), list(range(60, 36, -1))])
LIMIT = 1e-5

# (stage, part of the store whose files the project loads, arguments of the export, what stock classes open)
EXPORTS: list[tuple[str, str, tuple[str, ...], str]] = [
    ("base", "model", (), "language_model"),
    ("sft", "model", (), "language_model adapter"),
    ("sft", "model", ("--merge",), "language_model"),
    ("reward", "model", (), "score_model adapter"),
    ("reward", "model", ("--merge",), "score_model"),
    ("second_reward", "model", ("--part", "model"), "score_model"),
    ("policy", "actor", (), "language_model adapter"),
    ("policy", "actor", ("--merge",), "language_model"),
    ("policy", "critic", ("--part", "critic"), "value_model"),
]

# In this process the project does not exist.
STOCK = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("recipes", "cluster", "trainers", "rlhf", "launch"):
            raise ImportError(name + " does not exist here")
sys.meta_path.insert(0, Absent())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers import AutoTokenizer
classes = {
    "language_model": AutoModelForCausalLM,
    "score_model": AutoModelForSequenceClassification,
    "value_model": AutoModelForTokenClassification,
}
asked = json.load(sys.stdin)
ids = torch.tensor(asked["tokens"])
for folder, what in asked["exports"]:
    kind, _, adapter = what.partition(" ")
    labels = {} if kind == "language_model" else {"num_labels": 1}
    place = folder + "/base" if adapter else folder
    model = classes[kind].from_pretrained(place, dtype=torch.float32, **labels)
    if adapter:
        model = PeftModel.from_pretrained(model, folder)
    assert AutoTokenizer.from_pretrained(place)("print")["input_ids"]
    with torch.no_grad():
        print(json.dumps(model.eval()(ids).logits.double().tolist()))
"""


@contextmanager
def stock_classes() -> Iterator[Callable[[Sequence[tuple[Path, str]]], list[torch.Tensor]]]:
    """Logits of exported folders by stock classes alone, which a process imports while the folders are made."""
    command = [sys.executable, "-I", "-c", STOCK]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, cwd="/") as process:

        def logits(exports: Sequence[tuple[Path, str]]) -> list[torch.Tensor]:
            asked = {"tokens": TOKENS.tolist(), "exports": [(str(folder), what) for folder, what in exports]}
            out, errors = process.communicate(json.dumps(asked))
            assert process.returncode == 0, errors
            return [torch.tensor(json.loads(line)) for line in out.splitlines() if line.startswith("[[")]

        yield logits


@torch.no_grad()
def project_logits(weights: Weights, kind: ModelKind) -> torch.Tensor:
    """Logits by the forwards that the stages train with, under the adapters and the head that they bring."""
    model: Any = load_stack(weights, kind, device=torch.device("cpu"))
    model.eval()
    whole = torch.ones_like(TOKENS, dtype=torch.bool)
    match kind:
        case "language_model":
            positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
            logits: torch.Tensor = model.get_output_embeddings()(hidden_states(model, TOKENS, whole.long(), positions))
        case "score_model":
            logits = ScoreModel(model, head_name(model))(SequenceBatch(TOKENS, whole, whole))[:, None]
        case "value_model":
            logits = getattr(model, head_name(model))(backbone_states(model, TOKENS))
    return logits


def test_every_export_opens_with_stock_classes_and_gives_the_same_logits(smoke_run: SmokeRun, tmp_path: Path) -> None:
    store = Store.open(str(smoke_run.shell.store))
    made = {manifest.stage: manifest for manifest in store.list_artifacts()}
    exported = []
    with stock_classes() as stock_logits:
        for number, (stage, _, arguments, what) in enumerate(EXPORTS):
            folder = tmp_path / f"{number}-{stage}"
            address = ("--store", str(smoke_run.shell.store), f"{smoke_run.run}/{stage}", str(folder))
            done = CliRunner().invoke(app, ["store", "export", *address, *arguments])
            assert done.exit_code == 0, done.output
            exported.append((folder, what))
        found = stock_logits(exported)
    assert len(found) == len(EXPORTS)
    for (stage, part, _, what), theirs in zip(EXPORTS, found, strict=True):
        # What the store holds is what the stage had in memory: verified before the commit, in a process of its own.
        verified = made[stage].verification
        assert verified.how == "clean-process"
        assert verified.max_logit_difference is not None
        kind: Any = what.split()[0]
        if what.endswith("adapter"):  # in bf16 the merged model is rounded, the adapter is not
            weights = weights_of(store, made[stage])
        else:
            weights = Weights(store.folder(made[stage], part), (made[stage].digest,))
        wanted = project_logits(weights, kind)
        assert theirs.shape == wanted.shape
        assert float((theirs - wanted).abs().max()) <= LIMIT * max(1.0, float(wanted.abs().max())), (stage, what)
