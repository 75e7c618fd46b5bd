"""The record of a sample: packed and unpacked, several spans of actions, which policy drew it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rlhf.algorithms.advantages import Gae, Rewarded, leave_one_out
from rlhf.text.policy import PolicyModels
from rlhf.text.samples import Sample, collate, pack, sampler_logprobs, unpack
from trainers.inference.rollouts import WeightsVersion, weights_digest

Build = Callable[..., Any]
VERSION = WeightsVersion(3, 12, "d" * 64)
ONE = Sample(
    prompt_id="sums.jsonl:1", row=5, occurrence=1,
    tokens=np.array([7, 8, 9, 2], dtype=np.int32), actions=np.array([False, True, True, True]),
    logprobs=np.array([-0.1, -2.0, -1e-7], dtype=np.float32),
    stop_reason="stop", version=VERSION, text="zwölf", rewards={"right": 1.0, "judge": -0.30000001192092896},
)  # fmt: skip
TWO = replace(
    ONE, row=4, tokens=np.array([4, 5, 6, 10, 11, 3], dtype=np.int32), stop_reason="length", rewards={"right": 0.1},
    actions=np.array([False, True, True, False, False, True]), text="",
)  # fmt: skip
"""Two turns: the policy wrote 5 6, observed 10 11, and wrote 3."""


def test_samples_survive_their_bytes() -> None:
    found = unpack(pack([ONE, TWO, ONE]))
    assert [one.differences(other) for one, other in zip(found, [ONE, TWO, ONE], strict=True)] == [[], [], []]
    assert pack(found) == pack([ONE, TWO, ONE])
    assert unpack(pack([])) == []


def test_a_difference_of_one_bit_shows() -> None:
    nudged = np.nextafter(ONE.logprobs, np.float32(0))
    assert ONE.differences(replace(ONE, logprobs=nudged, version=WeightsVersion(3, 13))) == ["logprobs", "version"]
    assert pack([ONE]) != pack([replace(ONE, logprobs=nudged)])


def test_what_is_said_of_actions_has_no_gaps_between_spans() -> None:
    batch = collate([ONE, TWO], pad_id=1)
    assert batch.input_ids_BT.tolist() == [[7, 8, 9, 2, 1, 1], [4, 5, 6, 10, 11, 3]]
    assert batch.action_ids == [[8, 9, 2], [5, 6, 3]]
    assert batch.action_mask_BA.tolist() == [[True] * 3] * 2
    np.testing.assert_array_equal(sampler_logprobs([ONE, TWO]).numpy()[1], ONE.logprobs)
    assert batch.rows([0]).input_ids_BT.tolist() == [[7, 8, 9, 2]]


def test_models_judge_actions_of_several_spans_and_nothing_else(tiny_ppo: Build) -> None:
    """Against a loop over the tokens: each action's log-probability is read one position before it."""
    models: PolicyModels = tiny_ppo(lora=False).models
    batch = collate([ONE, TWO], pad_id=1)
    with torch.no_grad():
        found = models(batch, ("actor", "critic"), False, 6)
        for place, sample in enumerate((ONE, TWO)):
            ids = torch.from_numpy(sample.tokens.astype(np.int64))[None]
            network: Any = models.networks["policy"]
            logprobs = network(ids).logits[0].log_softmax(dim=-1)
            values = models.value_head(models.networks["critic"](ids).last_hidden_state[0])[:, 0]  # type: ignore[misc]
            at = [t for t in range(len(sample.tokens)) if sample.actions[t]]
            wanted = [float(logprobs[t - 1, sample.tokens[t]]) for t in at]
            torch.testing.assert_close(found["logprobs_BA"][place], torch.tensor(wanted))
            torch.testing.assert_close(found["values_BA"][place], values[[t - 1 for t in at]])


def test_credit_crosses_an_observation() -> None:
    """By hand, gamma 1/2, lambda 1, for TWO: values 1, 2, 4 at its actions, score 8 at the last.

    deltas from the end: 8 - 4 = 4; 4/2 - 2 = 0; 2/2 - 1 = 0. Advantages: 4; 0 + 4/2 = 2; 0 + 2/2 = 1.
    """
    mask_NA = collate([TWO], pad_id=1).action_mask_BA
    kl_NA, values_NA, one = torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([True])
    rewarded = Rewarded(torch.tensor([8.0]), kl_NA, 0.0, mask_NA, values_NA, torch.tensor([4]), one)
    returns_NA = Gae(0.5, 1.0)(rewarded).returns_NA
    assert returns_NA is not None
    assert (returns_NA - values_NA).tolist() == [[1.0, 2.0, 4.0]]
    scores_N, groups_N, both_NA = torch.tensor([8.0, 2.0]), torch.tensor([4, 4]), mask_NA.repeat(2, 1)
    pair = Rewarded(scores_N, kl_NA.repeat(2, 1), 0.0, both_NA, None, groups_N, one.repeat(2))
    assert leave_one_out(pair).advantages_NA.tolist() == [[6.0] * 3, [-6.0] * 3]


def test_the_digest_names_the_weights_that_sample(tiny_ppo: Build) -> None:
    for lora in (True, False):
        ppo = tiny_ppo(lora=lora)
        policy = ppo.source.experience.policy
        names = ppo.models.policy_names()
        assert names
        assert all(name.startswith("networks.policy.") and "critic" not in name for name in names)
        first, again = policy.sync(0), policy.sync(0)
        ppo.run(last=1)
        after = policy.sync(0)
        assert first == again
        assert len(first.digest) == 64
        assert first.digest != after.digest
        swapped = list(ppo.engine.full_parameters(names))
        (one, a), (two, b) = [item for item in swapped if item[1].dim() == 2 and "layers" in item[0]][:2]
        renamed = [(one, b) if name == one else (two, a) if name == two else (name, t) for name, t in swapped]
        assert weights_digest(renamed) != after.digest == weights_digest(swapped)
