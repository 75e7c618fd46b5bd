"""Manifests say what they mean, in one way only."""

import json
import pickle
import re
from pathlib import Path

import pytest

from recipes.errors import StoreDamaged
from recipes.models.families import ARTIFACT_KINDS
from trainers.store.manifest import (
    ArtifactManifest,
    FileEntry,
    Outcome,
    StoreFormat,
    canonical_json,
    files_digest,
    manifest_bytes,
    read_manifest,
    sha256_hex,
)
from trainers.store.store import Fenced

FILES = {"model/config.json": FileEntry(sha256=sha256_hex(b"{}"), bytes=2)}


def make(**changes: object) -> ArtifactManifest:
    fields = {"fingerprint": "ab" * 32, "digest": files_digest(FILES), "kind": "model", "stage": "base", "files": FILES}
    return ArtifactManifest.model_validate({**fields, **changes})


def test_digest_is_the_hash_of_name_to_hash() -> None:
    text = b'{"model/config.json":"' + sha256_hex(b"{}").encode() + b'"}'
    assert files_digest(FILES) == sha256_hex(text)
    with pytest.raises(ValueError, match=r"digest .* files"):
        make(digest="cd" * 32)


def test_bytes_are_canonical() -> None:
    manifest = make(metrics={"b": 1.5, "a": [1, None, "ä"]})
    data = manifest_bytes(manifest)
    assert data == manifest_bytes(read_manifest(data))
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert "ä".encode() in data


def test_not_a_number_is_no_metric() -> None:
    with pytest.raises(ValueError, match="metrics"):
        make(metrics={"loss": float("nan")})
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("inf"))


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", "./a", "a\\b", "C:x", "a\nb", "x" * 600]
)
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    files = {name: FileEntry(sha256="0" * 64, bytes=0)}
    with pytest.raises(ValueError, match=r"relative file name|not portable"):
        make(files=files, digest=files_digest(files))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": None}, "format None; .* format 1"),
        ({"format": 0}, "format 0"),
        ({"format": True}, "format True"),
        ({"format": "2"}, "format '2'"),
        ({"type": "thing"}, "type 'thing'"),
        ({"surprise": 1}, "surprise"),
        ({"kind": "spaceship"}, "kind"),
        ({"fingerprint": "AB" * 32}, "fingerprint"),
        ({"digest": "cd" * 32}, "digest"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused_by_name(change: dict[str, object], message: str) -> None:
    raw = {**json.loads(manifest_bytes(make())), **change}
    with pytest.raises(StoreDamaged, match=message):
        read_manifest(json.dumps(raw).encode())


@pytest.mark.parametrize("change", [{}, {"type": "thing"}, {"files": 5, "surprise": 1}])
def test_a_manifest_of_a_later_format_is_no_damage(change: dict[str, object]) -> None:
    raw = {**json.loads(manifest_bytes(make())), **change, "format": 2}
    with pytest.raises(StoreFormat, match=r"format 2; .* format 1"):
        read_manifest(json.dumps(raw).encode())
    assert not issubclass(StoreFormat, StoreDamaged)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"null", b"{}", b"{" * 1000, b"[" * 100_000])
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(StoreDamaged, match="not a manifest"):
        read_manifest(data)


def test_success_means_every_step() -> None:
    Outcome(state="completed", steps_done=5, steps_planned=5)
    Outcome(state="stopped_by", rule="kl", steps_done=3, steps_planned=5)
    with pytest.raises(ValueError, match="4 of 5"):
        Outcome(state="completed", steps_done=4, steps_planned=5)
    with pytest.raises(ValueError, match="needs the rule"):
        Outcome(state="stopped_by", steps_done=4, steps_planned=5)


def test_errors_survive_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(Fenced("lease 1 was superseded by lease 2")))  # a test of picklability only
    assert isinstance(error, Fenced)
    assert (str(error), error.exit_code) == ("lease 1 was superseded by lease 2", 4)


def test_the_page_of_the_store_lists_every_kind() -> None:
    page = (Path(__file__).parents[3] / "docs" / "store.md").read_text()
    (cell,) = re.findall(r"^\| `kind` \| (.*) \|$", page, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", cell)) == ARTIFACT_KINDS
