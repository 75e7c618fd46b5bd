"""What the files of a model must reproduce of the live one, and how exactly.

Weights must be equal bit for bit. Outputs are compared in fp32 whatever the model's precision: both sides forward the
same bits, so that the difference is fp32's rounding alone and does not grow with bf16's. Its bound comes from the model
itself: the outputs' response to weights that are off by as much as fp32 rounding may move a product (`output_bound`).
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from recipes.errors import VerificationError
from trainers.models.merged_adapters import adapted_parameter, merged_name

UNIT_ROUNDOFF = 2.0**-24
"""Of fp32."""
DRAWS = 3
"""Perturbations whose effect on the outputs is measured."""
SAFETY = 8.0
"""Times the largest measured effect that outputs may differ."""
_SIGNS = 65_521
"""Length of the table of random signs; a prime, so that rows of a matrix do not repeat each other's."""

Forward = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Probe:
    """A live model's outputs on fixed inputs, forwarded in fp32, and the digests of its weights."""

    token_ids: list[int]
    outputs: np.ndarray
    dtype: torch.dtype = torch.float32
    """Working precision of the model, in which its files hold the weights."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Digest of each tensor in `dtype`, by its name in the files; an adapter's by its name in peft's."""

    @staticmethod
    def of(
        module: nn.Module,
        forward: Forward,
        weights: Iterable[tuple[str, Tensor]],
        dtype: torch.dtype,
        token_ids: Sequence[int] = (),
    ) -> "Probe":
        """Probe a live model: `forward` runs it on the fixed inputs, `weights` are its tensors by names in files."""
        digests = weight_digests(weights, dtype)
        with in_fp32(module):
            return Probe(list(token_ids), forward(), dtype, digests)

    def to_bytes(self) -> bytes:
        """Serialise as safetensors."""
        digests = json.dumps(dict(self.weights), sort_keys=True).encode()
        tensors = {
            "token_ids": torch.tensor(self.token_ids, dtype=torch.int64),
            "outputs": torch.from_numpy(self.outputs),
            "dtype": torch.zeros(0, dtype=self.dtype),
            "weights": torch.frombuffer(bytearray(digests), dtype=torch.uint8),
        }
        return bytes(save_safetensors(tensors))

    @staticmethod
    def from_bytes(data: bytes) -> "Probe":
        """Read what `to_bytes` wrote."""
        tensors = load_safetensors(data)
        weights = json.loads(bytes(tensors["weights"].numpy()))
        return Probe(tensors["token_ids"].tolist(), tensors["outputs"].numpy(), tensors["dtype"].dtype, weights)


@dataclass(frozen=True)
class MergeLoss:
    """What rounding took from an adapter when it was merged into weights of the model's precision."""

    lost: float
    """Norm of the rounding over the norm of the update: 0 keeps the update whole, 1 swallows as much as there is."""
    unchanged: float
    """Share of the adapted weights that the update moved in fp32 and that are still the base's in the files."""


@dataclass(frozen=True)
class OpenedFiles:
    """Files of a candidate, opened as strictly as the ecosystem's own classes do; each family says how."""

    where: str
    """As errors name the files."""
    module: Any
    weights: Mapping[str, Tensor]
    """By their names in the files."""
    outputs: Forward | None
    """Runs the module on the probe's inputs; None: of an adapter, whose merged model is compared by itself."""
    adapters: Sequence[str] = ("default",)
    """Names of the adapters that the module has, the lowest first."""

    def compare(self, expected: Probe, merged: Path | None) -> tuple[float, MergeLoss | None]:
        """Return the output difference over the outputs' size, and what merging has lost; `merged` holds the same model
        with all adapters merged.

        Raises VerificationError where the files are not the live model's.
        """
        demand_same_weights(self.where, weight_digests(self.weights.items(), expected.dtype), expected.weights)
        difference = 0.0
        if self.outputs is not None:
            difference = compare_outputs(self.where, self.module, self.outputs, expected.outputs)
        if merged is None:
            return difference, None
        return difference, compare_merge(self.module, merged, expected.dtype, merged.name, self.adapters)


def weight_digests(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, str]:
    """Return the digest of each tensor's shape and bits in `dtype`, by name."""
    digests = {}
    for name, tensor in tensors:
        bits = tensor.detach().to(dtype).cpu().contiguous().reshape(-1).view(torch.uint8)
        digest = hashlib.sha256(f"{tuple(tensor.shape)}\n".encode())
        digest.update(bits.numpy().data)
        digests[name] = digest.hexdigest()
    return digests


def demand_same_weights(where: str, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raise VerificationError naming the tensors whose digests differ, or that only one side has."""
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        raise VerificationError(
            f"{where}: the weights of the files are not the live model's: {len(wrong)} of {len(expected)} tensors "
            f"differ ({', '.join(wrong[:4])}{', ...' if len(wrong) > 4 else ''})"
        )


def compare_outputs(where: str, module: nn.Module, forward: Forward, expected: np.ndarray) -> float:
    """Compare a module's fp32 outputs with the live model's; returns the largest difference over their RMS.

    `forward` runs the module on the probe's inputs. Raises VerificationError for another shape, values that are not
    finite, and differences above `output_bound`.
    """
    with in_fp32(module):
        found = forward()
    if found.shape != expected.shape or not np.isfinite(found).all():
        raise VerificationError(f"{where}: outputs have shape {found.shape}, expected finite {expected.shape}")
    difference = float(np.abs(found - expected).max())
    size = float(np.sqrt(np.square(expected, dtype=np.float64).mean())) or 1.0
    if difference == 0.0:
        return 0.0
    bound = output_bound(module, forward, found, enough=difference)
    if not difference <= bound:
        raise VerificationError(
            f"{where}: outputs of the files differ from the live model's by {difference / size:.2e} of their size; "
            f"fp32 rounding explains at most {bound / size:.2e}"
        )
    return difference / size


def output_bound(module: nn.Module, forward: Forward, outputs: np.ndarray, *, enough: float = math.inf) -> float:
    """Return how far two fp32 forwards of the same weights may differ, by kernel, device and order of summation.

    A bound of at least `enough` is returned as soon as that is known: further draws can only raise it.

    A sum of n products computed in fp32 is the exact sum for weights that are off by up to about sqrt(n) roundings
    (Higham & Mary 2019, doi:10.1137/18M1226312). So each weight is moved by that much, up or down at random, and the
    largest change of the outputs is measured: depth, width and the model's own amplification are all in it.
    """
    own = UNIT_ROUNDOFF * float(np.abs(outputs).max())
    bound, largest = SAFETY * own, 0.0
    for draw in range(DRAWS):
        if bound >= enough:
            break
        with in_fp32(module, draw):
            largest = max(largest, float(np.abs(forward() - outputs).max()))
        bound = SAFETY * (largest + own)
    return bound


@contextmanager
def in_fp32(module: nn.Module, draw: int | None = None) -> Iterator[None]:
    """Run forwards without gradients in fp32 from the module's own bits; afterwards it is as it was.

    The items of its lists of layers are widened one at a time, while each runs, so that no second copy of the whole is
    held. With `draw` each weight is moved by that perturbation of `output_bound`.
    """
    blocks = dict(_outermost_items(module))
    inner = {id(part) for block in blocks.values() for part in block.modules()}
    widened = _Widened(draw)
    handles = []
    for name, block in blocks.items():
        own = _Widened(draw)
        handles.append(block.register_forward_pre_hook(own.hook(name)))
        handles.append(block.register_forward_hook(own.unhook, always_call=True))
    try:
        for name, part in module.named_modules():
            if id(part) not in inner:
                widened.take(name, part)
        with torch.no_grad():
            yield
    finally:
        widened.put_back()
        for handle in handles:
            handle.remove()


class _Widened:
    """Parameters and buffers in fp32, and what they were."""

    def __init__(self, draw: int | None) -> None:
        self._draw = draw
        self._parameters: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []

    def hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        """Give the hook that widens a block before its forward."""

        def widen(block: nn.Module, _: Any) -> None:
            for path, part in block.named_modules():
                self.take(f"{name}.{path}", part)

        return widen

    def unhook(self, *_: Any) -> None:
        """Put the block back after its forward."""
        self.put_back()

    def take(self, path: str, part: nn.Module) -> None:
        """Widen what a module holds itself."""
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_floating_point() and id(parameter) not in self._parameters:
                self._parameters[id(parameter)] = (parameter, parameter.data)
                parameter.data = self._moved(f"{path}.{name}", parameter.data.float())
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.dtype != torch.float32:
                self._buffers.append((part, name, buffer))
                setattr(part, name, buffer.float())

    def put_back(self) -> None:
        """Restore every tensor itself."""
        for parameter, before in self._parameters.values():
            parameter.data = before
        for part, name, buffer in self._buffers:
            setattr(part, name, buffer)
        self._parameters, self._buffers = {}, []

    def _moved(self, name: str, weight: Tensor) -> Tensor:
        if self._draw is None:
            return weight
        fan_in = weight[0].numel() if weight.ndim > 1 else 1
        key = hashlib.blake2b(f"{self._draw}\n{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key) >> 1)
        signs = torch.randint(0, 2, (_SIGNS,), generator=generator).to(weight) * 2 - 1
        signs = signs.repeat(-(-weight.numel() // _SIGNS))[: weight.numel()].view(weight.shape)
        return torch.addcmul(weight, weight, signs, value=UNIT_ROUNDOFF * fan_in**0.5)


def _outermost_items(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the items of the module's lists that lie in no other list."""
    for name, child in module.named_children():
        place = f"{path}.{name}" if path else name
        if isinstance(module, nn.ModuleList):
            yield place, child
        else:
            yield from _outermost_items(child, place)


def compare_merge(
    adapted: Any, merged: Path, dtype: torch.dtype, where: str, names: Sequence[str] = ("default",)
) -> MergeLoss:
    """Hold merged files against what peft itself merges in fp32: each weight must be that, rounded once to `dtype`.

    `adapted` is peft's model with the adapters `names` on their base, the lowest first; its adapted layers are merged
    one by one and are of no use afterwards. Raises VerificationError naming a layer that differs by more than the
    rounding.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    rounding = update = 0.0
    kept = moved = 0
    with _open_weights(merged) as read:
        for path, layer in adapted.base_model.model.named_modules():
            own = [name for name in names if isinstance(layer, BaseTunerLayer) and name in layer.scaling]
            if not own:
                continue
            base = adapted_parameter(layer).data.float().clone()
            layer.float()
            layer.merge(adapter_names=own)
            exact, name = adapted_parameter(layer).data, merged_name(path, layer)
            found = read(name).float()
            _demand_rounded(f"{where}: {name}", found, exact, sum(layer.r[name] for name in own), dtype)
            rounding += float((found - exact).double().square().sum())
            update += float((exact - base).double().square().sum())
            moved += int((exact != base).sum())
            kept += int(((found == base) & (exact != base)).sum())
            layer.to(dtype)
    return MergeLoss((rounding / update) ** 0.5 if update else 0.0, kept / moved if moved else 0.0)


def _demand_rounded(where: str, found: Tensor, exact: Tensor, rank: int, dtype: torch.dtype) -> None:
    """Raise VerificationError unless `found` is `exact` rounded to `dtype`, up to fp32's own error in `exact`.

    That error is at most the roundings of a product of `rank` terms, a sum and (DoRA) a row's norm, of the row's size.
    """
    if bool((found == exact.to(dtype).float()).all()):
        return
    exponent = torch.frexp(exact)[1]
    binade = torch.ldexp(torch.ones_like(exact), exponent - 1).masked_fill_(exact == 0, 0.0)
    half_step = binade * (torch.finfo(dtype).eps / 2)
    rows = exact.flatten(1)
    largest = rows.abs().amax(dim=1).view(-1, *[1] * (exact.ndim - 1))
    slack = UNIT_ROUNDOFF * (rank + 8 + rows.shape[1] ** 0.5) * largest
    excess = (found - exact).abs() - half_step - slack
    if not bool((excess <= 0).all()):
        count = int((excess > 0).sum() + torch.isnan(excess).sum())
        raise VerificationError(
            f"{where}: {count} of {found.numel()} merged weights are not base + adapter rounded once to "
            f"{str(dtype).removeprefix('torch.')} (off by up to {float((found - exact).abs().max()):.2e})"
        )


@contextmanager
def _open_weights(folder: Path) -> Iterator[Callable[[str], Tensor]]:
    """Give a function that reads a tensor of a model folder by name, from whichever file holds it."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in sorted(folder.rglob("*.safetensors"))]
        places = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping

        def read(name: str) -> Tensor:
            if name not in places:
                raise VerificationError(f"{folder}: no file holds {name}")
            tensor: Tensor = places[name].get_tensor(name)
            return tensor

        yield read
