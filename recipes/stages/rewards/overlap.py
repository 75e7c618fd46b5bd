"""Rules that measure how much of the true answer a response has in common with it, from 0 to 1."""

import re
import string
from collections import Counter
from typing import Any, Literal

from recipes.fields import meaning
from recipes.stages.rewards.answers import WithAnswer
from recipes.stages.rewards.term import Row, Rule

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class F1(WithAnswer, Rule):
    """F1 of the words in common, as SQuAD's own script (Rajpurkar et al. 2016): without case, punctuation, articles."""

    rule: Literal["f1"] = meaning(description="F1 of the words that response and true answer have in common.")

    def value(self, text: str, row: Row) -> float:
        own, true = _normal(text), _normal(self.answer(row))
        if not own or not true:
            return float(own == true)
        return _f(sum((Counter(own) & Counter(true)).values()), len(own), len(true))


class RougeL(WithAnswer, Rule):
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, in lower case, runs of letters and digits."""

    rule: Literal["rouge_l"] = meaning(description="F1 of the longest common subsequence of words.")

    def value(self, text: str, row: Row) -> float:
        own, true = (re.findall(r"[a-z0-9]+", each.lower()) for each in (text, self.answer(row)))
        lengths = [0] * (len(true) + 1)
        for word in own:
            before = 0
            for place, other in enumerate(true, start=1):
                here = lengths[place]
                lengths[place] = before + 1 if word == other else max(here, lengths[place - 1])
                before = here
        return _f(lengths[-1], len(own), len(true))


class ChrF(WithAnswer, Rule):
    """Sentence-level chrF (Popovic 2015) by sacrebleu's defaults, divided by 100."""

    rule: Literal["chrf"] = meaning(description="chrF of the response against the true answer.")

    def value(self, text: str, row: Row) -> float:
        from sacrebleu.metrics.chrf import CHRF

        return _share(CHRF(), text, self.answer(row))


class Bleu(WithAnswer, Rule):
    """Sentence-level BLEU (Papineni et al. 2002) by sacrebleu, divided by 100: only n-grams that a text can have."""

    rule: Literal["bleu"] = meaning(description="BLEU of the response against the true answer.")

    def value(self, text: str, row: Row) -> float:
        from sacrebleu.metrics.bleu import BLEU

        return _share(BLEU(effective_order=True), text, self.answer(row))


def _share(metric: Any, text: str, answer: str) -> float:
    return float(metric.sentence_score(text, [answer]).score) / 100


def _normal(text: str) -> list[str]:
    return _ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f(common: int, own: int, true: int) -> float:
    return 2 * common / (own + true) if common else 0.0
