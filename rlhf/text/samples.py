"""The record of one sample of a policy that writes: what was drawn, by which weights, and what it was worth.

A rollout engine gives tokens, log-probabilities and stop reasons (`trainers/inference/rollouts.py`); a `Sample` is made
of these, and rewards join it later. What models read are samples side by side (`responses.py`).

Shapes: T tokens of prompt, actions and observations together, A of them actions.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from rlhf.text.responses import Responses
from trainers.data.batches import PromptBatch, pad
from trainers.inference.rollouts import Sampled, SampleKey, StopReason, WeightsVersion
from trainers.runtime.distributed import gather_bytes, world_size

Decode = Callable[[Sequence[int]], str]
"""From tokens of a response to its text."""
_ARRAYS = {"tokens": np.int32, "actions": np.bool_, "logprobs": np.float32}


@dataclass(frozen=True, eq=False)
class Sample:
    """A response to a prompt, or a conversation with an environment, as it was drawn."""

    prompt_id: str
    """The prompt's row in its source."""
    row: int
    """The same in the stage's data set."""
    occurrence: int
    """Which of the iteration's draws for this prompt."""
    tokens: np.ndarray
    """[T]: ids of the prompt, and of all that came after it."""
    actions: np.ndarray
    """[T]: True at tokens that the policy chose, in any number of spans; false at the prompt and at observations."""
    logprobs: np.ndarray
    """[A]: of the chosen tokens as the sampler saw them, at its temperature, in fp32."""
    stop_reason: StopReason
    version: WeightsVersion
    """Of the policy that drew it."""
    text: str
    """What the terms of the reward that read texts read: the response, or a conversation's last turn."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """What each term of the reward gave, by its name."""
    turn_rewards: tuple[tuple[int, float], ...] = ()
    """Of a conversation with an environment: the actions up to each turn's end, and the turn's reward."""

    @property
    def action_ids(self) -> list[int]:
        """The tokens that the policy chose."""
        chosen: list[int] = self.tokens[self.actions].tolist()
        return chosen

    def differences(self, other: "Sample") -> list[str]:
        """Names of the fields in which another sample differs, by a bit."""
        own, others = vars(self), vars(other)
        return [name for name in own if not _same(own[name], others[name])]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.shape == other.shape and one.tobytes() == other.astype(one.dtype).tobytes()
    return bool(one == other)


def samples_of(
    prompts: PromptBatch, keys: Sequence[SampleKey], drawn: Sampled, prompt_ids: Sequence[str], decode: Decode
) -> list[Sample]:
    """Samples of one turn each, a key and the id of its prompt's row for each of the prompts."""
    columns = (prompts.input_ids_BP, prompts.attention_mask_BP, drawn.tokens_BR, drawn.response_mask_BR)
    asked, real, written, is_written, logprobs = (t.cpu().numpy() for t in (*columns, drawn.logprobs_BR))
    samples = []
    for place, (row, occurrence) in enumerate(keys):
        prompt, response = asked[place][real[place]], written[place][is_written[place]]
        samples.append(
            Sample(
                prompt_id=prompt_ids[place],
                row=row,
                occurrence=occurrence,
                tokens=np.concatenate([prompt, response]).astype(np.int32),
                actions=np.arange(len(prompt) + len(response)) >= len(prompt),
                logprobs=logprobs[place][is_written[place]],
                stop_reason=drawn.stop_reasons[place],
                version=drawn.version,
                text=decode(response.tolist()),
            )
        )
    return samples


def prompts_of(prompts: PromptBatch, keys: Sequence[SampleKey], prompt_ids: Sequence[str]) -> list[Sample]:
    """Samples that hold their prompts, and nothing drawn yet."""
    nothing = np.empty(0, dtype=np.float32)
    rows = zip(prompts.input_ids_BP.cpu().numpy(), prompts.attention_mask_BP.cpu().numpy(), strict=True)
    asked = [ids[real].astype(np.int32) for ids, real in rows]
    return [
        Sample(
            prompt_id, row, occurrence, ids, np.zeros(len(ids), np.bool_), nothing, "length", WeightsVersion(-1, -1), ""
        )
        for ids, (row, occurrence), prompt_id in zip(asked, keys, prompt_ids, strict=True)
    ]


def earlier_rewards(samples: Sequence[Sample]) -> Tensor:
    """[B, A]: what turns before the last were rewarded with, at each turn's last action; 0 elsewhere."""
    table = torch.zeros(len(samples), max(len(sample.logprobs) for sample in samples))
    for row, sample in enumerate(samples):
        for count, reward in sample.turn_rewards[:-1]:
            table[row, count - 1] = reward
    return table


def collate(samples: Sequence[Sample], pad_id: int, device: torch.device | str = "cpu") -> Responses:
    """The samples side by side, padded on the right."""
    ids, real = pad([sample.tokens.astype(np.int64) for sample in samples], pad_id)
    actions, _ = pad([sample.actions for sample in samples], False)
    return Responses(
        input_ids_BT=torch.from_numpy(ids),
        attention_mask_BT=torch.from_numpy(real),
        action_mask_BT=torch.from_numpy(actions),
        ended_B=torch.tensor([sample.stop_reason == "stop" for sample in samples]),
        sample_ids_B=torch.tensor([sample.row for sample in samples]),
    ).to(device)


def sampler_logprobs(samples: Sequence[Sample], device: torch.device | str = "cpu") -> Tensor:
    """[B, A]: the sampler's log-probabilities; 0 past a sample's last action."""
    found, _ = pad([sample.logprobs for sample in samples], 0)
    return torch.from_numpy(found).to(device)


def gather_samples(samples: Sequence[Sample]) -> list[Sample]:
    """Every rank's samples in rank order; collective."""
    if world_size() == 1:
        return list(samples)
    return [sample for part in gather_bytes(pack(samples)) for sample in unpack(part)]


def pack(samples: Sequence[Sample]) -> bytes:
    """Samples as bytes, equal for equal samples: a safetensors file of their arrays end to end, the rest as JSON."""
    arrays: dict[str, np.ndarray] = {
        name: np.concatenate([np.empty(0, dtype), *(getattr(sample, name) for sample in samples)]).astype(dtype)
        for name, dtype in _ARRAYS.items()
    }
    fields = [
        {
            **{name: value for name, value in vars(sample).items() if name not in _ARRAYS},
            "version": asdict(sample.version),
            "rewards": dict(sample.rewards),
            "num_tokens": len(sample.tokens),
        }
        for sample in samples
    ]
    text = json.dumps(fields, sort_keys=True).encode()
    return bytes(safetensors.numpy.save({**arrays, "fields": np.frombuffer(text, dtype=np.uint8)}))


def unpack(data: bytes) -> list[Sample]:
    """Read what `pack` gave."""
    arrays, samples, token, action = safetensors.numpy.load(data), [], 0, 0
    for fields in json.loads(arrays["fields"].tobytes()):
        tokens = slice(token, token := token + fields.pop("num_tokens"))
        actions = arrays["actions"][tokens]
        chosen = slice(action, action := action + int(actions.sum()))
        version = WeightsVersion(**fields.pop("version"))
        found = {"tokens": arrays["tokens"][tokens], "actions": actions, "logprobs": arrays["logprobs"][chosen]}
        turns = tuple((count, reward) for count, reward in fields.pop("turn_rewards"))
        samples.append(Sample(**found, version=version, turn_rewards=turns, **fields))
    return samples
