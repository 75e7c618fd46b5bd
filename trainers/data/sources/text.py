"""Plain text files: one document a file, or one a paragraph."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recipes.data.text import TextFiles
from recipes.problem_codes import Code
from trainers.data.sources.local_files import Found, file_parts, files_digest, find_sorted, open_text, require
from trainers.data.sources.reader import Part, RawRow, RowFiles, SourceError

HEAD_CHARACTERS = 2**16
"""What is read of a file of which only the first rows are wanted; the last one of them is cut there."""


@dataclass(frozen=True, slots=True)
class TextReader:
    """Reads plain text files."""

    source: TextFiles
    base_dir: Path
    is_remote = False

    def parts(self) -> Iterator[Part]:
        """Yield the files."""
        return file_parts(self._found(), self._read)

    def digest(self) -> str:
        """Hash the files' bytes, in the order of their paths."""
        return files_digest(require(self._found()))

    def files(self) -> RowFiles:
        """Return the files."""
        return RowFiles(require(self._found()))

    def _found(self) -> list[Found]:
        """Find the files; a single document is learnt from or held out, never divided."""
        found = find_sorted(self.source.files, self.base_dir)
        if self.source.documents == "file" and self.source.hold_out > 0 and len(found) == 1:
            path = found[0][1]
            if not isinstance(path, SourceError):
                message = f"{path} is one document, which is learnt from or held out as a whole"
                return [
                    (
                        "hold_out",
                        SourceError(Code.SINGLE_DOCUMENT, message, "documents: paragraph, or more files", "hold_out"),
                    ),
                    *found,
                ]
        return found

    def _read(self, path: Path, limit: int | None) -> Iterator[RawRow]:
        with open_text(path) as file:
            text = file.read(-1 if limit is None else HEAD_CHARACTERS).replace("\r\n", "\n")
        label = {"label": path.absolute().parent.name} if self.source.labels == "folder" else {}
        if self.source.documents == "file":
            yield RawRow(path.name, str(path), {"text": text, **label}, path.parent)
            return
        blocks = (block.strip("\n") for block in text.split("\n\n"))
        for number, block in enumerate((block for block in blocks if block.strip()), start=1):
            yield RawRow(f"{path.name}:{number}", f"{path}: paragraph {number}", {"text": block, **label}, path.parent)
