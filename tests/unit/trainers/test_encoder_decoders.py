"""Encoder-decoders: which spans are hidden, the loss of targets, and what is written greedily and by beams."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from recipes.data.tokenizers import TrainTokenizer
from recipes.errors import RequestError, StageError
from recipes.models.encoder_decoder import SpanCorruption
from recipes.tokenizers.sentinels import count_sentinels
from trainers.data.batches import Seq2SeqBatch, TokenBatch, build_seq2seq_batch
from trainers.data.span_corruption import SpanCorrupter, hidden_spans, random_division
from trainers.data.tokenizer import Tokenization, tokenization_from_files, train_tokenizer
from trainers.evaluation.translation import Translations, Written, corpus_scores, write_targets
from trainers.inference.filling import fill_spans
from trainers.models.encoder_decoder import TargetLosses
from trainers.models.families import build_language_model
from trainers.models.folders import probe, verify_folder, write_model
from trainers.models.load import load_model
from trainers.models.protocol import TokenizerFacts
from trainers.objectives.seq2seq import Seq2SeqObjective

DEVICE = torch.device("cpu")
TYPES: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0},
    "bart": {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 32,
        "dropout": 0.0,
    },
}


@pytest.fixture(scope="module")
def tokenization() -> Tokenization:
    spec = TrainTokenizer(train="bpe", vocab_size=330, num_sentinels=5)
    return train_tokenizer(spec, [f"the quick number {n} jumps over number {n + 1}" for n in range(50)])


def build(kind: str, tokenization: Tokenization, seed: int = 0) -> Any:
    facts = TokenizerFacts(tokenization.vocab_size, tokenization.eos_id, tokenization.pad_id)
    keys = {"family": "encoder_decoder", "type": kind, **TYPES[kind]}
    return build_language_model(keys, facts, seed=seed, device=DEVICE).eval()


def test_sentinels_are_special_tokens_in_their_order(tokenization: Tokenization) -> None:
    ids = tokenization.sentinel_ids
    assert ids == [tokenization.token_id(f"<extra_id_{number}>") for number in range(5)]
    assert set(ids) <= tokenization.special_ids
    assert tokenization_from_files(tokenization.files()).sentinel_ids == ids
    assert count_sentinels({"<extra_id_0>", "<extra_id_2>"}) == 1


@pytest.mark.parametrize(
    ("length", "density", "mean", "hidden", "spans"),
    [
        (20, 0.15, 3.0, 3, 1),
        (100, 0.15, 3.0, 15, 5),
        (10, 0.5, 1.0, 5, 5),
        (10, 0.8, 1.0, 8, 2),  # two tokens are shown, and each span follows one
        (3, 0.15, 3.0, 1, 1),
        (2, 0.99, 3.0, 1, 1),
        (1, 0.5, 3.0, 0, 0),
        (0, 0.5, 3.0, 0, 0),
    ],
)
def test_how_much_is_hidden_by_hand(length: int, density: float, mean: float, hidden: int, spans: int) -> None:
    corruption = SpanCorruption(noise_density=density, mean_span_length=mean)
    assert (corruption.num_noise_tokens(length), corruption.num_spans(length)) == (hidden, spans)
    found = hidden_spans(length, corruption, 100, np.random.default_rng(0))
    assert len(found) == spans
    assert sum(stop - start for start, stop in found) == hidden
    before = 0
    for start, stop in found:
        assert before < start < stop, "a span follows tokens that are shown"
        before = stop
    assert not found or before == length, "a sequence ends with a span"


def test_fewer_sentinels_make_fewer_and_longer_spans() -> None:
    found = hidden_spans(100, SpanCorruption(), 2, np.random.default_rng(0))
    assert len(found) == 2
    assert sum(stop - start for start, stop in found) == 15


def test_every_division_is_equally_likely() -> None:
    rng = np.random.default_rng(0)
    drawn = [tuple(random_division(4, 2, rng)) for _ in range(3000)]
    shares = {division: drawn.count(division) / 3000 for division in set(drawn)}
    assert shares.keys() == {(1, 3), (2, 2), (3, 1)}
    assert all(abs(share - 1 / 3) < 0.05 for share in shares.values())


def test_source_and_target_of_a_hidden_text_by_hand(
    tokenization: Tokenization, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.data.span_corruption.hidden_spans", lambda *_: [(1, 3), (5, 6)])
    first, second, *_ = tokenization.sentinel_ids
    eos = tokenization.eos_id
    corrupter = SpanCorrupter(SpanCorruption(), tokenization, seed=0)
    source, target = corrupter.hide(np.array([101, 102, 103, 104, 105, 106, 107, eos]), np.random.default_rng(0))
    assert source.tolist() == [101, first, 104, 105, second, 107, eos]
    assert target.tolist() == [first, 102, 103, second, 106, eos]


def test_what_is_hidden_follows_from_the_key_alone(tokenization: Tokenization) -> None:
    ids = torch.from_numpy(np.tile(tokenization.encode("over the number 12", special=True), (3, 4)))
    rows = torch.tensor([4, 9, -1])
    batch = TokenBatch(ids, torch.ones_like(ids), torch.zeros_like(ids), torch.ones_like(ids).bool(), rows)
    corrupter = SpanCorrupter(SpanCorruption(noise_density=0.4), tokenization, seed=0)
    whole = corrupter.batch(batch, 5)
    part = corrupter.batch(TokenBatch(*(value[1:2] for value in vars(batch).values())), 5)
    assert torch.equal(whole.source_ids_BS[1][whole.source_mask_BS[1]], part.source_ids_BS[0])
    assert torch.equal(whole.target_ids_BT[1][whole.target_mask_BT[1]], part.target_ids_BT[0])
    assert not torch.equal(whole.source_ids_BS[0], whole.source_ids_BS[1])
    assert not torch.equal(corrupter.batch(batch, 6).source_ids_BS[0], whole.source_ids_BS[0])
    assert not whole.target_mask_BT[2].any(), "a filler has nothing to write"
    assert Seq2SeqObjective().weight(whole) == float(whole.target_mask_BT[:2].sum())


def test_a_tokenizer_without_sentinels_is_refused() -> None:
    plain = train_tokenizer(TrainTokenizer(train="bpe", vocab_size=300), ["some text"])
    with pytest.raises(RequestError, match="has no token <extra_id_0>"):
        SpanCorrupter(SpanCorruption(), plain, seed=0)


def pairs(tokenization: Tokenization) -> Seq2SeqBatch:
    """Two sources and targets of unequal lengths, and a filler."""
    eos = tokenization.eos_id
    texts = [("the quick number 7", "jumps"), ("over", "number over number 12"), ("over", "number")]
    sources, targets = (
        [np.array([*tokenization.encode(text), eos]) for text in side] for side in zip(*texts, strict=True)
    )
    return build_seq2seq_batch(sources, targets, tokenization.pad_id, torch.tensor([0, 1, -1]))


@pytest.mark.parametrize("kind", TYPES)
def test_the_loss_is_transformers_own_whatever_the_padding(tokenization: Tokenization, kind: str) -> None:
    model, batch = build(kind, tokenization), pairs(tokenization)
    with torch.no_grad():
        found = float(TargetLosses(model)(batch))
        wanted = 0.0
        for row in range(2):
            source = batch.source_ids_BS[row][batch.source_mask_BS[row]][None]
            labels = batch.target_ids_BT[row][batch.target_mask_BT[row]][None]
            wanted += float(model(input_ids=source, labels=labels).loss) * labels.numel()
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_bias_on_the_logits_is_refused(tokenization: Tokenization) -> None:
    model = build("bart", tokenization)
    model.final_logits_bias += 1
    with pytest.raises(StageError, match="final_logits_bias is not zero"):
        TargetLosses(model)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_deeper_decoder_writes_as_its_forward_says(tokenization: Tokenization, num_beams: int) -> None:
    """T5's configuration counts the encoder's layers alone; caches have to have the decoder's."""
    facts = TokenizerFacts(tokenization.vocab_size, tokenization.eos_id, tokenization.pad_id)
    keys = {"family": "encoder_decoder", "type": "t5", **TYPES["t5"], "num_layers": 1, "num_decoder_layers": 3}
    model: Any = build_language_model(keys, facts, seed=0, device=DEVICE).eval()
    ids, mask = pairs(tokenization).source_ids_BS[:1], pairs(tokenization).source_mask_BS[:1]
    (found,) = write_targets(model, ids, mask, tokenization, num_beams=num_beams, max_new_tokens=5)
    if num_beams == 1:
        decoder_ids = torch.tensor([[model.config.decoder_start_token_id, *found[:-1]]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=decoder_ids).logits
        assert logits.argmax(-1)[0].tolist() == found
    assert 0 < len(found) <= 5


@pytest.mark.parametrize("kind", TYPES)
def test_greedy_and_beams_write_what_transformers_does_row_by_row(tokenization: Tokenization, kind: str) -> None:
    model, batch = build(kind, tokenization, seed=3), pairs(tokenization)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)  # so that beams and greedy differ
    ids, mask = batch.source_ids_BS, batch.source_mask_BS
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9}
    written = {}
    for beams in (1, 4):
        written[beams] = write_targets(model, ids, mask, tokenization, num_beams=beams, max_new_tokens=9)
        for row in range(3):
            alone = model.generate(ids[row][mask[row]][None], num_beams=beams, **options)[0, 1:].tolist()
            assert written[beams][row] == alone[: len(written[beams][row])]
            assert set(alone[len(written[beams][row]) :]) <= {tokenization.pad_id}
    assert written[1] != written[4]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("num_beams", [1, 4])
def test_rows_without_a_token_are_never_written(tokenization: Tokenization, kind: str, num_beams: int) -> None:
    """T5's embedding has 32,128 rows, its tokenizer 32,100 tokens."""
    model, batch, known = build(kind, tokenization, seed=3), pairs(tokenization), tokenization.vocab_size
    search: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": 9}
    wanted = write_targets(model, batch.source_ids_BS, batch.source_mask_BS, tokenization, **search)
    torch.manual_seed(0)
    model.resize_token_embeddings(known + 28, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[known:] *= 1000
    found = write_targets(model, batch.source_ids_BS, batch.source_mask_BS, tokenization, **search)
    assert found == wanted


def test_an_untied_head_stays_one(tokenization: Tokenization, tmp_path: Path) -> None:
    """As in T5 1.1 and Flan: T5Config says that head and embedding are one, whatever the files hold."""
    keys = {key: value for key, value in TYPES["t5"].items() if key != "dropout_rate"}
    stock = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=40, **keys))
    stock.save_pretrained(tmp_path / "stock")
    tensors = load_file(tmp_path / "stock" / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(40, 16)
    save_file(tensors, tmp_path / "stock" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "stock" / "config.json").read_text()) | {"tie_word_embeddings": False}
    config.pop("scale_decoder_outputs", None)
    (tmp_path / "stock" / "config.json").write_text(json.dumps(config))
    model: Any = load_model(tmp_path / "stock", "seq2seq_model", device=DEVICE)
    found = probe(model, "seq2seq_model", model.named_parameters())
    folder = tmp_path / "made"
    write_model(folder, "seq2seq_model", model.config, model.named_parameters(), {}, dtype=torch.float32)
    assert torch.equal(load_file(folder / "model.safetensors")["lm_head.weight"], tensors["lm_head.weight"])
    verify_folder(folder, "seq2seq_model", found)


def test_spans_fill_the_gaps_of_a_text(tokenization: Tokenization) -> None:
    first, second, third, *_ = tokenization.sentinel_ids
    answer = [first, *tokenization.encode(" quick"), third, *tokenization.encode("x"), second, tokenization.eos_id]
    assert fill_spans(tokenization, "the<extra_id_0> number<extra_id_1> 7", answer) == "the quick number 7"


def test_scores_by_hand() -> None:
    same = corpus_scores(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert same["bleu"] == pytest.approx(100)
    assert same["chrf"] == pytest.approx(100)
    # One character n-gram order counts (texts of one letter): precision 1, recall 1/2, beta 2: 5 P R / (4 P + R).
    other = corpus_scores(["a"], ["ab"])
    assert other["chrf"] == pytest.approx(100 * (5 * 1.0 * 0.5) / (4 * 1.0 + 0.5), abs=0.01)
    report = Translations([Written(0, "s", "t", "w", 3, True), Written(1, "s", "t", "w", 5, False)], 4, 9).report()
    assert (report["eos_rate"], report["mean_length"], report["num_beams"]) == (0.5, 4.0, 4)
