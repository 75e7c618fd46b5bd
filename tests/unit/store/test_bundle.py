"""Bundles carry artifacts to another store; a bundle that was tampered with is refused by name, whatever the trick."""

import hashlib
import json
import os
import pickle
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.cli.store_commands import store_app
from recipes.errors import RequestError, StoreDamaged
from trainers.store.bundle import is_bundle, read_bundle, write_bundle
from trainers.store.inspection import lineage, verify
from trainers.store.manifest import (
    ArtifactManifest,
    canonical_json,
    sha256_hex,
)
from trainers.store.objects import object_path
from trainers.store.store import Store


def tensors(entries: dict[str, tuple[str, list[int], list[int]]], num_bytes: int, fill: int = 0) -> bytes:
    """A safetensors file with this header and that much data, whether or not they fit."""
    parts = {name: {"dtype": dtype, "shape": shape, "data_offsets": at} for name, (dtype, shape, at) in entries.items()}
    header = json.dumps(parts).encode()
    return struct.pack("<Q", len(header)) + header + bytes([fill] * num_bytes)


def contents(name: str, **more: bytes) -> dict[str, bytes]:
    """Files of an artifact; of `more`, `notes_txt` becomes model/notes.txt."""
    files = {
        "model/model.safetensors": tensors({"w": ("U8", [4], [0, 4])}, 4, len(name)),
        "model/config.json": json.dumps({"n": name}).encode(),
    }
    return files | {f"model/{key.replace('_', '.')}": data for key, data in more.items()}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "other"))


@pytest.fixture
def bundle(commit_artifact: Any, store: Store, tmp_path: Path) -> Path:
    base = commit_artifact(store, "base", files=contents("base"))
    chat = commit_artifact(store, "chat", base, files=contents("chat", notes_txt=b"words"))
    write_bundle(store, [base, chat], tmp_path / "bundle")
    return tmp_path / "bundle"


def test_what_is_carried_arrives(store: Store, other: Store, bundle: Path) -> None:
    assert is_bundle(bundle)
    assert sorted(path.name for path in bundle.iterdir()) == ["bundle.json", "objects"]
    taken = read_bundle(other, bundle)
    assert [item.stage for item in taken] == ["base", "chat"]
    assert other.list_artifacts() == store.list_artifacts()
    assert verify(other).damage == []
    assert [item.stage for item in lineage(other, taken[1].fingerprint).ancestors] == ["base"]
    assert read_bundle(other, bundle) == taken


def test_a_bundle_is_recorded_as_the_origin(other: Store, bundle: Path) -> None:
    """By the hash of its index, and by what is said of it, through the command line; shown by `show` and `lineage`."""
    at = ["--store", other.uri]
    index = hashlib.sha256((bundle / "bundle.json").read_bytes()).hexdigest()
    for said in ([], ["--source", "the other team"], []):
        assert CliRunner().invoke(store_app, ["import", str(bundle), "--name", "taken", *said, *at]).exit_code == 0
    shown = json.loads(CliRunner().invoke(store_app, ["show", "taken", "--json", *at]).stdout)["imports"]
    assert [(origin["source"], origin["bundle"]) for origin in shown] == [
        ("bundle", index),
        ("the other team", index),
    ]
    base, chat = other.list_artifacts()
    made = json.loads(CliRunner().invoke(store_app, ["lineage", "taken", "--json", *at]).stdout)
    assert made["imports"] == {base.fingerprint: shown, chat.fingerprint: shown}
    words = CliRunner().invoke(store_app, ["show", "taken", *at]).stdout
    assert f"imported     from the other team, bundle {index[:16]}" in words
    assert "imported from bundle" in CliRunner().invoke(store_app, ["lineage", "taken", *at]).stdout


def test_one_artifact_alone_names_its_missing_parents(store: Store, other: Store, bundle: Path, tmp_path: Path) -> None:
    chat = next(item for item in store.list_artifacts() if item.stage == "chat")
    write_bundle(store, [chat], tmp_path / "alone")
    read_bundle(other, tmp_path / "alone", digest=chat.digest)
    assert lineage(other, chat.fingerprint).missing == [chat.parents["of.0"].fingerprint]


def test_a_bundle_is_the_same_wherever_it_is_written(store: Store, bundle: Path, tmp_path: Path) -> None:
    write_bundle(store, store.list_artifacts(), tmp_path / "again")

    def content(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert content(tmp_path / "again") == content(bundle)
    assert str(tmp_path).encode() not in b"".join(content(bundle).values())
    with pytest.raises(RequestError, match=f"{bundle} exists"):
        write_bundle(store, store.list_artifacts(), bundle)


def test_the_wrong_digest_is_refused(other: Store, bundle: Path) -> None:
    with pytest.raises(RequestError, match=f"digest {'ab' * 32}"):
        read_bundle(other, bundle, digest="ab" * 32)
    assert other.list_artifacts() == []


def test_a_fingerprint_that_the_store_has_otherwise_is_not_replaced(
    commit_artifact: Any, store: Store, other: Store, bundle: Path
) -> None:
    mine = commit_artifact(other, "base", files=contents("base", more_txt=b"other files, same fingerprint"))
    with pytest.raises(RequestError, match="was not taken"):
        read_bundle(other, bundle)
    assert other.find_artifact(mine.fingerprint) == mine


# Hostile bundles: each changes a good one.


class Payload:
    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


def objects(bundle: Path) -> list[Path]:
    return sorted(path for path in (bundle / "objects").rglob("*") if path.is_file())


def index(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "bundle.json").read_bytes())
    return found


def rewrite(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def add(bundle: Path, data: bytes) -> str:
    sha = sha256_hex(data)
    rewrite(bundle / object_path(sha), data)
    return sha


def with_file(name: str, data: bytes) -> Callable[[Path], None]:
    """A consistent bundle (all hashes are right) whose artifact holds this file."""

    def change(bundle: Path) -> None:
        shutil.rmtree(bundle / "objects")
        files = {name: {"sha256": add(bundle, data), "bytes": len(data)}}
        digest = sha256_hex(canonical_json({name: files[name]["sha256"]}))
        raw = {"format": 1, "type": "artifact", "fingerprint": "ab" * 32, "digest": digest, "kind": "model"}
        whole = ArtifactManifest.model_construct(**{**raw, "stage": "x", "files": {}}).model_dump(mode="json")
        manifest = add(bundle, canonical_json({**whole, "files": files}))
        artifacts = {"ab" * 32: manifest}
        rewrite(bundle / "bundle.json", canonical_json({"format": 1, "type": "bundle", "artifacts": artifacts}))

    return change


def with_manifest(**changes: Any) -> Callable[[Path], None]:
    """A bundle whose first manifest says something else and is signed again with its new hash."""

    def change(bundle: Path) -> None:
        found = index(bundle)
        fingerprint, sha = next(iter(found["artifacts"].items()))
        raw = json.loads((bundle / object_path(sha)).read_bytes())
        (bundle / object_path(sha)).unlink()
        found["artifacts"][fingerprint] = add(bundle, canonical_json({**raw, **changes}))
        rewrite(bundle / "bundle.json", canonical_json(found))

    return change


def with_index(**changes: Any) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        rewrite(bundle / "bundle.json", canonical_json({**index(bundle), **changes}))

    return change


def flip(bundle: Path) -> None:
    path = objects(bundle)[0]
    data = path.read_bytes()
    rewrite(path, bytes([data[0] ^ 1]) + data[1:])


def swap(bundle: Path) -> None:
    one, two = objects(bundle)[:2]
    first, second = one.read_bytes(), two.read_bytes()
    rewrite(one, second)
    rewrite(two, first)


def link_object(bundle: Path) -> None:
    path = objects(bundle)[0]
    copy = bundle.parent / "elsewhere"
    shutil.copyfile(path, copy)
    path.unlink()
    path.symlink_to(copy)


def hard_link(bundle: Path) -> None:
    os.link(objects(bundle)[0], bundle.parent / "second name")


def link_folder(bundle: Path) -> None:
    os.rename(bundle / "objects", bundle.parent / "objects")
    (bundle / "objects").symlink_to(bundle.parent / "objects")


def link_index(bundle: Path) -> None:
    os.rename(bundle / "bundle.json", bundle.parent / "index")
    (bundle / "bundle.json").symlink_to(bundle.parent / "index")


def fifo(bundle: Path) -> None:
    os.mkfifo(bundle / "objects" / "pipe")


def listening(bundle: Path) -> None:
    here = os.getcwd()
    os.chdir(bundle)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket")
    finally:
        os.chdir(here)


def dotted_cycle(bundle: Path) -> None:
    found = index(bundle)
    fingerprints = list(found["artifacts"])
    for own, parent in zip(fingerprints, reversed(fingerprints), strict=True):
        sha = found["artifacts"][own]
        raw = json.loads((bundle / object_path(sha)).read_bytes())
        (bundle / object_path(sha)).unlink()
        raw["parents"] = {"init_from": {"fingerprint": parent, "digest": "cd" * 32, "part": None}}
        found["artifacts"][own] = add(bundle, canonical_json(raw))
    rewrite(bundle / "bundle.json", canonical_json(found))


PICKLE = pickle.dumps(Payload())
ZIP = b"PK\x03\x04" + bytes(26)
DEEP = b"[" * 100_000

HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (flip, "not the bytes"),
    "swapped objects": (swap, "not the bytes"),
    "truncated object": (lambda b: rewrite(objects(b)[0], objects(b)[0].read_bytes()[:-1]), "not the bytes"),
    "empty object": (lambda b: rewrite(objects(b)[0], b""), "not the bytes"),
    "missing object": (lambda b: objects(b)[0].unlink(), "is missing"),
    "missing index": (lambda b: (b / "bundle.json").unlink(), "has no bundle.json"),
    "linked object": (link_object, "is a link"),
    "hard linked object": (hard_link, "is a hard link"),
    "linked folder": (link_folder, "is a link"),
    "linked index": (link_index, "is a link"),
    "link to nothing": (lambda b: (b / "objects" / "gone").symlink_to("/nonexistent"), "is a link"),
    "link out of the folder": (lambda b: (b / "objects" / "up").symlink_to("../../.."), "is a link"),
    "fifo": (fifo, "not a regular file"),
    "socket": (listening, "not a regular file"),
    "stray file": (lambda b: rewrite(b / "setup.py", b"import os"), "no part of a bundle"),
    "stray pickle": (lambda b: rewrite(b / "data.pkl", PICKLE), "no part of a bundle"),
    "stray archive": (lambda b: rewrite(b / "objects.tar", b"x"), "no part of a bundle"),
    "stray object": (lambda b: add(b, b"nobody names this") and None, "named by no manifest"),
    "stray folder": (lambda b: (b / "objects" / "zz").mkdir(), "folder that a bundle does not have"),
    "another folder": (lambda b: (b / "refs").mkdir(), "folder that a bundle does not have"),
    "index is a list": (lambda b: rewrite(b / "bundle.json", b"[]"), "not the index"),
    "index is no JSON": (lambda b: rewrite(b / "bundle.json", b"{"), "bundle.json"),
    "index is deep": (lambda b: rewrite(b / "bundle.json", DEEP), "bundle.json"),
    "index is a pickle": (lambda b: rewrite(b / "bundle.json", PICKLE), "bundle.json"),
    "index with a key twice": (lambda b: rewrite(b / "bundle.json", b'{"format":1,"format":1}'), "twice"),
    "index of a later format": (with_index(format=2), "format 2; this version reads format 1"),
    "index names a path": (with_index(artifacts={"ab" * 32: "../../../etc/passwd"}), "not a fingerprint"),
    "index names a short hash": (with_index(artifacts={"ab" * 32: "cd"}), "not a fingerprint"),
    "index names a number": (with_index(artifacts={"ab" * 32: 7}), "not a fingerprint"),
    "index names what is not there": (with_index(artifacts={"ab" * 32: "cd" * 32}), "is missing"),
    "manifest of another artifact": (with_manifest(fingerprint="ef" * 32), "not the manifest of"),
    "manifest of a later format": (with_manifest(format=2), "format 2"),
    "manifest of another type": (with_manifest(type="state"), "state manifest"),
    "manifest with an unknown key": (with_manifest(run_on_load="os.system"), "run_on_load"),
    "manifest with another digest": (with_manifest(digest="cd" * 32), "digest is not that of the files"),
    "manifest with a parent path": (with_manifest(parents={"a": {"fingerprint": "../x", "digest": "y"}}), "parents"),
    "manifest that is a file of it": (with_manifest(files=7), "files"),
    "artifacts made from each other": (dotted_cycle, "made from each other"),
    "file that climbs": (with_file("../../../etc/cron.d/x.json", b"{}"), "not a relative file name"),
    "absolute file": (with_file("/etc/x.json", b"{}"), "not a relative file name"),
    "file with a back slash": (with_file("a\\..\\b.json", b"{}"), "not portable"),
    "file with a drive": (with_file("C:x.json", b"{}"), "not portable"),
    "file with a NUL": (with_file("a\0.json", b"{}"), "not portable"),
    "pickle as .pt": (with_file("model/weights.pt", PICKLE), "could be code"),
    "pickle as .bin": (with_file("pytorch_model.bin", PICKLE), "could be code"),
    "pickle as .pkl": (with_file("optimizer.pkl", PICKLE), "could be code"),
    "pickle without a suffix": (with_file("model/rng", PICKLE), "could be code"),
    "pickle as safetensors": (with_file("model/model.safetensors", PICKLE), "not a safetensors file"),
    "pickle as JSON": (with_file("model/config.json", PICKLE), r"config\.json"),
    "pickle as text": (with_file("model/notes.txt", PICKLE), "not text"),
    "pickle as an image": (with_file("samples/grid.png", PICKLE), "no PNG image"),
    "archive as safetensors": (with_file("model/model.safetensors", ZIP), "not a safetensors file"),
    "archive as .npz": (with_file("model/data.npz", ZIP), "could be code"),
    "module": (with_file("model/modeling_x.py", b"import os"), "could be code"),
    "shared library": (with_file("model/kernel.so", b"\x7fELF"), "could be code"),
    "config with code": (with_file("model/config.json", b'{"auto_map":{"AutoModel":"x.Y"}}'), "auto_map"),
    "config with nested code": (with_file("a/config.json", b'{"a":[{"trust_remote_code":true}]}'), "trust_remote"),
    "config with a hub kernel": (
        with_file("a/config.json", b'{"_attn_implementation":"evil/kernel"}'), "code from a hub",
    ),
    "config that is deep": (with_file("model/config.json", DEEP), r"config\.json|recursion"),
    "config with NaN": (with_file("model/config.json", b'{"a":NaN}'), "NaN is not JSON"),
    "header beyond the file": (with_file("m.safetensors", struct.pack("<Q", 2**60) + b"{}"), "header of"),
    "overlapping tensors": (
        with_file("m.safetensors", tensors({"a": ("U8", [4], [0, 4]), "b": ("U8", [4], [2, 6])}, 6)), "overlaps",
    ),
    "tensors beyond the file": (with_file("m.safetensors", tensors({"a": ("U8", [4], [0, 4])}, 2)), "accounts for"),
    "bytes that no tensor has": (with_file("m.safetensors", tensors({"a": ("U8", [4], [0, 4])}, 9)), "accounts for"),
    "huge shape": (with_file("m.safetensors", tensors({"a": ("F32", [2**60], [0, 4])}, 4)), "does not hold together"),
    "unknown dtype": (with_file("m.safetensors", tensors({"a": ("PY", [4], [0, 4])}, 4)), "does not hold together"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_bundle_is_refused_by_name(other: Store, bundle: Path, refused: Any, case: str) -> None:
    change, message = HOSTILE[case]
    change(bundle)
    with refused((RequestError, StoreDamaged), message, bundle):
        read_bundle(other, bundle)
    assert other.list_artifacts() == []


def test_there_are_enough_tricks() -> None:
    assert len(HOSTILE) >= 60
