"""Encoders and encoder-decoders of every kind that transformers has: built, trained, saved, opened by stock classes.

Tiny random weights; that packed rows have the loss of single ones is measured with the table of types.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.data.tokenizers import TrainTokenizer
from recipes.models.model_kinds import ModelKind
from recipes.models.type_table import type_records
from recipes.stages.lora import Lora
from tests.tiers import tiered
from trainers.data.batches import LabelledBatch, Seq2SeqBatch, Texts
from trainers.data.masking import MaskedBatch
from trainers.data.tokenizer import Tokenization, train_tokenizer
from trainers.inference.generation import generate, sampling_settings
from trainers.models.encoder_decoder import TargetLosses
from trainers.models.families import build_language_model
from trainers.models.folders import file_tensors, probe, verify_folder, write_model
from trainers.models.load import classifier_parts, load_model
from trainers.models.lora import add_adapter
from trainers.models.protocol import TokenizerFacts
from trainers.models.tiny import tiny_keys
from trainers.models.token_losses import MaskedTokenLosses
from trainers.objectives.classification import ClassLosses

ENCODERS = ("bert", "roberta", "distilbert", "deberta-v2", "electra", "modernbert", "xlm-roberta")
ENCODER_DECODERS = ("t5", "mt5", "bart", "mbart", "marian", "pegasus")
QUICK = ("roberta", "deberta-v2", "electra", "mt5", "marian", "pegasus")
"""Those whose table entries and files differ most from each other's."""
TEXTS = ["the cat sat on the mat and looked at the moon", "two cats and one dog ran home", "it rained all day long"] * 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenization() -> Tokenization:
    """A tokenizer for all types."""
    return train_tokenizer(
        TrainTokenizer(train="bpe", vocab_size=300, cls_token="<|cls|>", mask_token="<|mask|>"), TEXTS
    )


def small(family: str, model_type: str, tokenization: Tokenization) -> Any:
    """A tiny model of a type, as a recipe builds it."""
    import transformers

    keys = tiny_keys(transformers.CONFIG_MAPPING[model_type])
    known = {name: value for name, value in keys.items() if name in type_records()[model_type].keys}
    facts = TokenizerFacts(tokenization.vocab_size, tokenization.eos_id, tokenization.pad_id, tokenization.bos_id)
    return build_language_model({"family": family, "type": model_type, **known}, facts, seed=0, device=CPU)


def rows_of(tokenization: Tokenization) -> list[Tensor]:
    return [torch.tensor(tokenization.encode(text)) for text in TEXTS[:3]]


def padded(rows: list[Tensor], tokenization: Tokenization) -> tuple[Tensor, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenization.pad_id)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask


def step(losses: Any, batch: Any, parameters: Any = None) -> None:
    """One step of training makes the loss smaller."""

    def loss() -> Tensor:
        found = losses(batch)
        if isinstance(found, dict):
            return found["losses"].sum()
        return found[0] if isinstance(found, tuple) else found

    before = loss()
    before.backward()
    learning = [part for part in losses.parameters() if part.requires_grad] if parameters is None else parameters
    torch.optim.AdamW(learning, lr=1e-3).step()
    assert loss().item() < before.item()


def written(model: Any, kind: ModelKind, tokenization: Tokenization, folder: Path) -> None:
    """Write a model and verify its files."""
    live = probe(model, kind, model.named_parameters())
    tensors = file_tensors(model, dict(model.named_parameters())).items()
    write_model(folder, kind, model.config, tensors, tokenization.files(), dtype=torch.float32)
    verify_folder(folder, kind, live)


def adapted(folder: Path, kind: ModelKind, losses: Any, batch: Any) -> None:
    """An adapter learns alone."""
    model = load_model(folder, kind, device=CPU)
    add_adapter(model, Lora(r=2), seed=1)
    step(losses(model), batch)


@pytest.mark.parametrize("model_type", tiered(ENCODERS, QUICK))
def test_an_encoder_restores_words_and_tells_classes(
    model_type: str, tokenization: Tokenization, tmp_path: Path
) -> None:
    import transformers

    model, rows = small("encoder", model_type, tokenization), rows_of(tokenization)
    ids, mask = padded(rows, tokenization)
    positions = torch.arange(ids.shape[1])[None] * mask
    batch = MaskedBatch(ids, mask, positions, mask > 0, ids, torch.zeros(len(ids), dtype=torch.long))
    step(MaskedTokenLosses(model), batch)
    words = tmp_path / "words"
    written(model, "masked_model", tokenization, words)
    stock = transformers.AutoModelForMaskedLM.from_pretrained(words).eval()
    with torch.no_grad():
        ours = model.eval()(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(stock(input_ids=ids, attention_mask=mask).logits, ours, rtol=1e-4, atol=1e-4)
    adapted(words, "masked_model", MaskedTokenLosses, batch)

    classifier: Any = load_model(
        words, "text_classifier", device=CPU, new_head_seed=1, classes=("no", "yes"), dropout=0
    )
    labelled = LabelledBatch(Texts(ids, mask.bool()), torch.tensor([0, 1, 0]), torch.arange(3))
    assert all(isinstance(classifier.get_submodule(part), torch.nn.Module) for part in classifier_parts(classifier))
    step(ClassLosses(classifier), labelled)
    kinds = tmp_path / "kinds"
    written(classifier, "text_classifier", tokenization, kinds)
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(kinds).eval()
    with torch.no_grad():
        ours = classifier.eval()(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(stock(input_ids=ids, attention_mask=mask).logits, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", tiered(ENCODER_DECODERS, QUICK))
def test_an_encoder_decoder_writes_targets(model_type: str, tokenization: Tokenization, tmp_path: Path) -> None:
    import transformers

    model, rows = small("encoder_decoder", model_type, tokenization), rows_of(tokenization)
    (sources, source_mask), (targets, target_mask) = padded(rows, tokenization), padded(rows[::-1], tokenization)
    batch = Seq2SeqBatch(sources, source_mask.bool(), targets, target_mask.bool(), torch.arange(3))
    step(TargetLosses(model), batch)
    folder = tmp_path / "spans"
    written(model, "seq2seq_model", tokenization, folder)
    stock: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    inputs = {"input_ids": sources, "attention_mask": source_mask, "decoder_input_ids": targets}
    with torch.no_grad():
        torch.testing.assert_close(stock(**inputs).logits, model.eval()(**inputs).logits, rtol=1e-4, atol=1e-4)
    ours: Any = load_model(folder, "seq2seq_model", device=CPU).eval()
    found = generate(ours, sources, source_mask.bool(), sampling_settings(tokenization, 6), None)
    for place, row in enumerate(rows):
        wanted = stock.generate(
            row[None], attention_mask=torch.ones_like(row)[None], max_new_tokens=6, do_sample=False, num_beams=1,
            pad_token_id=tokenization.pad_id, eos_token_id=tokenization.eos_id,
        )[0, 1:]  # fmt: skip
        assert found.tokens_BR[place][found.response_mask_BR[place]].tolist() == wanted.tolist()
    adapted(folder, "seq2seq_model", TargetLosses, batch)
