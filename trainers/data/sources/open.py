"""From a recipe's source to its reader: the one place that tells the kinds of source apart."""

from pathlib import Path

from recipes.data.images import (
    Digits,
    Idx,
    ImageArrays,
    ImageDatasets,
    ImageFolder,
    ImageJsonLines,
    ImageParquet,
    ImageSource,
)
from recipes.data.text import (
    Csv,
    Datasets,
    FeedbackPairs,
    JsonLines,
    Parquet,
    PlainSource,
    PythonDocs,
    PythonSummaries,
    TextFiles,
)
from trainers.data.row_forms import RowRole
from trainers.data.sources.arrays import ArraysReader
from trainers.data.sources.csv_files import CsvReader
from trainers.data.sources.digits import DigitsReader
from trainers.data.sources.documentation import DocsReader, SummariesReader
from trainers.data.sources.feedback import FeedbackReader
from trainers.data.sources.hub import DatasetsReader
from trainers.data.sources.idx import IdxReader
from trainers.data.sources.image_folder import ImageFolderReader
from trainers.data.sources.json_lines import JsonLinesReader
from trainers.data.sources.parquet import ParquetReader
from trainers.data.sources.reader import Reader
from trainers.data.sources.text import TextReader
from trainers.store.store import Store


def open_source(
    source: PlainSource | ImageSource, base_dir: Path, role: RowRole = "text", store: Store | None = None
) -> Reader:
    """Return the reader of one source, a mixture's members are several; relative paths start at `base_dir`.

    The documentation has other rows for each role; the store keeps what was extracted from it.
    """
    match source:
        case PythonDocs():
            return DocsReader(source, role, store)
        case PythonSummaries():
            return SummariesReader(source, store)
        case TextFiles():
            return TextReader(source, base_dir)
        case JsonLines():
            return JsonLinesReader(source, base_dir)
        case ImageJsonLines():
            return JsonLinesReader(source, base_dir, image_column=source.image)
        case Csv():
            return CsvReader(source, base_dir)
        case Parquet() | ImageParquet():
            return ParquetReader(source, base_dir)
        case Datasets() | ImageDatasets():
            return DatasetsReader(source, base_dir)
        case FeedbackPairs():
            return FeedbackReader(source)
        case Digits():
            return DigitsReader(source)
        case Idx():
            return IdxReader(source, base_dir)
        case ImageFolder():
            return ImageFolderReader(source, base_dir)
        case ImageArrays():
            return ArraysReader(source, base_dir)
