"""Foreign folders: what is whole and harmless becomes an artifact, everything else is refused by file name."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from recipes.errors import RequestError
from trainers.data.tokenizer import load_tokenization
from trainers.models.imports import import_folder, import_tokenizer
from trainers.store.foreign_checkpoints import left_behind
from trainers.store.import_records import origins
from trainers.store.inspection import verify
from trainers.store.store import Store
from trainers.store.untrusted_files import read_safetensors_header


def safetensors_bytes(tensors: dict[str, int], **header: Any) -> bytes:
    """Serialise float tensors of these sizes; further keys replace header entries."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in tensors.items():
        entries[name] = {"dtype": "F32", "shape": [size], "data_offsets": [end, end + 4 * size]}
        end += 4 * size
    text = json.dumps({**entries, **header}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model folder."""
    place = tmp_path / "model"
    place.mkdir()
    write_json(place / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4})
    write_json(place / "generation_config.json", {"eos_token_id": 1})
    write_json(place / "tokenizer_config.json", {"eos_token": "<eos>", "pad_token": "<pad>"})
    Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>")).save(str(place / "tokenizer.json"))
    (place / "model.safetensors").write_bytes(safetensors_bytes({"w": 3, "b": 2}))
    (place / "README.md").write_text("not part of the model")
    return place


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


def test_a_whole_folder_becomes_an_artifact(store: Store, folder: Path, tmp_path: Path) -> None:
    manifest = import_folder(store, folder, source="hf://org/name@abc", name="base")
    assert sorted(manifest.files) == [
        "model/config.json",
        "model/generation_config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
    ]
    assert (manifest.kind, manifest.stage, manifest.source) == ("model", "import", "hf://org/name@abc")
    assert manifest.contract is not None
    assert manifest.architecture == json.loads((folder / "config.json").read_text())
    assert store.resolve("base") == manifest
    with pytest.raises(RequestError, match=r"no artifact 'other'; .* `store import FOLDER --name other` takes in"):
        store.resolve("other")
    assert str(tmp_path) not in manifest.model_dump_json()
    assert import_folder(store, folder) == manifest
    write_json(folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    assert import_folder(store, folder).fingerprint != manifest.fingerprint


def test_every_origin_of_the_same_files_is_recorded(store: Store, folder: Path, tmp_path: Path) -> None:
    """The first import's manifest stays; what the second one knew is not lost, and no path is written."""
    first = import_folder(store, folder)
    for _ in range(2):
        assert import_folder(store, folder, source="hf://org/name@abc") == first
    assert first.source is None
    found = origins(store.files, first.fingerprint)
    assert [(origin.source, origin.bundle) for origin in found] == [("model", None), ("hf://org/name@abc", None)]
    assert all(origin.version for origin in found)
    tokenizer = import_tokenizer(store, folder, source="from a friend")
    assert [origin.source for origin in origins(store.files, tokenizer.fingerprint)] == ["from a friend"]
    records = sorted((tmp_path / "store" / "refs" / "imports").rglob("00000*"))
    assert len(records) == 3
    assert not any(str(tmp_path) in path.read_text() for path in records)
    assert verify(store).damage == []
    records[0].chmod(0o644)
    records[0].write_text("cut off")
    assert [item.path for item in verify(store).damage] == [records[0].relative_to(tmp_path / "store").as_posix()]


def test_shards_come_with_their_index(store: Store, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for number, name in enumerate(("w", "b"), start=1):
        (folder / f"model-0000{number}-of-00002.safetensors").write_bytes(safetensors_bytes({name: 2}))
    weight_map = {"w": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    assert len(import_folder(store, folder).files) == 7
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RequestError, match=r"names model-00002-of-00002\.safetensors, which is missing"):
        import_folder(store, folder)
    for wrong in ("../w.safetensors", "/w.safetensors", "w.bin"):
        write_json(folder / "model.safetensors.index.json", {"weight_map": {"w": wrong}})
        with pytest.raises(RequestError, match=f"names '{wrong}'"):
            import_folder(store, folder)
    write_json(
        folder / "model.safetensors.index.json",
        {"weight_map": {"w": "model-00001-of-00002.safetensors", "x": "model-00001-of-00002.safetensors"}},
    )
    with pytest.raises(RequestError, match="disagree about x"):
        import_folder(store, folder)


def test_a_reward_model_is_known_by_its_class(store: Store, folder: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    write_json(folder / "config.json", config)
    assert import_folder(store, folder).kind == "reward_model"
    write_json(folder / "config.json", {**config, "id2label": {"0": "a", "1": "b"}})
    with pytest.raises(RequestError, match=r"config.json: .* has 2"):
        import_folder(store, folder)


@pytest.mark.parametrize(
    ("model_type", "architecture", "kind"),
    [
        ("bert", "BertModel", "model"),
        ("bert", "BertForPreTraining", "model"),
        ("bert", "BertForMaskedLM", "model"),
        ("bert", "BertForSequenceClassification", "text_classifier"),
        ("t5", "T5ForConditionalGeneration", "model"),
        ("bart", "BartForConditionalGeneration", "model"),
        ("llama", "LlamaForTokenClassification", "actor_critic"),
        ("mistral", "MistralForCausalLM", "model"),
    ],
)
def test_a_folder_is_known_by_its_class(
    store: Store, folder: Path, model_type: str, architecture: str, kind: str
) -> None:
    write_json(folder / "config.json", {"model_type": model_type, "architectures": [architecture]})
    manifest = import_folder(store, folder)
    part = "critic" if kind == "actor_critic" else "model"
    assert manifest.kind == kind
    assert all(name.startswith(f"{part}/") for name in manifest.files)


def test_a_sep_token_ends_a_text_where_there_is_no_eos_token(store: Store, folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", {"sep_token": "<eos>", "pad_token": "<pad>"})
    manifest = import_folder(store, folder)
    assert load_tokenization(store.folder(manifest, "model")).eos_id == 1


def edit(name: str, change: dict[str, Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        write_json(path, {**json.loads(path.read_text()), **change})

    return apply


class Payload:
    """Leaves a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def with_code(name: str, change: dict[str, Any]) -> Callable[[Path], None]:
    """Settings that name a module, which is there."""

    def apply(folder: Path) -> None:
        edit(name, change)(folder)
        (folder / "code.py").write_text("open('canary', 'w').close()\n")

    return apply


def made(what: Callable[[Path], None], name: str = "model.safetensors") -> Callable[[Path], None]:
    """Something else in the place of a file."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        what(folder / name)

    return apply


def index_is_a_pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors.index.json")


def link_out(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        outside = folder.parent / "outside"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return apply


def folder_link(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is text": (lambda f: (f / "config.json").write_text("hello") and None, r"config\.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]") and None, "not a JSON object"),
    "config has NaN": (lambda f: (f / "config.json").write_text('{"a": NaN}') and None, "NaN is not JSON"),
    "config is deep": (lambda f: (f / "config.json").write_text("[" * 100_000) and None, r"config\.json"),
    "no model type": (lambda f: (f / "config.json").write_text("{}") and None, "no model_type"),
    "unknown class": (
        edit("config.json", {"architectures": ["T5Model"]}), "T5Model is not supported with model_type 'llama'"
    ),
    "code in config": (with_code("config.json", {"auto_map": {"AutoModel": "code.M"}}), r"config\.json has auto_map"),
    "code deep in config": (
        with_code("config.json", {"text_config": [{"auto_map": {"AutoModel": "code.Model"}}]}),
        r"config\.json has auto_map",
    ),
    "code in tokenizer": (
        with_code("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.Words"]}}),
        r"tokenizer_config\.json has auto_map",
    ),
    "kernel of a hub": (edit("config.json", {"_attn_implementation": "evil/kernel"}), "code from a hub"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}") and None, r"tokenizer\.json"),
    "no end token": (lambda f: (f / "tokenizer_config.json").unlink(), "eos_token"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no model\.safetensors"),
    "pickled weights": (only_pickle, r"only as pytorch_model\.bin, a format that can run code"),
    "weights link out": (link_out("model.safetensors"), r"model\.safetensors is a link that leads out"),
    "config links out": (link_out("config.json"), r"config\.json is a link that leads out"),
    "tokenizer links out": (link_out("tokenizer.json"), r"tokenizer\.json is a link that leads out"),
    "weights are a device": (folder_link, r"model\.safetensors is a link that leads out"),
    "pickle named safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(Payload())) and None,
        r"model\.safetensors is not a safetensors file",
    ),
    "tokenizer is a pickle": (
        lambda f: (f / "tokenizer.json").write_bytes(pickle.dumps(Payload())) and None, r"tokenizer\.json",
    ),
    "code in generation": (
        with_code("generation_config.json", {"custom_pipelines": {"x": {"impl": "code.Pipe"}}}),
        r"generation_config\.json has custom_pipelines",
    ),
    "config opens a file": (edit("config.json", {"transformers_weights": "/etc/passwd"}), "has transformers_weights"),
    "weights are a pipe": (made(os.mkfifo), r"model\.safetensors is not a file"),
    "weights are a folder": (made(os.mkdir), r"model\.safetensors is not a file"),
    "weights link to themselves": (made(lambda p: p.symlink_to(p)), r"model\.safetensors"),
    "config is a pipe": (made(os.mkfifo, "config.json"), r"config\.json is not a file"),
    "tokenizer is a pipe": (made(os.mkfifo, "tokenizer.json"), r"tokenizer\.json"),
    "template is a pipe": (lambda f: os.mkfifo(f / "chat_template.jinja"), r"chat_template\.jinja is not a file"),
    "index is a pipe": (index_is_a_pipe, r"index\.json is not a file"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_wrong_is_named(store: Store, folder: Path, refused: Any, case: str) -> None:
    damage, message = HOSTILE[case]
    damage(folder)
    with refused(RequestError, message, folder):
        import_folder(store, folder)
    assert store.list_artifacts() == []


def test_the_watch_sees_what_runs(folder: Path, refused: Any) -> None:
    """Negative control: a refusal that opens the file the usual way is caught, by the canary and by what it calls."""
    only_pickle(folder)

    def open_it() -> None:
        pickle.loads((folder / "pytorch_model.bin").read_bytes())
        raise RequestError(str(folder))

    with pytest.raises(AssertionError, match=r"pickle\.find_class"), refused(RequestError, None, folder):
        open_it()
    assert Path("canary").exists()


def test_a_hub_caches_own_links_are_followed(store: Store, folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert import_folder(store, snapshot).kind == "model"
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(RequestError, match="leads out"):
        import_folder(store, snapshot)


def entry(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\xff" * 8, "not a safetensors file"),
        ((2**62).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        ((3).to_bytes(8, "little") + b"[1]", "header is no object"),
        ((9).to_bytes(8, "little") + b'{"a":1,]}', "not a safetensors file"),
        ((13).to_bytes(8, "little") + b'{"a":1,"a":2}', "given twice"),
        (safetensors_bytes({"w": 2}) + b"rest", "accounts for"),
        (safetensors_bytes({"w": 2})[:-1], "accounts for"),
        (safetensors_bytes({"w": 2}, w=entry(0, 8, [3])), "does not hold together"),
        (safetensors_bytes({"w": 2}, w=entry(0, 8, [-2])), "does not hold together"),
        (safetensors_bytes({"w": 2}, w=entry(0, 8, [2.0])), "does not hold together"),
        (safetensors_bytes({"w": 2}, w=entry(0, 8, [2], "PICKLE")), "does not hold together"),
        (safetensors_bytes({"w": 2}, w=entry(4, 12, [2])), "overlaps or leaves a gap"),
        (safetensors_bytes({"w": 2, "v": 2}, v=entry(4, 12, [2])), "overlaps or leaves a gap"),
        (safetensors_bytes({"w": 2}, w=entry(-8, 0, [2])), "overlaps or leaves a gap"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, refused: Any, data: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with refused(RequestError, message, path):
        read_safetensors_header(path)


def test_a_truthful_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"w": 3, "empty": 0, "v": 1}))
    assert list(read_safetensors_header(path)) == ["w", "empty", "v"]
    assert os.path.getsize(path) > 0


def test_a_tokenizer_needs_no_model_beside_it(store: Store, folder: Path) -> None:
    beside_a_model = import_tokenizer(store, folder)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).unlink()
    alone = import_tokenizer(store, folder)
    assert (alone.kind, sorted(alone.files)) == ("tokenizer", ["tokenizer.json", "tokenizer_config.json"])
    assert alone == beside_a_model
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RequestError, match=r"has no tokenizer\.json"):
        import_tokenizer(store, folder)


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(store: Store, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "vocab_size": 2})
    with pytest.raises(RequestError, match=r"tokenizer has 3 entries .* embedding 2 rows"):
        import_folder(store, folder)
    write_json(folder / "config.json", {**config, "vocab_size": 4})
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 3]})
    with pytest.raises(RequestError, match=r"generation_config.json: eos_token_id is 3, "):
        import_folder(store, folder)
    write_json(folder / "generation_config.json", {"eos_token_id": [1]})
    assert import_folder(store, folder).kind == "model"


@pytest.mark.parametrize(("part", "named"), [("global_step8", "zero_to_fp32"), ("pytorch_model_fsdp_0", "accelerate")])
def test_a_checkpoint_in_parts_is_refused_with_its_command(folder: Path, store: Store, part: str, named: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / part).mkdir()
    with pytest.raises(RequestError, match=named):
        import_folder(store, folder)


def test_what_an_import_leaves_of_a_trainers_checkpoint(folder: Path) -> None:
    assert left_behind(folder) == []
    write_json(folder / "trainer_state.json", {"global_step": 500, "max_steps": 1000})
    (folder / "optimizer.pt").write_bytes(b"")
    (line,) = left_behind(folder)
    assert "500" in line
    assert "optimizer.pt" in line
    assert "scheduler.pt" not in line
    write_json(folder / "trainer_state.json", [])
    with pytest.raises(RequestError, match=r"trainer_state\.json"):
        left_behind(folder)
