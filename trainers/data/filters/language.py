"""The language of a text, by py3langid: a naive Bayes classifier over byte n-grams (Lui and Baldwin 2012)."""

from collections.abc import Mapping
from typing import Any

from recipes.data.filters import ByLanguage
from recipes.problem_codes import Code
from trainers.data.filters.texts import text_of
from trainers.data.sources.reader import SourceError


class Languages:
    """Finds rows in other languages; a row without words is in none."""

    def __init__(self, settings: ByLanguage) -> None:
        """Raise SourceError for a code that the model does not know."""
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._settings = settings
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=settings.probability > 0)
        known = sorted(self._identifier.labels)
        if unknown := [code for code in settings.keep if code not in known]:
            message = f"language {unknown[0]!r} is not known"
            raise SourceError(Code.UNKNOWN_CHOICE, message, f"known are {', '.join(known)}")

    def drops(self, columns: Mapping[str, Any]) -> bool:
        """Tell whether a row's text is in another language, or not surely enough in its own."""
        text = text_of(columns, self._settings.of)
        if not text.strip():
            return True
        language, score = self._identifier.classify(text)
        least = self._settings.probability
        # without normalisation, which takes time, the score is no probability
        return language not in self._settings.keep or (least > 0 and float(score) < least)
