"""Rows of judged answers as reward models and preference optimisation read them."""

from dataclasses import dataclass

from recipes.stages.judged import JudgedTraining
from trainers.data.dataset import Dataset
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.training.context import StageContext, model_folder, open_sets, text_request


@dataclass(frozen=True)
class JudgedRows:
    """Pairs of a chosen and a rejected answer, or single answers with a verdict."""

    tokenization: Tokenization
    training: Dataset
    held_out: Dataset | None

    @property
    def measured(self) -> Dataset:
        """The rows that are measured: held-out ones, or the training's where there are none."""
        return self.training if self.held_out is None else self.held_out


def open_judged_rows(spec: JudgedTraining, context: StageContext) -> JudgedRows:
    """Open a stage's rows in the tokens of the model that it starts from; collective."""
    tokenization = load_tokenization(model_folder(context, "init_from"))
    length = spec.train.sequence_length
    training, held_out = open_sets(
        spec, context, lambda use: text_request(context, use, tokenization, length, spec.template)
    )
    return JudgedRows(tokenization, training, held_out)
