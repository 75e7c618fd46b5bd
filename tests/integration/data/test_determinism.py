"""python-docs in separate processes: hash seed, locale and order of folder entries make no difference."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from trainers.data.demo.python_docs import library_folder

MODULES = "[a-d]*.py"
"""What is read of the standard library: some thirty modules, which have training and held-out rows."""
PACKAGES = ("email", "json", "logging")
SCRIPT = """
import hashlib, os, sys
from pathlib import Path
from trainers.data.demo.python_docs import python_docs_digest, read_entries
from trainers.data.demo.python_docs_sets import build_sets
scandir = os.scandir
class Reversed:
    def __init__(self, path): self.entries = sorted(scandir(path), key=lambda entry: entry.name)
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def __iter__(self): return self
    def close(self): pass
    def __next__(self):
        if not self.entries: raise StopIteration
        return self.entries.pop()
if "reversed" in sys.argv: os.scandir = Reversed
library = Path(sys.argv[1])
sets = build_sets(read_entries(library))
assert all(rows for splits in sets.rows.values() for rows in splits.values()), sets.counts
files = sets.files()
sets_digest = hashlib.sha256(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()
print(python_docs_digest(library), sets_digest)
"""


def test_rows_depend_on_neither_hash_seed_nor_locale_nor_file_order(tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    for module in library_folder().glob(MODULES):
        shutil.copyfile(module, library / module.name)
    for package in PACKAGES:
        shutil.copytree(library_folder() / package, library / package, ignore=shutil.ignore_patterns("__pycache__"))
    root = Path(__file__).parents[3]
    environments = [("0", "C", []), ("12345", "C.UTF-8", ["reversed"])]
    outputs = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(library), *arguments],
            env={**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": locale, "PYTHONPATH": str(root), "PYTHONUTF8": "0"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, locale, arguments in environments
    }
    assert len(outputs) == 1
