"""Filters of a source of text: which of its rows are left out before any are held out, parted or limited."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from recipes.fields import Strict, meaning, refuse
from recipes.problem_codes import Code

Part = Literal["row", "prompt", "answer"]
"""Which text of a row: all of it, what the model reads, or what it learns to write (of a plain text all)."""


class _Filter(Strict):
    """Settings that every filter has."""

    of: Part = meaning("row", description="Which text of a row: all of it, its prompt, or its answers.")


class ByLength(_Filter):
    """Rows that are too short or too long."""

    by: Literal["length"] = meaning(description="Leaves out rows by the length of their text.")
    unit: Literal["characters", "words", "tokens"] = meaning(
        "characters", description="What is counted; tokens are those of the stage's tokenizer, without its template."
    )
    least: int | None = meaning(None, ge=0, le=10**9, description="The shortest text that is kept.")
    most: int | None = meaning(None, ge=0, le=10**9, description="The longest text that is kept.")

    @model_validator(mode="after")
    def _bounded(self) -> "ByLength":
        if self.least is None and self.most is None:
            refuse(Code.MISSING_KEY, "give least, most or both")
        if self.least is not None and self.most is not None and self.least > self.most:
            refuse(Code.OUT_OF_RANGE, f"least ({self.least}) must be at most {self.most}, which is `most`")
        return self

    @property
    def reason(self) -> str:
        """What the build report counts its rows under."""
        return "length"


class ByLanguage(_Filter):
    """Rows in other languages."""

    by: Literal["language"] = meaning(description="Leaves out rows in other languages (py3langid).")
    keep: list[Annotated[str, Field(pattern=r"^[a-z]{2}$")]] = meaning(
        min_length=1, description="Languages that are kept, by their ISO 639-1 codes, as en."
    )
    probability: float = meaning(
        0.0, ge=0, le=1, description="Rows are left out too whose language is less probable than this."
    )

    @property
    def reason(self) -> str:
        """What the build report counts its rows under."""
        return "language"


class ByPattern(_Filter):
    """Rows that a regular expression is found in, or is not."""

    by: Literal["pattern"] = meaning(description="Leaves out rows by a regular expression.")
    drop: str | None = meaning(None, min_length=1, description="Rows are left out in which this is found.")
    keep: str | None = meaning(None, min_length=1, description="Rows are left out in which this is not found.")
    ignore_case: bool = meaning(False, description="Whether upper and lower case are the same.")

    @model_validator(mode="after")
    def _readable(self) -> "ByPattern":
        if (self.drop is None) == (self.keep is None):
            refuse(Code.CONFLICTING_KEYS, "give one of drop and keep")
        try:
            re.compile(self.drop or self.keep or "")
        except re.error as error:
            refuse(Code.INVALID_FORMAT, f"not a regular expression: {error}")
        return self

    @property
    def reason(self) -> str:
        """What the build report counts its rows under."""
        return "pattern"


class ByDuplicate(_Filter):
    """Rows whose text an earlier row has."""

    by: Literal["duplicate"] = meaning(description="Leaves out rows whose text is that of an earlier one.")

    @property
    def reason(self) -> str:
        """What the build report counts its rows under."""
        return "duplicate"


class ByNearDuplicate(_Filter):
    """Rows whose text is nearly that of an earlier one."""

    by: Literal["near_duplicate"] = meaning(
        description="Leaves out rows that share most runs of words with an earlier one: MinHash (rensa) finds pairs, "
        "the exact Jaccard similarity decides."
    )
    threshold: float = meaning(
        0.8, gt=0.3, le=1, description="Least Jaccard similarity of the sets of runs of two near duplicates."
    )
    ngram: int = meaning(5, ge=1, le=100, description="Words of a run.")

    @property
    def reason(self) -> str:
        """What the build report counts its rows under."""
        return "near_duplicate"


class ByContamination(_Filter):
    """Rows that hold text of evaluation sets."""

    by: Literal["contamination"] = meaning(description="Leaves out rows that share runs of words with other files.")
    against: list[str] = meaning(
        min_length=1,
        description="Paths or patterns of evaluation sets, relative to the recipe's folder: JSON lines, CSV, Parquet "
        "or plain text by their names; every text in their rows counts.",
    )
    ngram: int = meaning(
        13, ge=2, le=100, description="Words of a run; shorter texts of five words or more count whole."
    )
    share: float = meaning(
        0.0, ge=0, lt=1, description="Rows are left out of whose runs more than this share is found; 0: any run at all."
    )

    @property
    def reason(self) -> str:
        """What the build report counts its rows under."""
        return "contamination"


Filter = Annotated[
    ByLength | ByLanguage | ByPattern | ByDuplicate | ByNearDuplicate | ByContamination, Field(discriminator="by")
]
