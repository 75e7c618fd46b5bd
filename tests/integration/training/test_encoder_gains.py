"""The comparison of classifiers on real sentences, where `../shared/data` beside the repository holds them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SENTENCES = ROOT.parent / "shared" / "data" / "classification" / "sentence_polarity.tsv.gz"


@pytest.mark.long
@pytest.mark.serial
@pytest.mark.skipif(not SENTENCES.is_file(), reason=f"no file ../shared/{'/'.join(SENTENCES.parts[-3:])}")
def test_classifiers_of_real_sentences_learn_with_pretraining_and_without() -> None:
    command = [sys.executable, "benchmarks/encoder_gains.py", str(SENTENCES), "--unquoted"]
    done = subprocess.run(
        [*command, "--seeds", "2", "--arms", "scratch", "pretrained"],
        cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    means = dict(line.strip("| ").split(" | ")[:2] for line in done.stdout.splitlines() if line.startswith("| "))
    assert min(float(means["pretrained"]), float(means["scratch"])) > 65.0  # half of the sentences praise
    assert "pretrained - scratch:" in done.stdout
