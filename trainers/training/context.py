"""What every training stage is given, what it hands back, and how that is verified before it is committed."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from recipes.artifact_kinds import ArtifactKind
from recipes.data.text import Source
from recipes.errors import RequestError, StageError, raise_findings
from recipes.models.model_kinds import ModelKind
from recipes.stages.answers import Role, SourceUse, Template, TokenizerId, default_template, template_rule
from recipes.stages.base import StageBase, TextStage
from recipes.stages.lora import Lora
from trainers.checkpoint.checkpoint import StoreCheckpoint, versions
from trainers.checkpoint.find_state import find_state
from trainers.data.dataset import WARN_LOST, DataLayout, Dataset
from trainers.data.encoding import TextSettings
from trainers.data.layouts.registry import text_layout
from trainers.data.materialise import DataRequest, materialise
from trainers.data.row_forms import row_role
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.models.folders import verify_folder
from trainers.models.lora import is_form_of
from trainers.models.verification import MergeLoss, Probe
from trainers.runtime import distributed
from trainers.runtime.distributed import Ranks
from trainers.runtime.low_bits import Method
from trainers.runtime.observer import Observer
from trainers.store.adapters import Weights, find_stack, weights_of, whole_part, whole_weights
from trainers.store.manifest import ArtifactManifest, FileEntry, Layout, StateManifest
from trainers.store.materialised_folders import folder as folder_of
from trainers.store.runs import SegmentWriter
from trainers.store.store import Store


@dataclass(frozen=True)
class StageContext:
    """Where a stage runs and what it was given; equal on all ranks but for `ranks` and `observer`."""

    store: Store
    run: str
    stage: str
    fingerprint: str
    lease: int
    seed: int
    base_dir: Path
    """Relative paths of the recipe start here."""
    inputs: Mapping[str, ArtifactManifest]
    """By field path: init_from, tokenizer.from, actor, rewards.judge.model, ..."""
    data: Mapping[str, str]
    """Digests of the sources when the run started, by field path: data, evaluation, prompts, ..."""
    observer: Observer
    ranks: Ranks
    accepts: tuple[str, ...] = ()
    """Earlier fingerprints of the stage from whose states it may resume."""
    replaced: tuple[str, ...] = ()
    """Earlier fingerprints of the stage whose states are unusable: an input has changed."""
    changes: tuple[Mapping[str, Any], ...] = ()
    """Settings that a resume was allowed to change: field, before, after."""

    def checkpoint(self, layout: Layout) -> StoreCheckpoint:
        """Return where the stage's training state is saved and found."""
        return StoreCheckpoint(
            *(self.store, self.run, self.stage, self.fingerprint, self.lease, layout, versions()),
            accepts=self.accepts,
            replaced=self.replaced,
            changes=self.changes,
            search=lambda: self.saved_state,
        )

    def samples(self) -> SegmentWriter:
        """Return where this attempt keeps samples for the run's report; rank 0 alone."""
        return self.store.run(self.run).writer(f"samples/{self.stage}/{self.lease}")

    @cached_property
    def saved_state(self) -> StateManifest | None:
        """The training state that the stage resumes from, searched for once; collective at the first use."""
        return find_state(self.store, self.run, self.stage, self.fingerprint, self.accepts, self.replaced)


CheckKind = ModelKind | Literal["image"]
"""`image`: a model of images of any family."""


@dataclass(frozen=True)
class Check:
    """One way in which files of a candidate are opened by stock classes and compared with the live model."""

    kind: CheckKind
    model: str
    """Folder of the candidate's files, or of `base` where that is given."""
    probe: FileEntry
    adapter: str | None = None
    """Folder of an adapter to put on the model."""
    base: str | None = None
    """Input (field path) whose files hold `model`."""
    merged: str | None = None
    """Folder of the candidate that must hold the same model with all adapters merged."""
    stack: tuple[str, ...] = ()
    """Of an adapter on others that were not merged: what it lies on, by digest, as in the manifest."""
    quantized: Method | None = None
    """Into which bits the base of an adapter is rounded before it is put on."""

    def to_json(self) -> dict[str, Any]:
        """Return the check as plain JSON."""
        return {**vars(self), "probe": self.probe.model_dump(mode="json"), "stack": list(self.stack)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Check":
        """Read what `to_json` gave."""
        probe = FileEntry.model_validate(value["probe"])
        return Check(**{**value, "probe": probe, "stack": tuple(value.get("stack", ()))})


@dataclass(frozen=True)
class Candidate:
    """An artifact before its verification: the fields of a manifest, files uploaded already; rank 0 has it."""

    kind: ArtifactKind
    files: Mapping[str, FileEntry]
    checks: tuple[Check, ...]
    outcome: Mapping[str, Any]
    """state, rule, steps_done, steps_planned."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    gate_reasons: tuple[str, ...] = ()
    """Why later stages should not build on it; empty passes the gate."""
    contract: str | None = None
    base: str | None = None
    stack: tuple[str, ...] = ()
    quantized: Method | None = None
    architecture: Mapping[str, Any] | None = None
    exactness: str | None = None
    changes: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the candidate as plain JSON."""
        return {
            **vars(self),
            "files": {name: entry.model_dump(mode="json") for name, entry in self.files.items()},
            "checks": [check.to_json() for check in self.checks],
            "gate_reasons": list(self.gate_reasons),
            "stack": list(self.stack),
            "changes": [dict(change) for change in self.changes],
        }


@dataclass(frozen=True)
class Verified:
    """What the checks of a candidate found."""

    difference: float
    """Largest output difference over the outputs' size, both sides in fp32."""
    merge: MergeLoss | None
    """What merging the adapter has lost; None: nothing was merged."""


def verify_checks(
    store: Store,
    files: Mapping[str, FileEntry],
    checks: list[Check],
    inputs: Mapping[str, ArtifactManifest],
    uri: str,
) -> Verified:
    """Run a candidate's checks in this process, which never saw the live model.

    Raises StageError when files do not open strictly, VerificationError when they are not the live model.
    """
    largest, loss = 0.0, None
    for check in checks:
        model, start = _open_base(store, files, check, inputs, uri)
        adapter = None if check.adapter is None else folder_of(store.objects, uri, files, check.adapter)
        merged = None if check.merged is None else folder_of(store.objects, uri, files, check.merged)
        expected = Probe.from_bytes(store.objects.get_bytes(check.probe.sha256))
        if check.kind == "image":
            from trainers.models.images.build import verify_family

            difference, found = verify_family(model, expected, adapter=adapter, merged=merged)
        else:
            difference, found = verify_folder(model, check.kind, expected, adapter, start=start, merged=merged)
        largest, loss = max(largest, difference), found or loss
    return Verified(largest, loss)


def _open_base(
    store: Store,
    files: Mapping[str, FileEntry],
    check: Check,
    inputs: Mapping[str, ArtifactManifest],
    uri: str,
) -> tuple[Path, Weights | None]:
    """Return the folder of the model that a check opens, and what else lies on it below the candidate's adapter."""
    if check.base is None or not check.stack:
        owned = files if check.base is None else inputs[check.base].files
        folder = folder_of(store.objects, uri, owned, check.model)
        return folder, None if check.quantized is None else Weights(folder, (), quantized=check.quantized)
    found = find_stack(store, inputs[check.base], check.stack)
    if found is None:
        raise StageError(f"{check.base}: the model that the adapter was trained on is not in store {uri} any more")
    return found.folder, replace(found, quantized=check.quantized)


@contextmanager
def candidate_folder() -> Iterator[Path]:
    """Give a local folder to write a candidate's files into; it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="trainwright-candidate-") as name:
        yield Path(name)


def put_probe(store: Store, probe: Probe) -> FileEntry:
    """Store a probe beside a candidate's files; no manifest names it."""
    return store.objects.put_chunks([probe.to_bytes()])


def model_folder(context: StageContext, field_path: str) -> Path:
    """Return the local folder of an input's whole model."""
    manifest = context.inputs[field_path]
    return context.store.folder(manifest, whole_part(manifest))


def model_weights(
    context: StageContext, field_path: str, lora: Lora | None = None, *, continues: bool = False
) -> Weights:
    """Return what an input's model is opened from, and say where rounding has taken a part of it.

    `lora` is what the stage trains on it: DoRA scales whole weights, so that it starts from a merged model, and so does
    an adapter on parameters, of which peft puts all on the same ones. With `continues`, a DoRA adapter of the same form
    on a whole model is what learns instead. Adapters stay on the rounded base that they have learned on.
    """
    manifest = context.inputs[field_path]
    if continues and lora is not None and (found := _continued(context.store, manifest, lora)) is not None:
        return found
    weights = weights_of(context.store, manifest)
    if lora is not None and (lora.dora or lora.target_parameters) and weights.adapters:
        what = "DoRA takes" if lora.dora else "lora.target_parameters take"
        weights = whole_weights(context.store, manifest, f"{what} a base without adapters")
    if lora is not None and lora.quantize is not None and lora.quantize != weights.quantized:
        if weights.adapters:
            reason = f"its adapter has learned on a base that was not rounded to {lora.quantize}"
            weights = whole_weights(context.store, manifest, reason)
        weights = replace(weights, quantized=lora.quantize)
    if weights.note is not None:
        context.observer.notify(f"warning: {field_path}: {weights.note}")
    return weights


def _continued(store: Store, manifest: ArtifactManifest, lora: Lora) -> Weights | None:
    """Return the whole model below an artifact's DoRA adapter, and the adapter; None where that cannot go on learning.

    What is on it would be scaled with it.
    """
    if not lora.dora or len(manifest.lies_on) != 1 or manifest.quantized != lora.quantize:
        return None
    found = find_stack(store, manifest, (*manifest.lies_on, manifest.digest))
    if found is None or not is_form_of(found.adapters[0], lora):
        return None
    return replace(found, stack=found.stack[:1], adapters=(), continued=found.adapters[0])


def check_tokenizers(spec: TextStage, context: StageContext) -> None:
    """Raise RequestError where models that read each other's tokens have different tokenizers."""

    def known(field_path: str, text: str) -> TokenizerId:
        tokens = load_tokenization(model_folder(context, field_path)).tokens_hash
        return TokenizerId(tokens, f"{text} (tokens {tokens[:12]})")

    raise_findings(spec.tokenizer_rules(known))


def text_settings(
    role: Role,
    tokenization: Tokenization,
    sequence_length: int,
    template: Template | None = None,
) -> TextSettings:
    """Return how rows of a role become tokens.

    `template` is what the recipe says; None: what `default_template` says. Raises RequestError for a chat template that
    the tokenizer lacks.
    """
    if (finding := template_rule(template, tokenization.chat_template is not None)) is not None:
        raise RequestError(f"template: {finding}")
    chosen = template or default_template(role, tokenization.chat_template is not None)
    return TextSettings(tokenization, sequence_length, template=chosen)


def data_request(context: StageContext, use: SourceUse, layout: DataLayout) -> DataRequest:
    """Return the request for one of the stage's sources as it was when the run started."""
    return DataRequest(
        source=use.source,
        base_dir=context.base_dir,
        layout=layout,
        seed=context.seed,
        held_out=use.held_out,
        source_digest=context.data.get(use.field_path),
        field_path=use.field_path,
    )


def text_request(
    context: StageContext,
    use: SourceUse,
    tokenization: Tokenization,
    sequence_length: int,
    template: Template | None = None,
) -> DataRequest:
    """Return the request for rows of text in the layout of their role; see `text_settings`."""
    settings = text_settings(use.role, tokenization, sequence_length, template)
    return data_request(context, use, text_layout(row_role(use), settings, use.carried, use.form))


def open_dataset(context: StageContext, request: DataRequest) -> Dataset:
    """Materialise on rank 0 first; the others open what it committed; collective.

    Says which rows were lost; raises RequestError where they are more than the source's `max_dropped`.
    """
    observer, text = context.observer, request.layout.text
    observer.phase("data")
    dataset = distributed.first_rank_first(
        lambda: materialise(request, context.store, lambda rows: observer.phase("data", rows=rows))
    )
    if text is None:
        return dataset
    limit = cast(Source, request.source).max_dropped
    for said in dataset.report.lost(text.sequence_length):
        if dataset.report.dropped_share > limit:
            raise RequestError(
                f"{request.field_path}: {said}; that is more than max_dropped ({limit:g}): take a greater length or "
                f"other rows, or set stages.{context.stage}.{request.field_path}.max_dropped: 1"
            )
        is_much = dataset.report.lost_share > WARN_LOST
        observer.notify(f"{'warning: ' if is_much else ''}{request.field_path}: {said}")
    return dataset


def open_sets(
    spec: StageBase, context: StageContext, request: Callable[[SourceUse], DataRequest]
) -> tuple[Dataset, Dataset | None]:
    """Open a stage's training rows, and its held-out ones where it has any, as requested of each source; collective."""
    dataset = open_dataset(context, request(spec.get_source("data")))
    held_out = spec.find_source("evaluation")
    return dataset, None if held_out is None else open_dataset(context, request(held_out))
