"""Inputs from outside a recipe: what a store address, a folder or a hub id means, without copying anything yet.

A folder's artifact is known from its files alone, so that `plan` and `check` write nothing; they are copied into the
store when a run starts (`take_in`).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.artifact_kinds import OutputKind, takes_tokenizer
from recipes.errors import Finding, RequestError
from recipes.models.families import HOLDERS
from recipes.models.folder_classes import find_class
from recipes.models.known_models import known_model
from recipes.planning.fingerprint import ParentId
from recipes.planning.prediction import External
from recipes.problem_codes import Code
from recipes.recipe import Recipe
from recipes.references import FolderRef, HubRef, StageRef, StoreRef, parse_reference
from trainers.models.counting import counted_model
from trainers.models.imports import describe_folder, describe_tokenizer, import_folder, import_tokenizer
from trainers.store.export import parts_of
from trainers.store.manifest import ArtifactManifest, Verification, canonical_json, files_digest, sha256_hex
from trainers.store.store import Store
from trainers.store.untrusted_files import file_inside, weight_files

NOT_FETCHED = "not downloaded yet"
"""How the files of a hub model that a run would download are verified."""
ONLY_CONFIG = "config.json alone"
"""How a folder without weights is verified, for a plan."""
NOT_KNOWN = "not known"
"""How a hub model that cannot be reached is verified, for a plan."""
_TEXTS = ["*.json", "*.jinja", "*.model", "*.txt"]
_TOKENIZER_TEXTS = ["*.json", "*.jinja"]


def find_input(
    text: str,
    wants: tuple[OutputKind, ...],
    base_dir: Path,
    store: Store,
    *,
    fetches: bool,
    only_plans: bool = False,
) -> ArtifactManifest | None:
    """The artifact that a reference means; None for a stage of the recipe. Nothing is written to the store.

    With `fetches` a hub model is downloaded whole; without it, its configuration has to suffice. `only_plans`: so does
    that of a folder, and of a hub model that cannot be reached nothing is known.
    """
    reference = parse_reference(text)
    match reference:
        case StageRef():
            return None
        case StoreRef():
            artifact = store.resolve(reference.name_or_fingerprint)
        case FolderRef():
            folder = (base_dir / reference.path).resolve()
            is_whole = not only_plans or not (folder / "config.json").is_file() or _has_weights(folder)
            artifact = _describe(folder, wants, None) if is_whole else _known_by_config(folder, text, ONLY_CONFIG)
        case HubRef():
            try:
                artifact = _find_hub_model(reference, text, wants, fetches=fetches)
            except RequestError as error:
                if not only_plans:
                    raise
                artifact = _not_known(text, wants, str(error))
    return artifact


def wrong_kind(text: str, wants: tuple[OutputKind, ...], artifact: ArtifactManifest) -> Finding | None:
    """Why an artifact does not serve where one of the wanted kinds is needed; None: it does."""
    if not any(artifact.kind in HOLDERS[want] for want in wants):
        message = f"{text} is of kind {artifact.kind}; a {' or '.join(wants)} is needed here"
        return Finding(Code.WRONG_ARTIFACT_KIND, message)
    if artifact.kind == "adapter" and "model" in wants and not {"model", "actor"} & set(parts_of(artifact)):
        advice = (
            f"merge it: trainwright store export {artifact.fingerprint[:16]} DIR --merge, then trainwright store "
            "import DIR"
        )
        message = f"{text} holds an adapter alone, and a whole model is needed here"
        return Finding(Code.WRONG_ARTIFACT_KIND, message, advice)
    return None


def take_in(
    recipe: Recipe, base_dir: Path, external: Mapping[str, Mapping[str, ArtifactManifest]], store: Store
) -> None:
    """Copy folders and hub models into the store that it does not hold yet.

    Raises RequestError for one that is not what it was when the recipe was resolved.
    """
    for field_path, text, wants, known in _outside(recipe, external):
        reference = parse_reference(text)
        if not isinstance(reference, FolderRef | HubRef) or store.find_artifact(known.fingerprint) is not None:
            continue
        if isinstance(reference, FolderRef):
            folder, source = (base_dir / reference.path).resolve(), None
        else:
            folder, source = _download(reference, wants, fetches=True), text
        take = import_tokenizer if takes_tokenizer(wants) else import_folder
        found = take(store, folder, source=source)
        if found.fingerprint != known.fingerprint:
            raise RequestError(f"{field_path}: {text} has changed while the run was starting; start it again")


def _outside(
    recipe: Recipe, external: Mapping[str, Mapping[str, ArtifactManifest]]
) -> Iterator[tuple[str, str, tuple[OutputKind, ...], ArtifactManifest]]:
    """Every input from outside: its field, its text, what is wanted there, and what it was found to be."""
    for name, inputs in external.items():
        for item in recipe.stages[name].inputs():
            if item.field_path in inputs:
                yield f"stages.{name}.{item.field_path}", item.text, item.wants, inputs[item.field_path]


def external_of(artifact: ArtifactManifest, part: str | None, text: str) -> External:
    """What the plan needs of an input: its id, its size, and what is to be said of it."""
    config = artifact.architecture or {}
    notes = []
    if artifact.verification is not None and artifact.verification.how == NOT_FETCHED:
        notes.append(f"{text} is downloaded when the run starts")
    if artifact.verification is not None and artifact.verification.how == ONLY_CONFIG:
        notes.append(f"{text} holds no weights: planned by its config.json, a run needs them")
    if artifact.verification is not None and artifact.verification.how.startswith(NOT_KNOWN):
        notes.append(artifact.verification.how.removeprefix(f"{NOT_KNOWN}: "))
    if artifact.kind == "model":
        try:
            found = find_class(config)
        except ValueError:
            found = None
        if found is not None and found.is_headless:
            notes.append(f"{text} ({found.name}) has no head: a new one is drawn from the seed")
    vocab_size = config.get("vocab_size")
    return External(
        ParentId(artifact.fingerprint, artifact.digest, part),
        model=known_model(config) or counted_model(config),
        vocab_size=vocab_size if type(vocab_size) is int else None,
        notes=tuple(notes),
    )


def _describe(folder: Path, wants: tuple[OutputKind, ...], source: str | None) -> ArtifactManifest:
    describe = describe_tokenizer if takes_tokenizer(wants) else describe_folder
    return describe(folder, source=source)


def _find_hub_model(reference: HubRef, text: str, wants: tuple[OutputKind, ...], *, fetches: bool) -> ArtifactManifest:
    folder = _download(reference, wants, fetches=fetches)
    if fetches or takes_tokenizer(wants) or _has_weights(folder):
        return _describe(folder, wants, text)
    return _known_by_config(folder, text, NOT_FETCHED, {"hub": [reference.repo, reference.revision]})


def _not_known(text: str, wants: tuple[OutputKind, ...], reason: str) -> ArtifactManifest:
    """Stands for a hub model of which nothing is known, in a plan."""
    verification = Verification(how=f"{NOT_KNOWN}: {reason}")
    kind: Any = wants[0]
    return ArtifactManifest(
        fingerprint=sha256_hex(text.encode()), digest=files_digest({}), kind=kind, stage="import", files={},
        verification=verification, source=text,
    )  # fmt: skip


def _known_by_config(folder: Path, text: str, how: str, name_of: dict[str, Any] | None = None) -> ArtifactManifest:
    """The model of a folder without weights, by its `config.json`; raises RequestError where that names none."""
    config = json.loads(file_inside(folder, "config.json").read_bytes())
    try:
        kind: Any = find_class(config).kind
    except ValueError as error:
        raise RequestError(f"{text}: config.json: {error}") from None
    name = sha256_hex(canonical_json(name_of or {"config": config}))
    verification = Verification(how=how)
    return ArtifactManifest(
        fingerprint=name, digest=files_digest({}), kind=kind, stage="import", files={}, architecture=config,
        verification=verification, source=text,
    )  # fmt: skip


def _download(reference: HubRef, wants: tuple[OutputKind, ...], *, fetches: bool) -> Path:
    """Return the folder of a hub model at one revision, in the hub's cache on this machine.

    What is missing there is downloaded: all of it with `fetches`, else all but the weights.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    is_tokenizer = takes_tokenizer(wants)
    kept = _TOKENIZER_TEXTS if is_tokenizer else [*_TEXTS, "*.safetensors"] if fetches else _TEXTS
    options: dict[str, Any] = {"revision": reference.revision, "allow_patterns": kept}
    try:
        cached = Path(snapshot_download(reference.repo, local_files_only=True, **options))
    except (LocalEntryNotFoundError, OSError):
        cached = None
    known_by = "tokenizer.json" if is_tokenizer else "config.json"
    has_all = is_tokenizer or not fetches or (cached is not None and _has_weights(cached))
    if cached is not None and has_all and (cached / known_by).exists():
        return cached
    try:
        return Path(snapshot_download(reference.repo, **options))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RequestError(
            f"hf://{reference.repo}@{reference.revision} is not in the hub's cache on this machine, and cannot be "
            f"fetched: {first}"
        ) from error


def _has_weights(folder: Path) -> bool:
    try:
        weight_files(folder, file_inside)
    except RequestError:
        return False
    return True
