"""The closed union of the benchmarks."""

from typing import Annotated

from pydantic import Field, StringConstraints

from recipes.stages.benchmarks.bbq import Bbq
from recipes.stages.benchmarks.code import CodeProblems
from recipes.stages.benchmarks.generate import Generate
from recipes.stages.benchmarks.last_word import LastWord
from recipes.stages.benchmarks.lm_eval import LmEval
from recipes.stages.benchmarks.multiple_choice import MultipleChoice
from recipes.stages.benchmarks.pairs import PairLikelihood

AnyBenchmark = Annotated[
    MultipleChoice | LastWord | PairLikelihood | Bbq | Generate | CodeProblems | LmEval, Field(discriminator="suite")
]
BenchmarkName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
