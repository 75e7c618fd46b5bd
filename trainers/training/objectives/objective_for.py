"""What a family of text learns: its objective, the module that it runs over, and what it reads of a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from recipes.models.encoder import Corruption
from recipes.models.encoder_decoder import SpanCorruption
from recipes.stages.finetune import Finetune
from recipes.stages.pretrain import Pretrain
from trainers.data.masking import MaskedLanguageModelObjective, MaskedTokenLosses, Masker
from trainers.data.span_corruption import SpanCorrupter
from trainers.data.tokenizer import Tokenization
from trainers.models.encoder_decoder import TargetLosses
from trainers.models.load import ModelKind
from trainers.models.token_losses import CarriedTokenLosses, TokenLosses
from trainers.models.vision_language import PicturedTokenLosses
from trainers.training.objectives.carried_language_model import CarriedLanguageModelObjective
from trainers.training.objectives.language_model import LanguageModelObjective
from trainers.training.objectives.protocol import Objective
from trainers.training.objectives.seq2seq import Seq2SeqObjective
from trainers.training.objectives.vision_language import PicturedLanguageModelObjective
from trainers.training.steps import unchanged


@dataclass(frozen=True)
class Learning:
    """What a family learns: its objective over which module, and what the objective reads of a packed batch."""

    kind: ModelKind
    module: nn.Module
    objective: Objective
    prepare: Callable[[Any, int], Any] = unchanged
    predicts_next: bool = True
    """Whether a counted model measures the same."""


def build_learning(
    spec: Pretrain | Finetune, family: str, model: nn.Module, tokenization: Tokenization, seed: int
) -> Learning:
    """Return the objective that follows from family and kind of stage."""
    match family:
        case "rnn" if isinstance(spec, Pretrain):
            return Learning("language_model", CarriedTokenLosses(model), CarriedLanguageModelObjective())
        case "encoder":
            corruption = (spec.corruption if isinstance(spec, Pretrain) else None) or Corruption()
            masker = Masker(corruption, tokenization, seed)
            module, objective = MaskedTokenLosses(model), MaskedLanguageModelObjective()
            return Learning("masked_model", module, objective, masker.batch, predicts_next=False)
        case "encoder_decoder":
            corrupt = unchanged
            if isinstance(spec, Pretrain):
                corrupt = SpanCorrupter(spec.span_corruption or SpanCorruption(), tokenization, seed).batch
            return Learning("seq2seq_model", TargetLosses(model), Seq2SeqObjective(), corrupt, predicts_next=False)
        case "vision_language":
            return Learning("vision_language_model", PicturedTokenLosses(model), PicturedLanguageModelObjective())
        case _:
            return Learning("language_model", TokenLosses(model), LanguageModelObjective())
