"""Whose text the counted baseline of an evaluation is counted on: that of the whole chain, or of nobody."""

from typing import Any

import pytest

from trainers.evaluation.suites import perplexity
from trainers.evaluation.suites.perplexity import chain_training_sets
from trainers.store.manifest import ArtifactManifest, Parent, files_digest

ENDED = {"state": "completed", "rule": None, "steps_done": 1, "steps_planned": 1}


def manifest(number: int, training_set: str | None, **parents: int) -> ArtifactManifest:
    return ArtifactManifest.model_validate(
        {
            "fingerprint": f"{number:064x}",
            "digest": files_digest({}),
            "kind": "model",
            "stage": f"stage{number}",
            "files": {},
            "parents": {
                path: Parent(fingerprint=f"{other:064x}", digest=files_digest({})) for path, other in parents.items()
            },
            "metrics": {} if training_set is None else {"training_set": training_set},
            "outcome": ENDED,
        }
    )


class Shelf:
    """A store that has artifacts, and knows nothing else."""

    def __init__(self, *found: ArtifactManifest) -> None:
        self._found = {each.fingerprint: each for each in found}

    def find_artifact(self, fingerprint: str) -> ArtifactManifest | None:
        return self._found.get(fingerprint)


BASE = manifest(1, "text")
CHAT = manifest(2, "answers", init_from=1)
JUDGE = manifest(3, "pairs", init_from=2)
POLICY = manifest(4, None, actor=2, reward=3)


@pytest.fixture(autouse=True)
def sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every digest is a set of its name, but for one that is gone."""
    monkeypatch.setattr(perplexity, "find_dataset", lambda digest, store: None if digest == "gone" else digest)


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (BASE, ["text"]),
        (CHAT, ["text", "answers"]),
        (POLICY, ["text", "answers"]),
        (manifest(5, "more", init_from=4), ["text", "answers", "more"]),
        (manifest(6, None), []),
        (manifest(7, "gone", init_from=1), []),
        (manifest(8, "more", init_from=6), []),
        (manifest(9, "more", init_from=99), []),
    ],
)
def test_the_baseline_sees_what_the_chain_saw(model: ArtifactManifest, wanted: list[str]) -> None:
    store: Any = Shelf(BASE, CHAT, JUDGE, POLICY, manifest(6, None))
    assert chain_training_sets(model, store) == wanted
