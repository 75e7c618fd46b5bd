"""The reward that a stage measures answers by, as it reads what one model wrote.

Shapes: B answers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from recipes.stages.base import TextStage
from recipes.stages.rewards.union import model_terms, weights_of
from rlhf.rewards.judge import Judge
from rlhf.rewards.terms import open_text_terms
from rlhf.text.responses import Responses
from rlhf.text.reward_inputs import Reading
from rlhf.text.reward_model import ScoreModel
from rlhf.text.rewards import JudgeTerm, TextReward
from rlhf.text.stage import reading_by, score_statistics
from trainers.data.dataset import Dataset
from trainers.data.tokenizer import Tokenization
from trainers.evaluation.suite import open_measured
from trainers.models.load import head_name
from trainers.training.context import StageContext


@dataclass(frozen=True)
class Jury:
    """Every term of the reward on the answers of one writer."""

    reward: TextReward
    scorers: Mapping[str, tuple[ScoreModel, Reading]]
    """Reward models, with how they read these answers."""

    @torch.no_grad()
    def rewards(self, responses: Responses) -> dict[str, Tensor]:
        """What each term gives [B], and `score`, their weighted sum as a policy learns it."""
        scores = [scorer(read(responses)).float().cpu() for scorer, read in self.scorers.values()]
        by_term = self.reward.by_term(self.reward.read(responses), *scores)
        return {**by_term, "score": self.reward.score(by_term)} if by_term else {}


def jury_of(
    spec: TextStage, context: StageContext, judges: Mapping[str, Judge]
) -> Callable[[Dataset, Tokenization], Jury]:
    """Open the reward models once; what is returned makes a jury for answers to prompts as a tokenizer reads them."""
    scorers: dict[str, ScoreModel] = {}
    reward_models: list[JudgeTerm] = []
    for name, term in model_terms(spec.terms).items():
        place = f"rewards.{name}.model"
        network = open_measured(spec, context, place, "score_model")
        scorers[name] = ScoreModel(network, head_name(network)).eval()
        reward_models.append(JudgeTerm(name, score_statistics(context.inputs[place]), term.clip))

    def jury(prompts: Dataset, writer: Tokenization) -> Jury:
        reward = TextReward(
            weights=weights_of(spec.terms),
            judges=reward_models,
            terms=open_text_terms(spec.terms, context.base_dir, prompts.records, judges),
            records=prompts.records,
            decode=partial(writer.decode, skip_special=True),
        )
        read = {name: reading_by(context, f"rewards.{name}.model", prompts, writer) for name in scorers}
        return Jury(reward, {name: (scorer, read[name]) for name, scorer in scorers.items()})

    return jury
