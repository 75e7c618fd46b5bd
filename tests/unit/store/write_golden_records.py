"""Writes the golden records and bundle of the present format: python tests/unit/store/write_golden_records.py FOLDER.

FOLDER/records-1 is a store with what format-1 lacks, FOLDER/bundle-1 one of its artifacts as a bundle. The committed
ones (golden/records-1, golden/bundle-1) are never written again.
"""

import sys
from pathlib import Path

from trainers.store.bundle import write_bundle
from trainers.store.collection import collect
from trainers.store.import_records import note_origin
from trainers.store.manifest import ArtifactManifest, DatasetManifest, FileEntry, files_digest, sha256_hex
from trainers.store.refs import RefLog
from trainers.store.store import Store

RUN = "chain-20260102-030405-0a1b"
BASE, BROKEN, DATA = (sha256_hex(name) for name in (b"base", b"broken", b"data"))
ORPHAN = b"what nothing names"
CHANGE = {"field": "train.steps", "before": 10, "after": 20, "run": RUN, "step": 5}
NOTE, PROBLEM, SOURCE = "shown in a talk", "its files are not there", "hf://org/name@abc"


def main(folder: str) -> None:
    """Write both."""
    store = Store.open(f"{folder}/records-1")

    def artifact(fingerprint: str, stage: str, text: bytes) -> ArtifactManifest:
        files = {"model/config.json": FileEntry(sha256=store.objects.put_bytes(text), bytes=len(text))}
        return store.put_artifact(
            ArtifactManifest(
                fingerprint=fingerprint, digest=files_digest(files), kind="model", stage=stage, files=files,
                changes=[dict(CHANGE)], source=SOURCE,
            )
        ).manifest  # fmt: skip

    base = artifact(BASE, "base", b'{"model_type":"llama"}')
    artifact(BROKEN, "broken", b"{}")
    store.pin(BASE, NOTE)
    note_origin(store.files, BASE, SOURCE)
    note_origin(store.files, BASE, "the other team", sha256_hex(b"index"))
    RefLog(store.files, f"refs/artifacts/{BROKEN}").set_aside(1, PROBLEM)
    store.note_datasets(RUN, BASE)
    rows = FileEntry(sha256=store.objects.put_bytes(b"tokens"), bytes=6)
    store.put_dataset(DatasetManifest(digest=DATA, files={"tokens.npy": rows}, report={"rows_in": 7}))
    store.find_dataset(DATA)
    store.objects.put_bytes(ORPHAN)
    collect(store, grace_s=0)
    write_bundle(store, [base], Path(folder) / "bundle-1")


if __name__ == "__main__":
    main(sys.argv[1])
