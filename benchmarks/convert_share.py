"""How many of another system's files `trainwright convert` turns into recipes that `check` accepts.

    python -m benchmarks.convert_share FOLDER [--from SYSTEM] [--folder DIR] [--rows N] [--refused]

Of each file with a training configuration: its kind, and whether it became a recipe without a problem but for models
and data that are not there. The keys that are refused are counted; `--refused` lists the files too.
"""

import argparse
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from launch.inputs.convert import convert_files
from recipes.convert.registry import SYSTEMS, find_system, recognise
from recipes.convert.source_text import read_source
from recipes.errors import RecipeError, TrainwrightError

SUFFIXES = (".yaml", ".yml", ".json", ".sh")
WANTED = ("full fine-tuning", "adapters", "pretraining")
OTHER = {"reward": "reward models", "preference": "preferences", "rl": "reinforcement learning"}


@dataclass(frozen=True)
class Outcome:
    """What came of a file."""

    file: Path
    kind: str
    reasons: tuple[str, ...]
    """Refused keys, or problems of the recipe; none: it converts."""


def main() -> None:
    """Print the shares by kind of training, and what was refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--from", dest="system", choices=list(SYSTEMS))
    parser.add_argument("--folder", dest="working_dir", type=Path, default=None)
    parser.add_argument("--rows", type=int, help="rows of the data, from which RL counts its iterations")
    parser.add_argument("--refused", action="store_true", help="list every file that does not convert")
    options = parser.parse_args()
    files = sorted(path for path in options.folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    found, skipped = [], Counter[str]()
    for file in files:
        outcome = measure(file, options.system, options.working_dir or options.folder, options.rows)
        if isinstance(outcome, str):
            skipped[outcome] += 1
            if options.refused:
                print(f"  {file}: {outcome}")
        else:
            found.append(outcome)
    show(found, skipped, options.refused)


def measure(file: Path, system: str | None, working_dir: Path, rows: int | None) -> Outcome | str:
    """Convert one file; a text says why it is none to convert."""
    try:
        value = read_source(file, working_dir).value
        known = find_system(system) if system is not None else recognise(value, str(file))[0]
    except RecipeError as error:
        return f"not readable: {error.problems[0].message}"
    except TrainwrightError:
        return "no training configuration of a known system"
    if not known.is_whole:
        return f"a part of a configuration: {known.title}"
    if not known.trains(value):
        return "does not train: it merges, serves, prepares or evaluates"
    found = convert_files([file], system=system, working_dir=working_dir, rows=rows)
    (stage,) = found.conversion.recipe["stages"].values()
    kind = OTHER.get(known.kind_of(value) or stage["kind"])
    if kind is None:
        kind = "adapters" if "lora" in stage else "pretraining" if stage["kind"] == "pretrain" else "full fine-tuning"
    return Outcome(file, kind, tuple(f"{problem.field}: {problem.message}" for problem in found.problems))


def show(found: list[Outcome], skipped: Counter[str], lists_files: bool) -> None:
    """Print a line for each kind, then reasons."""
    by_kind = defaultdict(list)
    for outcome in found:
        by_kind[outcome.kind].append(outcome)
    wanted = [outcome for outcome in found if outcome.kind in WANTED]
    for kind, outcomes in [*by_kind.items(), (" + ".join(WANTED), wanted)]:
        converted = sum(not outcome.reasons for outcome in outcomes)
        print(f"{kind}: {converted} of {len(outcomes)} convert ({converted / max(1, len(outcomes)):.1%})")
    for reason, count in skipped.most_common():
        print(f"not counted: {count} ({reason})")
    reasons = Counter(reason for outcome in found for reason in outcome.reasons)
    for reason, count in reasons.most_common():
        print(f"{count:4}  {reason}")
    if lists_files:
        for outcome in found:
            if outcome.reasons:
                print(f"{outcome.kind}: {outcome.file}: {'; '.join(outcome.reasons)}")


if __name__ == "__main__":
    main()
