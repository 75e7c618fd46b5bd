"""What `check` finds beyond the recipe's own text, in one pass with it: its data, inputs in the store, first rows."""

from collections import Counter
from collections.abc import Iterator, Mapping

from launch.checks.row_check import RowFindings, StageRow, check_rows
from launch.inputs.data_check import DataCheck, row_roles
from launch.inputs.external import find_input
from recipes.errors import Problem, RequestError
from recipes.loaded_recipe import LoadedRecipe
from recipes.problem_codes import Code
from recipes.references import StoreRef, parse_reference
from recipes.rules.models import model_facts
from recipes.stages.answers import INPUT_FIELDS
from trainers.data.check_source import CHECKED_ROWS, first_images
from trainers.data.first_rows import first_rows
from trainers.data.row_forms import opens_images
from trainers.store.store import Store


class FurtherCheck:
    """Says what is wrong beyond the recipe's text, and keeps the rows that it read last."""

    def __init__(self, store: Store | None) -> None:
        self.rows = RowFindings()
        self._store = store
        self._data = DataCheck()

    def __call__(self, loaded: LoadedRecipe) -> list[Problem]:
        """Everything wrong with the sound parts of a recipe."""
        problems = [*self._data(loaded), *self._missing_inputs(loaded)]
        self.rows = check_rows(loaded, self._store, problems)
        shown = {(row.stage, row.field) for row in self.rows.rows}
        unread = self._unread(loaded, [*problems, *self.rows.problems])
        self.rows.rows += [row for row in unread if (row.stage, row.field) not in shown]
        return [*problems, *self.rows.problems]

    def _unread(self, loaded: LoadedRecipe, known: list[Problem]) -> Iterator[StageRow]:
        """Images, and rows with images, that hold more than is read of them; other rows are shown by `check_rows`."""
        wrong = {problem.field for problem in known}
        for name, stage in loaded.recipe.stages.items():
            for use in [member for whole in stage.sources() for member in whole.members()]:
                if use.is_derived or any(field.startswith(f"stages.{name}.{use.field_path}") for field in wrong):
                    continue
                unread: Mapping[str, int] = {}
                if use.facts.is_images:
                    unread = first_images(use.images, loaded.base_dir).unread
                elif opens_images(row_roles(use, model_facts(loaded, stage).family)):
                    rows = first_rows(use.plain, loaded.base_dir, "image_text", CHECKED_ROWS)
                    unread = Counter(column for row in rows for column in row.reading.unread)
                if unread:
                    yield StageRow(name, use.field_path, "first rows", None, (), {}, dict(unread), {}, 0)

    def _missing_inputs(self, loaded: LoadedRecipe) -> Iterator[Problem]:
        """Inputs that the store does not have."""
        if self._store is None:
            return
        for name, stage in loaded.stages_with(*INPUT_FIELDS):
            for item in stage.inputs():
                try:
                    if isinstance(parse_reference(item.text), StoreRef):
                        find_input(item.text, item.wants, loaded.base_dir, self._store, fetches=False)
                except (RequestError, ValueError) as error:
                    place = f"stages.{name}.{item.field_path}"
                    yield loaded.problem(Code.INPUT_NOT_FOUND, place, item.text, str(error))
