"""Writes trl_numbers.json: what TRL's own functions give for a random batch.

Usage: python tests/unit/rlhf/write_trl_numbers.py. Losses and gradients by `_compute_loss` of its trainers, on
log-probabilities that stand for a model's; advantages by the lines of `_generate_and_score_completions` that give them.
"""

import inspect
import json
import textwrap
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

NUMBERS = Path(__file__).with_name("trl_numbers.json")
GROUP, WIDTH, LENGTH = 4, 5, 7
"""Responses to a prompt, tokens of the longest one, and the limit that Dr. GRPO divides by."""
LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "beta": 0.3},
    "grpo without a penalty": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dual clip": {"loss_type": "dapo", "delta": 1.5},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "rloo": {"loss_type": "rloo"},
}


def batches() -> dict[str, Tensor]:
    """A batch in float64: responses of one to five tokens, ratios from about 0.5 to 2."""
    generator = torch.Generator().manual_seed(0)
    count = 3 * GROUP
    old = -torch.rand(count, WIDTH, generator=generator, dtype=torch.float64) * 3 - 0.1
    moved, apart = (torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([5, 1, 3, 2, 5, 4, 1, 2, 3, 3, 5, 1])
    return {
        "old": old,
        "logprobs": old + 0.3 * moved,
        "reference": old + 0.3 * apart,
        "mask": torch.arange(WIDTH) < lengths[:, None],
        "rewards": torch.randn(count, generator=generator, dtype=torch.float64),
    }


class OneProcess:
    """What the trainers ask of accelerate, in one process."""

    num_processes, process_index, sync_gradients = 1, 0, False

    def gather(self, value: Tensor) -> Tensor:
        return value

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        return value


def trl_loss(given: dict[str, Tensor], advantages: Tensor, options: dict[str, Any]) -> tuple[float, list[list[float]]]:
    """The loss and its gradient by log-probabilities."""
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    logprobs, mask = given["logprobs"].clone().requires_grad_(), given["mask"].long()
    settings = {"epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "importance_sampling_level": "token", **options}
    trainer = SimpleNamespace(
        **settings,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=options.get("delta"), steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=OneProcess(),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LENGTH,
        _entropy_bonus_enabled=False,
    )
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": given["old"],
        "old_logps": (given["old"] * mask).sum(1),
        "ref_per_token_logps": given["reference"],
        "num_items_in_batch": mask.sum(),
    }
    kind = RLOOTrainer if options["loss_type"] == "rloo" else GRPOTrainer
    loss = kind._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return float(loss.detach()), gradient.tolist()


def lines_between(function: Any, first: str, last: str) -> str:
    """A function's source from the line that begins with one text to the one that begins with another."""
    lines = inspect.getsource(function).splitlines()
    starts = [line.strip() for line in lines]
    start = next(place for place, line in enumerate(starts) if line.startswith(first))
    stop = next(place for place, line in enumerate(starts) if place > start and line.startswith(last))
    return textwrap.dedent("\n".join(lines[start : stop + 1]))


def trl_advantages(given: dict[str, Tensor], algorithm: str, scale: str = "none", beta: float = 0.0) -> list[float]:
    """Advantages of `rewards`, of which every `GROUP` belong to one prompt."""
    from trl.trainer import grpo_trainer, rloo_trainer

    module = rloo_trainer if algorithm == "rloo" else grpo_trainer
    trainer = module.RLOOTrainer if algorithm == "rloo" else module.GRPOTrainer
    first = "rewards = (rewards_per_func" if algorithm == "rloo" else "if self.multi_objective_aggregation"
    source = lines_between(trainer._generate_and_score_completions, first, "advantages = torch.nan_to_num")
    names = {
        **vars(module),
        "self": SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize",
            scale_rewards=scale,
            beta=beta,
            reward_weights=torch.ones(1, dtype=torch.float64),
            reward_clip_range=None,
            normalize_advantages=False,
        ),
        "device": "cpu",
        "num_generations": GROUP,
        "rewards_per_func": given["rewards"][:, None],
        "unscorable_mask": torch.zeros(len(given["rewards"]), dtype=torch.bool),
        "old_per_token_logps": given["old"],
        "ref_per_token_logps": given["reference"],
        "completion_mask": given["mask"].long(),
        "gather": lambda value: value,
    }
    exec(source, names)
    return [float(value) for value in names["advantages"]]


def found() -> dict[str, Any]:
    """Everything that is written down."""
    given = batches()
    advantages = {
        **{f"grpo {scale}": trl_advantages(given, "grpo", scale) for scale in ("group", "batch", "none")},
        "rloo": trl_advantages(given, "rloo"),
        "rloo with a penalty": trl_advantages(given, "rloo", beta=0.4),
    }
    given_advantages = torch.tensor(advantages["grpo group"], dtype=torch.float64)
    losses = {name: trl_loss(given, given_advantages, options) for name, options in LOSSES.items()}
    return {
        "trl": version("trl"),
        "batch": {name: table.tolist() for name, table in given.items()},
        "advantages": advantages,
        "losses": {name: {"loss": loss, "gradient": gradient} for name, (loss, gradient) in losses.items()},
    }


if __name__ == "__main__":
    numbers = found()
    lines = [
        f"{json.dumps(part)}: {{\n"
        + ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in numbers[part].items())
        + "\n}"
        for part in ("batch", "advantages", "losses")
    ]
    NUMBERS.write_text(f'{{"trl": {json.dumps(numbers["trl"])},\n' + ",\n".join(lines) + "\n}\n", encoding="utf-8")
