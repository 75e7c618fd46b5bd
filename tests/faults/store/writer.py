"""A process that writes to a store without end and says what was acknowledged; the tests kill it.

Arguments: store, writer's number, seed. One line per acknowledgement on stdout.
"""

import itertools
import random
import sys

from trainers.store.manifest import ArtifactManifest, FileEntry, Layout, Slice, StateManifest, TensorEntry, files_digest
from trainers.store.manifest import sha256_hex as sha
from trainers.store.store import Store


def state_object(store: Store, owner: str, content: bytes) -> FileEntry:
    """Write a safetensors object as training states have them."""
    end = len(content)
    header = f'{{"__metadata__":{{"owner":"{owner}"}},"w":{{"dtype":"U8","shape":[{end}],"data_offsets":[0,{end}]}}}}'
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return store.objects.put_chunks([len(text).to_bytes(8, "little"), text, content])


def main(uri: str, writer: str, seed: str) -> None:
    """Write until killed."""
    store, chooser = Store.open(uri), random.Random(seed)
    run, stage = f"run-{writer}", "base"
    lease = store.take_lease(run, stage)
    print("ready", flush=True)
    for number in itertools.count(1):
        fingerprint = sha(f"{writer}/{seed}/{number}".encode())
        step = lease * 1_000_000 + number
        match chooser.choice(["artifact", "shared", "state", "state", "lines"]):
            case "artifact" | "shared" as what:
                if what == "shared":  # both writers make this one
                    fingerprint = sha(f"shared/{seed}/{number}".encode())
                contents = {f"model/{index}": f"{fingerprint}{index}".encode() * 50 for index in range(3)}
                files = {
                    name: FileEntry(sha256=store.objects.put_bytes(data), bytes=len(data))
                    for name, data in contents.items()
                }
                store.put_artifact(
                    ArtifactManifest(
                        fingerprint=fingerprint, digest=files_digest(files), kind="model", stage="base", files=files
                    )
                )
                print("artifact", fingerprint, flush=True)
            case "state":
                written = state_object(store, f"{run}/{stage}/{lease}/{step}", chooser.randbytes(5000))
                piece = Slice(start=[0], shape=[5000], object=written, key="w")
                manifest = StateManifest(
                    run=run, stage=stage, fingerprint=fingerprint, step=step, lease=lease,
                    tensors={"param": [TensorEntry(name="w", shape=[5000], dtype="U8", slices=[piece])]},
                    layout=Layout(workers=1, micro_batch=1, accumulation=1),
                )  # fmt: skip
                store.commit_state(manifest, lease)
                print("state", step, flush=True)
                store.keep_states(run, stage, keep=2)
            case "lines":
                segments = store.run(run).writer("journal")
                segments.append({"lease": lease, "number": number})
                segments.flush()
                print("line", lease, number, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
