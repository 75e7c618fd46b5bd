"""Data files that every node of a cluster sees: looked for on each of them before a recipe is submitted.

`python -m launch.jobs.shared_files QUESTION` asks from one of the nodes, as a job.
"""

import base64
import hashlib
import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from launch.inputs.data_files import LocalSource, places
from launch.inputs.resolved import Resolved
from recipes.data.images import ImageSource
from recipes.data.text import Source
from recipes.errors import CapacityError, Problem, RecipeError, RequestError, TrainwrightError
from recipes.problem_codes import Code
from trainers.data.image_text_digest import image_text_digest
from trainers.data.source_digest import source_digest
from trainers.data.source_files import SourceFiles, source_files

ANSWER = "trainwright-files="
ANSWER_TIMEOUT_S = 900.0
"""A node whose files have other times of change reads them all."""
MAX_QUESTION_BYTES = 100_000
"""Linux takes 128 KiB as one argument of a command."""
ADVICE = "put the files where every node of the cluster sees them under this path, or submit with --upload"


def question(resolved: Resolved, sources: Sequence[LocalSource]) -> str:
    """What each node is asked, as one argument; raises RequestError where it is too long for one."""
    asked = [
        {
            "source": source.source.model_dump(mode="json"),
            "is_images": source.is_images,
            "names_images": source.names_images,
            "base_dir": str(resolved.base_dir),
            "marks": _marks(source.found),
            "digest": source.digest,
        }
        for source in sources
    ]
    text = base64.urlsafe_b64encode(zlib.compress(json.dumps(asked).encode())).decode()
    if len(text) > MAX_QUESTION_BYTES:
        raise RequestError("the recipe lists too many data files by name; give patterns, as data/*.jsonl, or --upload")
    return text


def read_question(text: str) -> list[dict[str, Any]]:
    """What `question` gave as one argument."""
    asked: list[dict[str, Any]] = json.loads(zlib.decompress(base64.urlsafe_b64decode(text)))
    return asked


def raise_differences(resolved: Resolved, sources: Sequence[LocalSource], lines: Sequence[str]) -> int:
    """Read the job's output; returns how many nodes have the same files, raises RecipeError naming node and path."""
    answer = next((line.removeprefix(ANSWER) for line in reversed(lines) if line.startswith(ANSWER)), None)
    if answer is None:
        raise CapacityError(f"the nodes could not be asked for the data files: {lines[-1] if lines else 'no output'}")
    by_node: dict[str, list[str] | str] = json.loads(answer)
    problems = []
    for node, found in by_node.items():
        if isinstance(found, str):
            raise CapacityError(f"node {node} could not be asked for the data files: {found}")
        for source, message in zip(sources, found, strict=True):
            if message:
                value = ", ".join(places(source.source))
                problems.append(
                    Problem(
                        Code.FILES_DIFFER, resolved.source, None, source.field, value, f"node {node}: {message}", ADVICE
                    )
                )
    if problems:
        raise RecipeError(problems)
    return len(by_node)


def look(asked: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with each source as this machine sees it; empty for the same files.

    Files of the same names, sizes and times of change are taken for the same; others are read.
    """
    return [_look_at(item) for item in asked]


def _look_at(asked: Mapping[str, Any]) -> str:
    adapter: TypeAdapter[Any] = TypeAdapter(ImageSource if asked["is_images"] else Source)
    source, base_dir = adapter.validate_python(asked["source"]), Path(asked["base_dir"])
    try:
        found = source_files(source, base_dir, names_images=asked["names_images"])
        if found is None:
            return f"there is no folder {', '.join(str(base_dir / place) for place in places(source))}"
        if _marks(found) == asked["marks"]:
            return ""
        digest = image_text_digest(source, base_dir) if asked["names_images"] else source_digest(source, base_dir)
    except (TrainwrightError, OSError) as error:
        return str(error)
    named = ", ".join(str(base_dir / place) for place in places(source))
    return "" if digest == asked["digest"] else f"{named}: other content than on the submitting machine"


def _marks(found: SourceFiles) -> str:
    """A hash over the files' paths, sizes and times of change."""
    seen = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for _, path in sorted(found.files.items())]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def main(text: str) -> int:
    """Ask every node that can hold a worker, and print their answers."""
    from cluster.each_node import ask_each_node
    from cluster.session import start

    asked = read_question(text)
    with start("auto", name="files") as session:
        nodes = [node for node in session.nodes() if node.cpus or node.gpus]
        answers = ask_each_node(nodes, "launch.jobs.shared_files:look", asked, ANSWER_TIMEOUT_S)
    print(f"{ANSWER}{json.dumps(answers)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
