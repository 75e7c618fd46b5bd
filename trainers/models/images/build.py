"""From a configuration, or from an artifact's folder, to a model of a family; and back to a folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.errors import RequestError, StageError
from recipes.models.images.architecture import ImageArchitecture
from recipes.models.images.base import SETTINGS
from recipes.models.images.folders import FORMAT
from trainers.models.folders import with_adapter, write_json
from trainers.models.images.families import build_image_family
from trainers.models.images.protocol import ImageFacts, ImageFamily, Part, settings_of
from trainers.models.verification import MergeLoss, OpenedFiles, Probe, weight_digests
from trainers.runtime.precision import exact_matmul, is_finite
from trainers.store.hf_loaders import open_model

if TYPE_CHECKING:
    from trainers.models.images.latents import LatentCodec
    from trainers.models.images.text_encoder import TextEncoder

PROBE_IMAGES = 4
_ARCHITECTURE: TypeAdapter[ImageArchitecture] = TypeAdapter(ImageArchitecture)


@dataclass(frozen=True)
class Blueprint:
    """Everything that a family is built from but its weights."""

    architecture: ImageArchitecture
    facts: ImageFacts
    codec: "LatentCodec | None" = None
    """The autoencoder of a latent diffusion."""
    text: "TextEncoder | None" = None
    """What reads captions."""

    def build(self, seed: int) -> ImageFamily:
        """Build with random fp32 weights that depend on the seed alone; raises RequestError for unfit data."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_image_family(self.architecture, self.facts, self.codec, self.text)

    def with_weights(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> ImageFamily:
        """Build with these parameters, in evaluation mode on the CPU."""
        family = self.build(0)
        load_tensors(family, tensors, "the trained model")
        family.module.to(dtype).eval()
        return family


def write_family(
    folder: Path, family: ImageFamily, blueprint: Blueprint, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Write a model folder; `tensors` by their names in the family's module. The same weights give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings_of(blueprint.architecture, blueprint.facts, dtype)
    if blueprint.codec is not None:
        settings["latent_scale"] = blueprint.codec.scale
    write_json(folder / SETTINGS, settings)
    for part in family.parts():
        place = folder / part.folder
        place.mkdir(parents=True, exist_ok=True)
        if part.config is not None:
            write_json(place / "config.json", part.config)
        own = part.frozen or {
            name.removeprefix(part.prefix): tensor.to(dtype)
            for name, tensor in tensors.items()
            if name.startswith(part.prefix)
        }
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}
        save_file(own, place / part.weights, metadata={"format": "pt"})
    for name, content in family.further_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / name, content)
    if blueprint.text is not None:
        blueprint.text.write(folder)


def open_family(folder: Path, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> ImageFamily:
    """Open a model folder strictly, in evaluation mode; raises RequestError or StageError naming what is wrong."""
    family = open_blueprint(folder, device=device).build(0)
    load_tensors(family, read_tensors(folder, family), str(folder))
    family.module.to(device=device or torch.device("cpu"), dtype=dtype).eval()
    return family


def open_blueprint(folder: Path, *, device: torch.device | None = None) -> Blueprint:
    """Read what a model folder's family is built from but its weights."""
    settings = read_settings(folder)
    architecture = _ARCHITECTURE.validate_python(settings["architecture"])
    facts = ImageFacts(
        settings["channels"],
        settings["height"],
        settings["width"],
        tuple(settings["classes"]),
        tuple(settings.get("captions", ())),
    )
    codec = None
    if (folder / "vae" / SETTINGS).is_file():
        from trainers.models.images.latents import LatentCodec

        codec = LatentCodec(open_family(folder / "vae", device=device), float(settings["latent_scale"]))
    from trainers.models.images.text_encoder import find_text_encoder

    return Blueprint(architecture, facts, codec, find_text_encoder(folder))


def read_tensors(folder: Path, family: ImageFamily) -> dict[str, Tensor]:
    """Read the trained tensors of a model folder by their names in the family's module."""
    tensors: dict[str, Tensor] = {}
    for part in family.parts():
        if part.frozen is not None:
            continue
        for name, tensor in load_file(folder / part.folder / part.weights).items():
            tensors[part.prefix + name] = tensor
    return tensors


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what a model folder says of itself; raises RequestError where it is no model of images."""
    path = folder / SETTINGS
    if not path.is_file():
        raise RequestError(f"{folder} is not the folder of a model of images: it has no {SETTINGS}")
    settings: dict[str, Any] = json.loads(path.read_bytes())
    if settings.get("format") != FORMAT:
        raise RequestError(f"{path} has format {settings.get('format')!r}; this version reads {FORMAT}")
    return settings


def load_tensors(family: ImageFamily, tensors: Mapping[str, Tensor], where: str) -> None:
    """Fill the family's module; raises StageError for missing, left over, misshapen or non-finite tensors."""
    wanted = {name: tuple(parameter.shape) for name, parameter in family.module.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise StageError(f"{where}: tensors differ from the model's: {', '.join(wrong[:8])}")
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise StageError(f"{where}: values are not finite in {', '.join(bad[:8])}")
    with torch.no_grad():
        for name, parameter in family.module.named_parameters():
            parameter.copy_(tensors[name])


def probe_family(family: ImageFamily, dtype: torch.dtype) -> Probe:
    """Run fixed images through a family in fp32."""
    return Probe.of(family.module, lambda: _probe_outputs(family), family.module.named_parameters(), dtype)


def probe_adapter(adapter: Mapping[str, Tensor], dtype: torch.dtype) -> Probe:
    """Return what an adapter's files must hold; its outputs are those of the merged model, which has its own probe."""
    return Probe([], np.zeros(0, dtype=np.float32), dtype, weight_digests(adapter.items(), dtype))


def verify_family(
    folder: Path, expected: Probe, *, adapter: Path | None = None, merged: Path | None = None
) -> tuple[float, MergeLoss | None]:
    """Open a model folder and compare it with the live model; see `verify_folder`.

    Parts that a stock class opens are opened by it. An adapter is put on the network by peft; `merged` must hold what
    peft merges. Raises StageError naming what is wrong.
    """
    family = open_family(folder, dtype=expected.dtype)
    if adapter is not None:
        from peft import get_peft_model_state_dict

        adapted = with_adapter(family.net, adapter).eval()
        found = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        return OpenedFiles(adapter.name, adapted, found, None).compare(expected, merged)
    for part in family.parts():
        if part.config is not None:
            _open_by_stock_class(folder / part.folder, part, family)
    own = dict(family.module.named_parameters())
    return OpenedFiles(folder.name, family.module, own, lambda: _probe_outputs(family)).compare(expected, merged)


def _open_by_stock_class(folder: Path, part: Part, family: ImageFamily) -> None:
    """Open a part with diffusers' class of its config.json; its tensors must be those of the family."""
    import diffusers

    config = json.loads((folder / "config.json").read_bytes())
    model = open_model(getattr(diffusers, config["_class_name"]), folder, weights=part.weights)
    theirs = dict(model.named_parameters())
    ours = part.frozen or {
        name.removeprefix(part.prefix): parameter
        for name, parameter in family.module.named_parameters()
        if name.startswith(part.prefix)
    }
    if theirs.keys() != ours.keys() or any(
        not torch.equal(theirs[name].to(ours[name].dtype), ours[name]) for name in ours
    ):
        raise StageError(f"{folder}: diffusers' {config['_class_name']} opens with other tensors than were written")


def _probe_outputs(family: ImageFamily) -> np.ndarray:
    facts = family.facts
    generator = np.random.Generator(np.random.Philox(key=7))
    images = torch.from_numpy(generator.random((PROBE_IMAGES, *facts.shape), dtype=np.float32))
    labels = torch.arange(PROBE_IMAGES) % max(1, len(facts.classes))
    device = next(family.module.parameters()).device
    with exact_matmul():
        found: np.ndarray = family.outputs(images.to(device), labels.to(device)).float().cpu().numpy()
    return np.ascontiguousarray(found)
