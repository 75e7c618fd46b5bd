"""A stop is answered in seconds, whatever a stage does: a rank leaves what can be begun again, and saves the rest."""

import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.run.bed import Bed

pytestmark = [pytest.mark.serial, pytest.mark.long]

ANSWERED_S = 20.0
"""On a machine with nothing else to do it takes three; a rank that does not answer is killed after 30."""
LIBRARY = sysconfig.get_path("stdlib")
RECIPE = f"""
name: stops
cluster: {{workers: 2}}
stages:
  base:
    kind: pretrain
    architecture: {{family: decoder, type: llama, num_hidden_layers: 2, hidden_size: 64, intermediate_size: 176,
                   num_attention_heads: 2, max_position_embeddings: 128, tie_word_embeddings: true}}
    tokenizer: {{train: bpe, vocab_size: 2000}}
    data: {{source: text, files: ["{LIBRARY}/*.py", "{LIBRARY}/[a-m]*/*.py"], documents: paragraph, hold_out: 0.3}}
    train: {{steps: 400, global_batch: 16, sequence_length: 128, optimizer: {{lr: 1e-3}}, save_every: 1000,
            evaluate_every: 6, evaluation_rows: 20_000}}
"""


def test_every_phase_is_left_in_seconds(
    make_bed: Callable[[], Bed], tmp_path: Path, say: Callable[[str], None]
) -> None:
    bed = make_bed()
    recipe = tmp_path / "stops.yaml"
    recipe.write_text(RECIPE)
    arguments: tuple[str, ...] = ("run", str(recipe))
    for phase, step in (("tokenizer", None), ("data", None), ("evaluate", 6)):
        seen = len(bed.events("base"))
        driver = bed.start(*arguments)
        bed.wait_for(
            lambda: any(
                event["event"] in ("phase", "progress") and event.get("phase") == phase  # noqa: B023
                for event in bed.events("base")[seen:]  # noqa: B023
            ),
            driver,
        )
        time.sleep(1.0)
        asked_at = time.monotonic()
        bed.record().request_stop()
        assert driver.wait(60) == 75, bed.output()
        took_s = time.monotonic() - asked_at
        say(f"{phase} was left after {took_s:.1f} s")
        assert took_s < ANSWERED_S
        bed.assert_nothing_left()
        assert bed.record().summary().state == "stopped"
        if step is not None:
            assert f"after {step} of 400 steps" in bed.output()
        arguments = ("resume", "last")
