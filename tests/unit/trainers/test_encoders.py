"""Encoders: which tokens are hidden, classes of texts, pseudo-labels, and how sure a classifier may be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from recipes.data.tokenizers import TrainTokenizer
from recipes.errors import RequestError, StageError
from recipes.models.encoder import Bert, Corruption, PseudoLabels
from trainers.data.bad_row import BadRow
from trainers.data.batches import LabelledBatch, Texts, TokenBatch
from trainers.data.columns import convert
from trainers.data.dataset import BuildReport, Dataset
from trainers.data.labelled_batches import LabelledPlan, split_by_label
from trainers.data.layouts.labelled import Labelled
from trainers.data.masking import Masker
from trainers.data.tokenizer import Tokenization, tokenization_from_files, train_tokenizer
from trainers.evaluation.class_metrics import Predictions, calibration_error
from trainers.models.families import build_language_model
from trainers.models.load import load_model
from trainers.models.protocol import TokenizerFacts
from trainers.models.token_losses import MaskedTokenLosses
from trainers.objectives.classification import ClassificationObjective, ClassLosses


@pytest.fixture(scope="module")
def tokenization() -> Tokenization:
    spec = TrainTokenizer(train="bpe", vocab_size=330, cls_token="<|cls|>", mask_token="<|mask|>")
    return train_tokenizer(spec, [f"the quick number {n} jumps over number {n + 1}" for n in range(50)])


def test_a_text_stands_between_class_and_end_token(tokenization: Tokenization) -> None:
    ids = tokenization.encode("the number", special=True)
    assert ids[0] == tokenization.token_id("<|cls|>")
    assert ids[-1] == tokenization.eos_id
    assert tokenization.decode(ids) == "the number"
    again = tokenization_from_files(tokenization.files())
    assert again.mask_id == tokenization.mask_id
    assert again.encode("the number", special=True) == ids


def test_words_are_hidden_whole_and_specials_never(tokenization: Tokenization) -> None:
    ids = np.array(tokenization.encode("the quick zebras jump over 1234567 xylophones", special=True) * 40)
    segments = np.ones_like(ids)
    masker = Masker(Corruption(share=0.3, whole_words=True), tokenization, seed=0)
    shown, hidden = masker.hide(ids, segments, np.random.default_rng(0))
    special = np.isin(ids, list(tokenization.special_ids))
    assert not hidden[special].any()
    begins = tokenization.starts_word_V[ids] | np.roll(special, 1)
    word = begins.cumsum()
    inner = ~special & ~begins
    assert inner.any()
    assert (hidden[inner] == hidden[np.flatnonzero(inner) - 1]).all()
    assert 0.15 < hidden[~special].mean() < 0.45
    assert len(np.unique(word[hidden])) > 20
    assert (shown[~hidden] == ids[~hidden]).all()
    share = (shown[hidden] == tokenization.mask_id).mean()
    assert 0.7 < share < 0.9


def test_what_is_hidden_follows_from_the_key_alone(tokenization: Tokenization) -> None:
    ids = torch.from_numpy(np.tile(tokenization.encode("over the number 12", special=True), (3, 8)))
    rows = torch.tensor([4, 9, -1])
    batch = TokenBatch(ids, torch.ones_like(ids), torch.zeros_like(ids), torch.ones_like(ids).bool(), rows)
    masker = Masker(Corruption(), tokenization, seed=0)
    whole, part = masker.batch(batch, 5), masker.batch(TokenBatch(*(value[1:2] for value in vars(batch).values())), 5)
    assert torch.equal(whole.input_ids_BT[1], part.input_ids_BT[0])
    padding = torch.zeros(1, 5, dtype=torch.int64)
    wider = TokenBatch(
        torch.cat([ids[1:2], padding], dim=1),
        torch.cat([torch.ones_like(ids[1:2]), padding], dim=1),
        torch.zeros(1, ids.shape[1] + 5, dtype=torch.int64),
        torch.ones(1, ids.shape[1] + 5, dtype=torch.bool),
        rows[1:2],
    )
    assert torch.equal(masker.batch(wider, 5).input_ids_BT[0, :-5], part.input_ids_BT[0])
    assert not torch.equal(whole.input_ids_BT[0], whole.input_ids_BT[1])
    assert not torch.equal(masker.batch(batch, 6).input_ids_BT[0], whole.input_ids_BT[0])
    assert not whole.hidden_mask_BT[2].any(), "a filler has nothing to restore"


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    plain = train_tokenizer(TrainTokenizer(train="bpe", vocab_size=300), ["some text"])
    with pytest.raises(RequestError, match="names no mask_token"):
        Masker(Corruption(), plain, seed=0)


KEYS: dict[str, Any] = {
    "type": "bert",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def test_the_masked_loss_is_transformers_own_and_segments_are_apart(tokenization: Tokenization) -> None:
    facts = TokenizerFacts(tokenization.vocab_size, tokenization.eos_id, tokenization.pad_id)
    model: Any = build_language_model({"family": "encoder", **KEYS}, facts, seed=0, device=torch.device("cpu"))
    model.eval()
    counted = Bert(family="encoder", **KEYS).num_parameters(tokenization.vocab_size)
    assert sum(parameter.numel() for parameter in model.parameters()) == counted
    texts = [tokenization.encode(text, special=True) for text in ("the quick number", "over 12 jumps")]
    ids = torch.tensor([[*texts[0], *texts[1]]])
    segments = torch.tensor([[1] * len(texts[0]) + [2] * len(texts[1])])
    positions = torch.tensor([[*range(len(texts[0])), *range(len(texts[1]))]])
    packed = TokenBatch(ids, segments, positions, ids > 0, torch.tensor([0]))
    batch = Masker(Corruption(share=0.5), tokenization, seed=3).batch(packed, 0)
    assert batch.hidden_mask_BT.any()
    with torch.no_grad():
        found, _ = MaskedTokenLosses(model)(batch)
        wanted = 0.0
        for start, stop in ((0, len(texts[0])), (len(texts[0]), ids.shape[1])):
            logits = model(input_ids=batch.input_ids_BT[:, start:stop]).logits[0]
            mask, targets = batch.hidden_mask_BT[0, start:stop], ids[0, start:stop]
            wanted += float(nn.functional.cross_entropy(logits[mask], targets[mask], reduction="sum"))
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_the_dropout_of_a_classifier_takes_the_place_of_the_encoders_own(
    tokenization: Tokenization, tmp_path: Path
) -> None:
    facts = TokenizerFacts(tokenization.vocab_size, tokenization.eos_id, tokenization.pad_id)
    keys = {**KEYS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.05}
    model: Any = build_language_model({"family": "encoder", **keys}, facts, seed=0, device=torch.device("cpu"))
    model.save_pretrained(tmp_path)
    start: dict[str, Any] = {"device": torch.device("cpu"), "new_head_seed": 1, "classes": ("bad", "good")}
    kept = load_model(tmp_path, "text_classifier", **start)
    changed = load_model(tmp_path, "text_classifier", dropout=0.4, **start)
    assert {part.p for part in kept.modules() if isinstance(part, nn.Dropout)} <= {0.0, 0.05}
    assert {part.p for part in changed.modules() if isinstance(part, nn.Dropout)} == {0.4, 0.05}
    for one, other in zip(kept.parameters(), changed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["BertModel", "BertForPreTraining"])
def test_a_stock_encoder_is_a_start_of_both_stages(tmp_path: Path, name: str) -> None:
    """A bare one gets a head that follows from the seed; what a masked language model has not is left out."""
    import transformers

    keys = {key: value for key, value in KEYS.items() if key != "type"}
    torch.manual_seed(0)
    stock = getattr(transformers, name)(transformers.BertConfig(**keys, vocab_size=40))
    stock.save_pretrained(tmp_path)
    options: dict[str, Any] = {"device": torch.device("cpu"), "new_head_seed": 7}
    loaded = load_model(tmp_path, "masked_model", **options)
    again = load_model(tmp_path, "masked_model", **options)
    kept = {key.removeprefix("bert."): tensor for key, tensor in stock.state_dict().items()}
    for key, tensor in loaded.state_dict().items():
        if key.startswith("bert."):
            assert torch.equal(tensor, kept[key.removeprefix("bert.")])
        assert torch.equal(tensor, again.state_dict()[key])
    head = loaded.state_dict()["cls.predictions.transform.dense.weight"]
    other = load_model(tmp_path, "masked_model", device=torch.device("cpu"), new_head_seed=8)
    is_new = not torch.equal(head, other.state_dict()["cls.predictions.transform.dense.weight"])
    assert is_new == (name == "BertModel")
    classifier = load_model(tmp_path, "text_classifier", classes=("bad", "good"), **options)
    assert torch.equal(classifier.state_dict()["bert.pooler.dense.weight"], kept["pooler.dense.weight"])


def test_a_damaged_stock_encoder_is_refused(tmp_path: Path) -> None:
    """Only the head may be missing, and only where the class has none."""
    import transformers
    from safetensors.torch import load_file, save_file

    keys = {key: value for key, value in KEYS.items() if key != "type"}
    options: dict[str, Any] = {"device": torch.device("cpu"), "new_head_seed": 7}
    for name, missing in (
        ("BertModel", "encoder.layer.1.output.dense.weight"),
        ("BertForMaskedLM", "cls.predictions.transform.dense.weight"),
    ):
        folder = tmp_path / name
        getattr(transformers, name)(transformers.BertConfig(**keys, vocab_size=40)).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        del tensors[missing]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(StageError, match=f"missing: (bert.)?{missing}"):
            load_model(folder, "masked_model", **options)


def labelled_set(count: int = 60) -> Dataset:
    """Give texts of three tokens in two classes, every fifth without a label."""
    ids = np.random.default_rng(0).integers(5, 300, 3 * count)
    labels = np.arange(count) % 2
    labels[::5] = -1
    arrays = {"text_ids": ids, "text_offsets": np.arange(count + 1) * 3, "labels": labels}
    report = BuildReport(count, {"sequences": count})
    return Dataset("d", Labelled, report, arrays, 0, classes=("bad", "good"))


def batches(pseudo: PseudoLabels | None, tokenization: Tokenization, rank: int = 0, workers: int = 1) -> LabelledPlan:
    dataset = labelled_set()
    masker = Masker(Corruption(share=0.5), tokenization, seed=0)
    return LabelledPlan(
        dataset,
        *split_by_label(dataset, 0.5),
        pseudo,
        masker,
        seed=0,
        global_batch=4,
        workers=workers,
        rank=rank,
        micro_batch=2,
    )


def test_labels_are_used_by_share_and_the_others_are_left(tokenization: Tokenization) -> None:
    dataset = labelled_set()
    used, others = split_by_label(dataset, 0.5)
    assert sorted([*used, *others]) == list(range(60))
    assert 12 < len(used) < 36
    assert (dataset.arrays["labels"][used] >= 0).all()
    assert set(split_by_label(dataset, 0.2)[0]) < set(used), "a smaller share is a part of a larger one"
    with pytest.raises(RequestError, match=r"\(0 of 60 rows\)"):
        split_by_label(dataset, 1e-9)


def test_two_ranks_read_the_rows_of_one(tokenization: Tokenization) -> None:
    pseudo = PseudoLabels(ratio=2, warmup_steps=1)
    alone = batches(pseudo, tokenization).micro_batches(1)
    shared = [batches(pseudo, tokenization, rank, 2).micro_batches(1)[0] for rank in range(2)]
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.texts.input_ids_BT, other.texts.input_ids_BT)
        assert one.augmented is not None
        assert other.augmented is not None
        assert torch.equal(one.augmented.input_ids_BT, other.augmented.input_ids_BT)
        assert one.augmented.input_ids_BT.shape == (4, 3)
    assert batches(pseudo, tokenization).micro_batches(0)[0].unlabelled is None, "the warm-up has labels alone"


class Bias(nn.Module):
    """Gives the same logits to every text."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        class Output:
            logits = self.logits.expand(len(input_ids), -1)

        return Output


@pytest.mark.parametrize(("threshold", "counts"), [(0.7, True), (0.8, False)])
def test_only_confident_guesses_teach(threshold: float, counts: bool) -> None:
    pseudo = PseudoLabels(threshold=threshold, weight=2.0, ratio=2)
    logits = [0.0, float(np.log(3.0))]  # 0.25 and 0.75
    module = ClassLosses(Bias(logits), pseudo)
    texts = Texts(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool))
    two = Texts(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool))
    found = ClassificationObjective(pseudo).loss(
        module, LabelledBatch(texts, torch.tensor([0]), torch.tensor([7]), two, two)
    )
    own, guessed = -np.log(0.25), -np.log(0.75)
    assert float(found.loss_sum.detach()) == pytest.approx(own + (2.0 * 2 * guessed / 2 if counts else 0.0), rel=1e-5)
    assert float(found.metrics["pseudo_share"][0]) == (2 if counts else 0)


def test_figures_of_a_classifier_by_hand() -> None:
    labels, guesses = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    confidence = np.array([0.95, 0.95, 0.65, 0.65])
    found = Predictions(labels, guesses, confidence, np.ones(4), ("a", "b"))
    assert found.scalars()["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found.tables()["confusion"] == [[1, 1], [0, 2]]
    unseen = Predictions(labels, guesses, confidence, np.ones(4), ("a", "b", "c"))
    assert unseen.tables()["f1_of_class"] == {"a": 2 / 3, "b": 4 / 5, "c": 0.0}
    assert found.commonest_share() == 0.5
    # Two rows at 0.95 of which one is right, two at 0.65 that both are.
    assert calibration_error(confidence, labels == guesses) == pytest.approx((0.45 + 0.35) / 2)


@pytest.mark.parametrize("value", [1, "1", True, 1.0])
def test_a_label_is_text_or_a_whole_number(value: Any) -> None:
    assert convert({"text": "a", "label": value}, "labels", {}).columns["label"] in ("1", "True")


def test_labels_that_are_none_are_refused_or_unknown() -> None:
    assert convert({"text": "a", "label": None}, "labels", {}).columns["label"] is None
    assert convert({"text": "a"}, "labels", {}).columns["label"] is None
    with pytest.raises(BadRow, match="'label' is float"):
        convert({"text": "a", "label": 0.5}, "labels", {})
