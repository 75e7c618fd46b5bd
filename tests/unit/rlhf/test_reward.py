"""Scores belong to the row alone, the objective counts pairs, and the evaluation is right by hand."""

import pytest
import torch
from torch import nn

from recipes.stages.lora import Lora
from rlhf.text.reward_model import RewardObjective, ScoreModel, evaluate_pairs, failed_gates, summarise_pairs
from trainers.data.batches import PairBatch, SequenceBatch
from trainers.models.load import stock_class
from trainers.models.lora import adapter_tensors, add_adapter, config_with_heads

PAD = EOS = 0


def score_model(kind: str = "llama") -> ScoreModel:
    """Two layers of width 16; the padding token is also the end token, which must not matter."""
    model_class = stock_class(kind, "score_model")
    sizes = (
        {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64}
        if kind == "gpt2"
        else {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        | {"num_key_value_heads": 2, "head_dim": 8}
    )
    torch.manual_seed(0)
    config = model_class.config_class(
        vocab_size=24, num_labels=1, pad_token_id=PAD, eos_token_id=EOS, initializer_range=0.3, **sizes
    )
    return ScoreModel(model_class(config).eval())


def rows(*texts: list[int], width: int) -> SequenceBatch:
    ids = torch.tensor([text + [PAD] * (width - len(text)) for text in texts])
    mask = torch.tensor([[True] * len(text) + [False] * (width - len(text)) for text in texts])
    return SequenceBatch(ids, mask, mask)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_a_score_does_not_depend_on_neighbours_padding_or_end_tokens_inside(kind: str) -> None:
    model = score_model(kind)
    text = [5, EOS, 7, 9, EOS]
    with torch.no_grad():
        alone = model(rows(text, width=5))
        padded = model(rows(text, [1, 2], width=11))[:1]
    torch.testing.assert_close(alone, padded, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        longer = model(rows([*text, 3], width=11))
    assert abs(float(longer - alone)) > 1e-3


def pairs() -> PairBatch:
    chosen = rows([1, 2, 3], [4, 5], [6, 7, 8], width=3)
    rejected = rows([3, 2, 1, 9, 9], [5, 4], [1, 1], width=5)
    return PairBatch(chosen, rejected, torch.tensor([4, 2, -1]))


def test_fillers_have_no_weight_and_no_gradient() -> None:
    model = score_model()
    objective = RewardObjective(0.0)
    output = objective.loss(model, pairs())
    assert objective.weight(pairs()) == 2.0
    assert output.metrics["loss"][1] == 2.0
    real = PairBatch(rows([1, 2, 3], [4, 5], width=3), rows([3, 2, 1, 9, 9], [5, 4], width=5), torch.tensor([4, 2]))
    torch.testing.assert_close(objective.loss(model, real).loss_sum, output.loss_sum)


def test_evaluation_drops_fillers_and_orders_rows() -> None:
    found = evaluate_pairs(score_model(), [pairs()], torch.device("cpu"))
    assert found.pairs == 2


def test_evaluation_by_hand() -> None:
    found = summarise_pairs([(0, 2.0, 1.0, 5, 3), (1, 0.0, 1.0, 5, 3), (2, 1.0, 1.0, 4, 4), (3, 3.0, 1.0, 6, 2)])
    assert found.accuracy == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found.margin == pytest.approx((1 - 1 + 0 + 2) / 4)
    assert found.score_mean == pytest.approx(10 / 8)
    assert found.statistics.std == found.score_std
    assert 0 < found.length_correlation < 1


def test_the_gate_names_a_model_that_ranks_no_better_than_chance() -> None:
    chance = summarise_pairs([(0, 1.0, 2.0, 3, 3), (1, 2.0, 1.0, 3, 3)])
    assert failed_gates(chance, 0.55) == ["held-out accuracy 0.500 is below min_accuracy 0.55"]
    flat = summarise_pairs([(0, 1.0, 1.0, 3, 3)])
    assert "all held-out scores are equal" in failed_gates(flat, 0.5)


def test_an_adapter_travels_with_its_head() -> None:
    network: nn.Module = score_model().network
    config = add_adapter(network, Lora(r=2), seed=0)
    assert not network.get_submodule("score").weight.requires_grad
    network = score_model().network
    add_adapter(network, Lora(r=2), seed=0, heads=["score"])
    learning = {name for name, p in network.named_parameters() if p.requires_grad}
    assert "score.weight" in learning
    assert all("lora_" in name or name == "score.weight" for name in learning)
    files = adapter_tensors(dict(network.named_parameters()), heads=["score"])
    assert "base_model.model.score.weight" in files
    assert all(name.startswith("base_model.model.") and "default" not in name for name in files)
    stored = config_with_heads(config, ["score"])
    assert (stored.task_type, stored.modules_to_save) == ("SEQ_CLS", ["score"])
    assert config.task_type == "CAUSAL_LM"
