"""The comparison of classifiers on real sentences, where `../shared/data` beside the repository holds them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SENTENCES = ROOT.parent / "shared" / "data" / "classification" / "sentence_polarity.tsv.gz"


pytestmark = [
    pytest.mark.long,
    pytest.mark.serial,
    pytest.mark.timeout(2000),
    pytest.mark.skipif(not SENTENCES.is_file(), reason=f"no file ../shared/{'/'.join(SENTENCES.parts[-3:])}"),
]


def compare(*arguments: str) -> tuple[dict[str, float], str]:
    """Mean accuracy of each arm over two seeds, and all that was printed."""
    command = [sys.executable, "benchmarks/encoder_gains.py", str(SENTENCES), "--unquoted", "--seeds", "2"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    return {arm: float(mean) for arm, mean, *_ in rows if mean[0].isdigit()}, done.stdout


def test_classifiers_of_real_sentences_learn_with_pretraining_and_without() -> None:
    means, printed = compare("--arms", "scratch", "pretrained")
    assert min(means["pretrained"], means["scratch"]) > 65.0  # half of the sentences praise
    assert "pretrained - scratch:" in printed


def test_a_real_encoder_is_five_points_better_than_random_weights(minilm: Path) -> None:
    means, printed = compare("--arms", "scratch", "outside", "--outside", str(minilm))
    assert means["outside"] > means["scratch"] + 5
    assert "outside - scratch:" in printed
