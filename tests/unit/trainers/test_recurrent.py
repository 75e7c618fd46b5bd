"""Recurrent models: carried state, documents, sampling, and a file that stock torch reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes.errors import RequestError
from recipes.models.rnn import Rnn
from trainers.checkpoint.loop_state import SourceState
from trainers.data.dataset import BuildReport, Dataset
from trainers.data.layouts.stream import Stream
from trainers.data.streams import CARRIED, HeldOutStream, LaneStates, StreamBatches, beginning
from trainers.inference.generation import SamplingSettings, generate
from trainers.models.families import build_language_model
from trainers.models.protocol import TokenizerFacts
from trainers.models.token_losses import CarriedTokenLosses, TokenLosses
from trainers.objectives.carried_language_model import CarriedLanguageModelObjective

V, EOS = 29, 1
KEYS: dict[str, dict[str, Any]] = {
    "lstm": {"type": "lstm", "hidden_size": 12, "embedding_size": 8, "num_hidden_layers": 2},
    "gru": {"type": "gru", "hidden_size": 8, "tie_word_embeddings": False},
}


def build(name: str) -> Any:
    """Give a small model in evaluation mode."""
    keys = {"family": "rnn", **KEYS[name]}
    facts = TokenizerFacts(V, eos_id=EOS, pad_id=0)
    return build_language_model(keys, facts, seed=0, device=torch.device("cpu")).eval()


def source(model: Any, tokens: np.ndarray, lanes: int, length: int, rank: int = 0, workers: int = 1) -> StreamBatches:
    """Give the batches of a text whose documents have ten tokens."""
    arrays = {"tokens": tokens, "is_first": np.arange(len(tokens)) % 10 == 0}
    report = BuildReport(1, {"sequences": len(tokens) // length})
    states = LaneStates(model.base_model.zero_state(lanes))
    return StreamBatches(
        Dataset("d", Stream, report, arrays, 0),
        states,
        seed=0,
        sequence_length=length,
        global_batch=lanes,
        workers=workers,
        rank=rank,
        micro_batch=1,
        steps_planned=9,
    )


@pytest.mark.parametrize("name", list(KEYS))
def test_a_carried_state_gives_the_loss_of_the_whole_lane(name: str) -> None:
    model = build(name)
    tokens = np.random.default_rng(0).integers(2, V, 2 * 3 * 5 + 1)
    batches = source(model, tokens, lanes=2, length=5)
    losses, objective = CarriedTokenLosses(model), CarriedLanguageModelObjective()
    found, read = 0.0, [[], []]
    with torch.no_grad():
        for step in range(3):
            for lane, batch in enumerate(batches.micro_batches(step)):
                found += float(objective.loss(losses, batch).loss_sum)
                read[lane].append((batch.input_ids_BT, batch.target_ids_BT, batch.loss_mask_BT))
        wanted = 0.0
        for lane in read:
            inputs, targets, mask = (torch.cat(parts, dim=1) for parts in zip(*lane, strict=True))
            hidden, _ = model.base_model.run(inputs, model.base_model.zero_state(1))
            logs = torch.log_softmax(model.lm_head(hidden), dim=-1).gather(2, targets[..., None])[..., 0]
            wanted -= float(logs[mask].sum())
    assert found == pytest.approx(wanted, rel=1e-5)
    assert torch.equal(
        torch.cat([part[0][0] for part in read[0]])[1:], torch.cat([part[1][0] for part in read[0]])[:-1]
    )


def test_a_saved_state_goes_on_the_same_and_a_new_epoch_starts_from_zero() -> None:
    model = build("lstm")
    tokens = np.random.default_rng(1).integers(2, V, 2 * 2 * 4 + 3)
    losses, objective = CarriedTokenLosses(model), CarriedLanguageModelObjective()

    def step(batches: StreamBatches, number: int) -> list[float]:
        return [float(objective.loss(losses, batch).loss_sum.detach()) for batch in batches.micro_batches(number)]

    straight = source(model, tokens, lanes=2, length=4)
    step(straight, 0)
    saved = straight.state()
    wanted = [step(straight, number) for number in (1, 2)]
    resumed = source(model, tokens, lanes=2, length=4)
    resumed.load_state(saved)
    assert [step(resumed, number) for number in (1, 2)] == wanted
    fresh = source(model, tokens, lanes=2, length=4)
    assert step(fresh, 2) == wanted[1], "the third step begins the second epoch"
    fresh = source(model, tokens, lanes=2, length=4)
    assert step(fresh, 1) != wanted[0], "the second step needs the state of the first"
    with pytest.raises(RequestError, match=r"shape \(2, 2, 1, 12\), .* \(2, 2, 2, 12\)"):
        resumed.load_state(SourceState(tensors={CARRIED: saved.tensors[CARRIED][:, :, :1]}))


def test_a_state_that_is_not_finite_starts_again() -> None:
    states = LaneStates(torch.zeros(2, 1, 3, 4))
    after = torch.ones(2, 1, 2, 4)
    after[1, 0, 1, 2] = float("nan")
    states.write(torch.tensor([0, 2]), after)
    assert states.read(torch.tensor([0, 1, 2]))[:, 0, :, 0].tolist() == [[1, 0, 0], [1, 0, 0]]


def test_two_ranks_read_the_lanes_of_one() -> None:
    model = build("gru")
    tokens = np.random.default_rng(2).integers(2, V, 60)
    alone = source(model, tokens, lanes=4, length=3).micro_batches(2)
    shared = [source(model, tokens, 4, 3, rank, 2).micro_batches(2) for rank in range(2)]
    assert [int(batch.lanes_B) for batch in alone] == [0, 1, 2, 3]
    assert [[int(batch.lanes_B) for batch in batches] for batches in shared] == [[0, 2], [1, 3]]
    assert torch.equal(shared[1][1].input_ids_BT, alone[3].input_ids_BT)


def held_out(tokens: np.ndarray) -> Dataset:
    """Give a stream whose documents have ten tokens."""
    arrays = {"tokens": tokens, "is_first": np.arange(len(tokens)) % 10 == 0}
    return Dataset("d", Stream, BuildReport(1, {"sequences": 1}), arrays, 0)


def held_out_sums(model: Any, dataset: Dataset, length: int, workers: int) -> tuple[float, int, int]:
    """Give the loss of all ranks' targets, their number, and the number of batches, which is that of every rank."""
    total, targets, batches = 0.0, 0, set()
    for rank in range(workers):
        stream = HeldOutStream(dataset, model.base_model.zero_state, length=length, workers=workers, rank=rank)
        count = 0
        for batch in stream:
            output = CarriedLanguageModelObjective().loss(CarriedTokenLosses(model), batch)
            total += float(output.loss_sum)
            targets += int(batch.loss_mask_BT.sum())
            count += 1
        batches.add(count)
    assert len(batches) == 1
    return total, targets, batches.pop()


@pytest.mark.parametrize("name", list(KEYS))
@pytest.mark.parametrize("num_tokens", [46, 1600])
def test_held_out_text_is_read_once_with_the_state_carried_on(name: str, num_tokens: int) -> None:
    model, tokens = build(name), np.random.default_rng(3).integers(2, V, num_tokens)
    lanes = {46: 1, 1600: 3}[num_tokens]
    lane = -(-(num_tokens - 1) // lanes)
    wanted = 0.0
    with torch.no_grad():
        for start in range(0, num_tokens - 1, lane):
            ids = torch.from_numpy(tokens[start : min(start + lane, num_tokens - 1) + 1])[None]
            hidden, _ = model.base_model.run(ids[:, :-1], model.base_model.zero_state(1))
            logs = torch.log_softmax(model.lm_head(hidden), dim=-1).gather(2, ids[:, 1:, None])[0, :, 0]
            wanted -= float(logs[(start + 1 + torch.arange(len(logs))) % 10 != 0].sum())
        found = [held_out_sums(model, held_out(tokens), *share) for share in ((7, 1), (7, 2), (50, 1), (7, 5))]
    assert {targets for _, targets, _ in found} == {num_tokens - -(-num_tokens // 10)}
    assert [total for total, _, _ in found] == pytest.approx([wanted] * 4, rel=1e-5)
    assert found[0][2] == -(-lane // 7)


def test_a_part_of_a_held_out_stream_is_its_beginning() -> None:
    tokens = np.arange(50)
    assert beginning(held_out(tokens), 3, 8).arrays["tokens"].tolist() == list(range(25))
    assert len(beginning(held_out(tokens), 9, 8).arrays["is_first"]) == 50


def test_a_text_shorter_than_a_step_is_refused() -> None:
    with pytest.raises(RequestError, match="20 tokens, fewer than global_batch x sequence_length"):
        source(build("gru"), np.arange(20), lanes=4, length=5)


@pytest.mark.parametrize("name", list(KEYS))
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    model = build(name)
    ids = torch.randint(2, V, (2, 9), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 3, 3, 3]])
    mask = segments > 0
    mask[:, 1:] &= segments[:, 1:] == segments[:, :-1]
    mask[:, 0] = False
    wanted = 0.0
    with torch.no_grad():
        found = TokenLosses(model)(ids, segments, torch.zeros_like(ids), mask)
        for row, start, stop in ((0, 0, 3), (0, 3, 7), (1, 1, 4), (1, 4, 9)):
            document = ids[row, start:stop]
            logs = torch.log_softmax(model(document[None]).logits[0, :-1], dim=-1)
            wanted -= float(logs.gather(1, document[1:, None]).sum())
    assert float(found) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", list(KEYS))
def test_sampling_continues_what_a_forward_says(name: str) -> None:
    model = build(name)
    prompts = torch.tensor([[0, 0, 5, 7], [3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    found = generate(model, prompts, mask, SamplingSettings(5, 1.0, (EOS,), 0, V), None)
    for row in range(2):
        text = prompts[row][mask[row]].tolist()
        for token in found.tokens_BR[row][found.response_mask_BR[row]].tolist():
            assert token == int(model(torch.tensor([text])).logits[0, -1].argmax())
            text.append(token)


@pytest.mark.parametrize("name", list(KEYS))
def test_parameters_are_counted_right(name: str) -> None:
    counted = Rnn(family="rnn", **KEYS[name]).num_parameters(V)
    assert sum(parameter.numel() for parameter in build(name).parameters()) == counted


def test_stock_torch_opens_the_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = build("lstm")
    save_file(dict(model.named_parameters()), tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    layers = torch.nn.LSTM(8, 12, 2, batch_first=True)
    layers.load_state_dict({key.removeprefix("backbone.layers."): t for key, t in tensors.items() if ".layers." in key})
    ids = torch.tensor([[EOS, 5, 6, 7]])
    hidden, _ = layers(tensors["backbone.embedding.weight"][ids])
    logits = hidden @ tensors["backbone.projection.weight"].T @ tensors["backbone.embedding.weight"].T
    torch.testing.assert_close(logits[:, 1:], model(ids[:, 1:]).logits)
