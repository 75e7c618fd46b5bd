"""What `check` finds beyond the recipe's own text, in one pass with it: its data, inputs in the store, first rows."""

from collections.abc import Iterator

from launch.checks.row_check import RowFindings, StageRow, check_rows
from launch.inputs.data_check import DataCheck
from launch.inputs.external import find_input
from recipes.errors import Problem, RequestError
from recipes.loaded_recipe import LoadedRecipe
from recipes.problem_codes import Code
from recipes.references import StoreRef, parse_reference
from recipes.stages.answers import INPUT_FIELDS
from trainers.data.check_source import first_images
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
        self.rows.rows += self._unread_of_images(loaded, problems)
        return [*problems, *self.rows.problems]

    def _unread_of_images(self, loaded: LoadedRecipe, known: list[Problem]) -> Iterator[StageRow]:
        """Rows of images that hold more than the recipe reads of them."""
        wrong = {problem.field for problem in known}
        for name, stage in loaded.recipe.stages.items():
            for use in stage.sources():
                place = f"stages.{name}.{use.field_path}"
                if use.role != "images" or use.is_derived or any(field.startswith(place) for field in wrong):
                    continue
                if unread := first_images(use.images, loaded.base_dir).unread:
                    yield StageRow(name, use.field_path, "first images", None, (), {}, dict(unread))

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
