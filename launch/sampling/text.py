"""Lets a model write: text continued, or a conversation through its chat template; in this process, on CPU or GPU."""

import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.records.artifacts import find_artifact
from recipes.errors import RequestError
from recipes.models.architecture import MODEL_TYPES
from recipes.models.images.architecture import DRAWING_KINDS
from recipes.models.model_kinds import MODEL_KINDS, ModelKind
from recipes.models.vision_language import VISION_LANGUAGE
from recipes.tokenizers.sentinels import SENTINEL
from trainers.store.adapters import WHOLE_PARTS, Weights, weights_of
from trainers.store.hf_loaders import open_adapter, open_model
from trainers.store.manifest import ArtifactManifest
from trainers.store.store import Store

if TYPE_CHECKING:
    import numpy as np

IMAGE_TEXT_CLASSES = {name for known in VISION_LANGUAGE.types.values() for name in known.classes}
MODEL_FOLDERS = ("model", "actor", "merged", "")


class Sampler:
    """A loaded language model and its tokenizer."""

    def __init__(self, folder: Path, weights: Weights | None = None) -> None:
        """Open a model folder, an adapter's with its model in `base/`; `weights` are what it is opened from instead."""
        import torch
        import transformers
        from transformers.utils import logging

        from trainers.data.tokenizer import load_tokenization
        from trainers.models.families import runtime_of

        logging.disable_progress_bar()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model_folder = folder / "base" if (folder / "adapter_config.json").is_file() else folder
        self.tokenization = load_tokenization(model_folder)
        config = json.loads(_read(model_folder / "config.json"))
        if config.get("model_type") in MODEL_TYPES:
            runtime_of(MODEL_TYPES[config["model_type"]].name)  # makes the type known to transformers
        self.kind: ModelKind = _kind(config) or "language_model"
        self.facts = MODEL_KINDS[self.kind]
        self.images: Any = None
        if self.facts.reads_images:
            from trainers.data.image_processor import load_image_processor

            self.images = load_image_processor(model_folder)
        if weights is not None and weights.adapters:
            model = self._open_unmerged(weights, config)
        else:
            model = open_model(getattr(transformers, self.facts.auto_class), model_folder, dtype=torch.float32)
        if model_folder is not folder:
            model = open_adapter(model, folder).merge_and_unload()
        self.model = model.to(self.device).eval()
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_tokens = sys.maxsize if longest is None else int(longest)

    def _open_unmerged(self, weights: Weights, config: dict[str, Any]) -> Any:
        """The whole model with its adapters, merged in fp32."""
        from trainers.models.families import runtime_of
        from trainers.models.stack import load_exact

        family = runtime_of(MODEL_TYPES[config["model_type"]].name)
        kind = self.kind if self.facts.has_classes else family.kind
        labels = config.get("id2label", {}) if self.facts.has_classes else {}
        classes = [labels[key] for key in sorted(labels, key=int)]
        return load_exact(weights, kind, device=self.device, classes=classes)

    def write(
        self,
        prompt: str | Sequence[dict[str, str]],
        *,
        max_new_tokens: int = 96,
        temperature: float = 0.7,
        seed: int = 0,
        draw: int = 0,
        images: Sequence[Path] = (),
        num_beams: int | None = None,
    ) -> str:
        """Continue a text, or answer a conversation; equal arguments give equal answers.

        An encoder fills the masks of a text; a classifier says its class and how sure it is. An encoder-decoder writes
        a source's target, by beam search with `num_beams`, or fills the spans that sentinels mark. A vision-language
        model sees the images where the text marks their places, else before the first words.
        """
        import torch

        from trainers.inference.generation import generate, sampling_settings

        if images and self.images is None:
            raise RequestError("the model has no vision tower; --image is for vision-language models")
        if num_beams is not None and not self.facts.reads_targets:
            raise RequestError("--beams is for encoder-decoders; this model is not one")
        if self.facts.reads_targets:
            return self._write_target(prompt, max_new_tokens, temperature, seed, draw, num_beams)
        if not self.facts.continues:
            return self._read(prompt, temperature=temperature, seed=seed, draw=draw)
        shown: dict[str, Any] = {}
        if self.images is None:
            ids = self.tokenization.encode_prompt(prompt)
        else:
            ids, shown = self._see(prompt, images)
        room = self.max_tokens - len(ids)
        if room < 1:
            raise RequestError(f"the prompt has {len(ids)} tokens; the model takes {self.max_tokens} with the answer")
        settings = sampling_settings(self.tokenization, min(max_new_tokens, room), temperature or 1.0)
        uniforms = draws(ids, seed, draw, settings.max_new_tokens) if temperature > 0 else None
        prompt_ids = torch.tensor([ids], device=self.device)
        with torch.inference_mode():
            is_real = torch.ones_like(prompt_ids, dtype=torch.bool)
            made = generate(self.model, prompt_ids, is_real, settings, uniforms, shown)
        tokens = made.tokens_BR[0][made.response_mask_BR[0]].tolist()
        return self.tokenization.decode(tokens)

    def _write_target(
        self,
        prompt: str | Sequence[dict[str, str]],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        draw: int,
        num_beams: int | None,
    ) -> str:
        """Let an encoder-decoder write a source's target, or the spans of its sentinels."""
        import torch

        from trainers.evaluation.translation import write_targets
        from trainers.inference.filling import fill_spans
        from trainers.inference.generation import generate, sampling_settings

        tokenization = self.tokenization
        ids = tokenization.encode_prompt(prompt)
        ids = ids if ids[-1:] == [tokenization.eos_id] else [*ids, tokenization.eos_id]
        if len(ids) > self.max_tokens:
            raise RequestError(f"the source has {len(ids)} tokens; the model takes {self.max_tokens}")
        longest = min(max_new_tokens, self.max_tokens)
        source = torch.tensor([ids], device=self.device)
        mask = torch.ones_like(source, dtype=torch.bool)
        with torch.inference_mode():
            if num_beams is not None:
                search = {"num_beams": num_beams, "max_new_tokens": longest}
                (tokens,) = write_targets(self.model, source, mask, tokenization, **search)
            else:
                settings = sampling_settings(tokenization, longest, temperature or 1.0)
                uniforms = draws(ids, seed, draw, longest) if temperature > 0 else None
                made = generate(self.model, source, mask, settings, uniforms)
                tokens = made.tokens_BR[0][made.response_mask_BR[0]].tolist()
        if isinstance(prompt, str) and SENTINEL.format(0) in prompt:
            return fill_spans(tokenization, prompt, tokens)
        return tokenization.decode(tokens)

    def _see(self, prompt: str | Sequence[dict[str, str]], images: Sequence[Path]) -> tuple[list[int], dict[str, Any]]:
        """The tokens of a prompt with images, as training makes them of a row, and what the model takes of these."""
        import torch

        from trainers.data.image_text import encode_question
        from trainers.data.row_images import open_row_images

        opened = open_row_images([str(path) for path in images], Path(), "--image")
        ids = encode_question(prompt, opened, self.tokenization, self.images)
        inputs = self.images.inputs(opened) if opened else {}
        return ids, {name: torch.from_numpy(value) for name, value in inputs.items()}

    def _read(self, text: str | Sequence[dict[str, str]], *, temperature: float, seed: int, draw: int) -> str:
        """Let an encoder fill a text's masks, or name its class."""
        from trainers.inference.filling import classify, fill_masks

        if not isinstance(text, str):
            raise RequestError("--chat needs a generative model; give an encoder a text with --prompt")
        if self.facts.has_classes:
            found = classify(self.model, self.tokenization, text)
            return ", ".join(f"{name} {share:.3f}" for name, share in list(found.items())[:3])
        ids = self.tokenization.encode(text, special=True)
        uniforms = draws(ids, seed, draw, len(ids))[0] if temperature > 0 else None
        return fill_masks(self.model, self.tokenization, text, temperature=temperature or 1.0, uniforms_T=uniforms)


def draws(ids: Sequence[int], seed: int, draw: int, num_tokens: int) -> "np.ndarray":
    """Uniform numbers that depend on the prompt, the seed and the draw alone."""
    import numpy as np

    key = hashlib.sha256(json.dumps([list(ids), seed, draw]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64))).random((1, num_tokens))


@contextlib.contextmanager
def opened(text: str, store: str | None = None) -> Iterator["Sampler"]:
    """The language model that RUN/STAGE, a store address, a name or a folder means."""
    if "://" not in text and Path(text).is_dir():
        folder = Path(text)
        if not (folder / "adapter_config.json").is_file():
            _require_language_model(json.loads(_read(folder / "config.json")), text)
        yield Sampler(folder)
        return
    place = Store.open(store)
    manifest = find_artifact(place, text)
    if manifest.kind in DRAWING_KINDS:
        raise RequestError(f"{text} is of kind {manifest.kind}, which draws: add --grid FILE")
    for prefix in MODEL_FOLDERS:
        name = f"{prefix}/config.json".lstrip("/")
        if name in manifest.files:
            _require_language_model(json.loads(place.objects.get_bytes(manifest.files[name].sha256)), text)
            weights = weights_of(place, manifest) if prefix in WHOLE_PARTS else None
            if weights is not None and weights.note is not None:
                print(f"warning: {weights.note}", file=sys.stderr)
            yield Sampler(place.folder(manifest, prefix), weights)
            return
    with tempfile.TemporaryDirectory(prefix="trainwright-sample-") as temporary:
        yield Sampler(_merged(place, manifest, text, Path(temporary) / "model"))


def _merged(store: Store, manifest: ArtifactManifest, text: str, folder: Path) -> Path:
    """The model of an artifact that holds an adapter alone."""
    if not any(name.endswith("adapter_config.json") for name in manifest.files):
        raise RequestError(f"{text} is of kind {manifest.kind}; only a language model can be sampled")
    from trainers.store.export import export

    export(store, manifest, folder, merge=True)
    return folder


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise RequestError(f"{path.parent} is not a model folder: {path.name}: {error.strerror}") from None


def _require_language_model(config: dict[str, Any], text: str) -> None:
    labels = config.get("id2label") or {}
    kind = _kind(config)
    if kind is None or (MODEL_KINDS[kind].has_classes and len(labels) < 2):
        found = ", ".join(config.get("architectures") or []) or "no language model"
        raise RequestError(f"{text} is {found}; only a language model or a classifier of texts can be sampled")


def _kind(config: dict[str, Any]) -> ModelKind | None:
    """Which kind of model it is by the ending of its class; None: it is none that can be sampled."""
    endings: dict[str, ModelKind] = {
        "LMHeadModel": "language_model",
        "ForCausalLM": "language_model",
        "ForMaskedLM": "masked_model",
        "ForSequenceClassification": "text_classifier",
        "T5ForConditionalGeneration": "seq2seq_model",
        "BartForConditionalGeneration": "seq2seq_model",
    }
    classes = config.get("architectures") or []
    if any(name in IMAGE_TEXT_CLASSES for name in classes):
        return "vision_language_model"
    return next((endings[end] for name in classes for end in endings if name.endswith(end)), None)


def sample_texts(
    model: str,
    prompts: Sequence[str],
    *,
    chat: bool = False,
    store: str | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 96,
    temperature: float = 0.7,
    seed: int = 0,
    images: Sequence[Path] = (),
    num_beams: int | None = None,
) -> list[dict[str, Any]]:
    """Answers to each prompt as {prompt, draw, response, continues}; `chat` sends prompts through the chat template.

    `images` are what a vision-language model sees with every prompt. `continues` says whether the response continues
    the prompt, as a causal model's does.
    """
    with opened(model, store) as sampler:
        return [
            {
                "prompt": prompt,
                "draw": draw,
                "response": sampler.write(
                    [{"role": "user", "content": prompt}] if chat else prompt,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=seed,
                    draw=draw,
                    images=images,
                    num_beams=num_beams,
                ),
                "continues": sampler.facts.continues,
            }
            for prompt in prompts
            for draw in range(num_samples)
        ]


def converse(
    model: str, *, store: str | None = None, max_new_tokens: int = 96, temperature: float = 0.7, seed: int = 0
) -> None:
    """A conversation on the terminal, until an empty line or the end of input."""
    with opened(model, store) as sampler:
        messages: list[dict[str, str]] = []
        print("Write a message; an empty line ends the conversation.", file=sys.stderr)
        while True:
            try:
                text = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return
            if not text.strip():
                return
            messages.append({"role": "user", "content": text})
            answer = sampler.write(messages, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
            messages.append({"role": "assistant", "content": answer})
            print(answer, flush=True)
