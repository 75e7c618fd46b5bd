"""AdamW over flat fp32 masters with clipping and skipping, for engines that keep the whole optimiser on every rank.

Each parameter group's masters, gradients and moments are one flat tensor each: one fused update and one collective a
group. Working parameters in fp32 are views of the masters; others are copies, and their gradients are added up in fp32.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainers.engine.protocol import ParameterGroup, StateGroup, StepInfo

CLIP_EPS = 1e-6


@dataclass(frozen=True)
class OptimizerGroup:
    """Part of a parameter group with one weight decay."""

    name: str
    parameters: tuple[tuple[str, nn.Parameter], ...]
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def split_by_decay(groups: Sequence[ParameterGroup]) -> list[OptimizerGroup]:
    """Split each group into matrices, which are decayed, and vectors, which are not; empty parts are left out."""
    parts: list[OptimizerGroup] = []
    for group in groups:
        matrices = tuple(pair for pair in group.parameters if pair[1].ndim >= 2)
        vectors = tuple(pair for pair in group.parameters if pair[1].ndim < 2)
        split = (
            [(group.parameters, 0.0)] if group.weight_decay == 0 else [(matrices, group.weight_decay), (vectors, 0.0)]
        )
        parts += [
            OptimizerGroup(group.name, parameters, group.betas, group.eps, decay)
            for parameters, decay in split
            if parameters
        ]
    return parts


class FlatAdamW(torch.optim.Optimizer):
    """The update; `reduce_gradients` hands the flat gradients to whoever sums them over ranks first.

    Masters start from the parameters, or from `starts` for those whose value the working precision has rounded.
    """

    def __init__(self, parts: Sequence[OptimizerGroup], clip: float, starts: Mapping[str, Tensor]) -> None:
        self.parts = list(parts)
        self.clip = clip
        self.last = StepInfo(0.0, False)
        self.masters: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self._low_precision: list[tuple[nn.Parameter, Tensor]] = []
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        self._slices: dict[str, tuple[int, int, int, torch.Size]] = {}
        for index, part in enumerate(self.parts):
            self._flatten(index, part, starts)
        super().__init__([{"params": [parameter for _, parameter in part.parameters]} for part in self.parts], {})
        self.inner = torch.optim.AdamW(
            [
                {"params": [master], "lr": 0.0, "betas": part.betas, "eps": part.eps, "weight_decay": part.weight_decay}
                for master, part in zip(self.masters, self.parts, strict=True)
            ],
            fused=True,
        )
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = gradient
            self.inner.state[master] = new_moments(master)
        self.attach_gradients()

    def attach_gradients(self) -> None:
        """Make autograd add into the flat gradients; needed again after somebody set a parameter's `grad` to None."""
        for parameter, view in self._views:
            parameter.grad = view

    def _flatten(self, index: int, part: OptimizerGroup, starts: Mapping[str, Tensor]) -> None:
        size = sum(parameter.numel() for _, parameter in part.parameters)
        device = part.parameters[0][1].device
        master = torch.empty(size, dtype=torch.float32, device=device)
        gradient = torch.zeros(size, dtype=torch.float32, device=device)
        start = 0
        for name, parameter in part.parameters:
            stop = start + parameter.numel()
            master[start:stop] = starts.get(name, parameter.detach()).reshape(-1).float()
            self._slices[name] = (index, start, stop, parameter.shape)
            gradient_view = gradient[start:stop].view(parameter.shape)
            if parameter.dtype == torch.float32:
                parameter.data = master[start:stop].view(parameter.shape)
                self._views.append((parameter, gradient_view))
            else:
                self._low_precision.append((parameter, master[start:stop].view(parameter.shape)))
                parameter.register_post_accumulate_grad_hook(_add_into(gradient_view))
            start = stop
        self.masters.append(master)
        self.gradients.append(gradient)

    def get_grads_for_reduction(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Give DeepSpeed the gradients to sum over ranks (dense, expert-parallel)."""
        return list(self.gradients), {}

    def set_lrs(self, lrs: Mapping[str, float]) -> None:
        """Set each parameter group's learning rate."""
        for group, part in zip(self.inner.param_groups, self.parts, strict=True):
            group["lr"] = lrs[part.name]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Clip by the global norm and update; a non-finite norm changes nothing but clears the gradients."""
        norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in self.gradients])
        norm = torch.linalg.vector_norm(norms)
        value = float(norm)
        is_finite = value == value and value not in (float("inf"), float("-inf"))
        if is_finite:
            factor = self.clip / (value + CLIP_EPS)
            if factor < 1:
                for gradient in self.gradients:
                    gradient.mul_(factor)
            self.inner.step()
            self.refresh_working_copies()
        self.zero_grad()
        self.last = StepInfo(value, is_finite)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear the gradients; the views stay."""
        for gradient in self.gradients:
            gradient.zero_()

    @torch.no_grad()
    def refresh_working_copies(self) -> None:
        """Copy the masters into the low-precision parameters."""
        for parameter, master in self._low_precision:
            parameter.copy_(master)

    def slices(self, group: StateGroup) -> Iterator[tuple[str, torch.Size, Tensor]]:
        """Yield each parameter's name, shape and flat fp32 value of one state group, as views."""
        for name, (index, start, stop, shape) in self._slices.items():
            master = self.masters[index]
            flat = master if group == "param" else self.inner.state[master][group]
            yield name, shape, flat[start:stop]

    def set_step_count(self, steps: int) -> None:
        """Set AdamW's bias-correction step."""
        for master in self.masters:
            self.inner.state[master]["step"].fill_(steps)


def new_moments(master: Tensor) -> dict[str, Tensor]:
    """Return the state that torch's fused AdamW makes on its first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=master.device),
        "exp_avg": torch.zeros_like(master, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
    }


def _add_into(total: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad)
        parameter.grad = None

    return add
