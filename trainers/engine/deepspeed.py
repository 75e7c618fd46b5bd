"""ZeRO 0-3 on raw DeepSpeed: no op is compiled, and the state goes out and in without its checkpoint formats."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor, nn

from trainers.engine.config import deepspeed_config
from trainers.engine.flat_adamw import FlatAdamW, new_moments, split_by_decay
from trainers.engine.plain import load_replicated_state, poisoned, replicated_parameters, replicated_state
from trainers.engine.protocol import STATE_GROUPS, ParameterGroup, ReadState, StateGroup, StateSlice, StepInfo
from trainers.runtime import distributed

# The shared-memory op is compiled in the first init_distributed and leaves its buffer in /dev/shm; gloo does without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# DeepSpeed calls collectives by names that torch 2.13 renames; once a call is enough to fill a log.
warnings.filterwarnings("ignore", message="`torch.distributed.", category=FutureWarning)


def _import_muon() -> None:
    """Import what every DeepSpeed engine imports, without torch's Inductor.

    The module compiles functions of an optimiser that is not offered here, which takes a second of CPU.
    """
    compile_function, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_function


_import_muon()


class DeepSpeedEngine:
    """Engine over one module whose optimiser, gradients or parameters DeepSpeed shards."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        *,
        zero: int,
        precision: str,
        offload: str,
        clip: float,
        device: torch.device,
        starts: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)
        self._bare = module
        self.device = device
        self._zero = zero
        self.description = f"deepspeed zero {zero} {precision}, offload {offload}"
        self._parts = split_by_decay(groups)
        self._parameters = {name: parameter for part in self._parts for name, parameter in part.parameters}
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        self._sizes = {id(parameter): parameter.numel() for parameter in self._parameters.values()}
        self.steps_applied = 0
        self._flat = FlatAdamW(self._parts, clip, starts or {}) if zero == 0 else None
        self._torch_optimizer: Any = self._flat.inner if self._flat else self._build_adamw()
        config = deepspeed_config(
            zero=zero,
            precision=precision,
            offload=offload,
            clip=clip,
            trainable_elements=sum(parameter.numel() for parameter in self._parameters.values()),
            on_cpu=device.type == "cpu",
        )
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=self._flat or self._torch_optimizer, config=config, dist_init_required=False
        )
        self.module: nn.Module = self._engine  # its forward gathers what ZeRO-3 has sharded
        if zero > 0:
            self._make_moments()
            self._set_masters(starts or {})

    def _build_adamw(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            [
                {
                    "params": [parameter for _, parameter in part.parameters],
                    "lr": 0.0,
                    "betas": part.betas,
                    "eps": part.eps,
                    "weight_decay": part.weight_decay,
                }
                for part in self._parts
            ],
            fused=True,
        )

    def _make_moments(self) -> None:
        """Make the optimiser state that torch would make on the first step, so that it can be read and filled."""
        for flat in self._flat_masters():
            self._torch_optimizer.state[flat] = new_moments(flat)
        if self._zero < 3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def _set_masters(self, values: Mapping[str, Tensor]) -> None:
        """Give these parameters' masters values that the working precision cannot hold; DeepSpeed took the rounded."""
        for name, whole in values.items():
            owned = self._owned(self._parameters[name], "param")
            if owned is not None:
                start, master = owned
                master.copy_(whole.reshape(-1)[start : start + master.numel()])

    def _flat_masters(self) -> list[Tensor]:
        optimizer = self._engine.optimizer
        if self._zero == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        if hasattr(optimizer, "fp32_groups_flat_partition"):
            return list(optimizer.fp32_groups_flat_partition)
        return list(optimizer.single_partition_of_fp32_groups)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; DeepSpeed averages over ranks, so the loss is scaled to make it a sum."""
        self._engine.backward(poisoned(loss) * distributed.world_size())
        if self._zero > 0 and hasattr(self._engine.optimizer, "_backward_hook_state"):
            # Two forwards before one backward leave the nesting depth at one.
            self._engine.optimizer._backward_hook_state.backward_active_depth = 0

    def step(self, lrs: Mapping[str, float]) -> StepInfo:
        """Reduce, clip, update; DeepSpeed's overflow check makes all ranks skip together."""
        if self._flat is not None:
            self._flat.set_lrs(lrs)
            self._engine.step()
            self._flat.attach_gradients()
            info = self._flat.last
        else:
            for group, part in zip(self._torch_optimizer.param_groups, self._parts, strict=True):
                group["lr"] = lrs[part.name]
            self._engine.step()
            norm = self._engine.optimizer._global_grad_norm
            info = StepInfo(float(norm), self._engine.was_step_applied())
            if self._zero == 3:
                # Parameters without a gradient in a step would otherwise keep the last step's.
                for buffer in _gradient_partitions(self._engine.optimizer):
                    buffer.zero_()
        self.steps_applied += info.applied
        return info

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """Give the bare module; under ZeRO-3 gathered once, with DeepSpeed's hooks off."""
        if self._zero < 3:
            yield self._bare
            return
        with GatheredParameters(list(self._bare.parameters())):
            start_of_forward = _remove_hooks(self._engine.optimizer.parameter_offload)
            try:
                yield self._bare
            finally:
                _add_hooks(self._engine.optimizer.parameter_offload, start_of_forward)

    def full_parameters(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters on the CPU; under ZeRO-3 gathered one by one."""
        if self._zero < 3:
            yield from replicated_parameters(self._bare, names)
            return
        wanted = None if names is None else set(names)
        for name, parameter in self._bare.named_parameters():
            if wanted is None or name in wanted:
                with GatheredParameters([parameter]):
                    whole = parameter.detach().to("cpu", copy=True)
                yield name, whole

    def state_out(self) -> Iterator[StateSlice]:
        """Yield what this rank's partition holds."""
        if self._flat is not None:
            yield from replicated_state(self._flat)
            return
        for group, name, start, values in self._partition():
            yield StateSlice(group, name, self._shapes[name], start, values.detach())

    @torch.no_grad()
    def state_in(self, read: ReadState, *, steps_applied: int) -> None:
        """Fill this rank's partition, then the working parameters; under ZeRO-3 a rank reads its partition alone."""
        self.steps_applied = steps_applied
        if self._flat is not None:
            load_replicated_state(self._flat, read, steps_applied)
            return
        for group, name, start, values in self._partition():
            values.copy_(read(group, name, start, start + values.numel()))
        for flat in self._flat_masters():
            self._torch_optimizer.state[flat]["step"].fill_(steps_applied)
        if self._zero == 3:
            self._refresh_partitions()
            return
        for name, parameter in self._parameters.items():
            shape = self._shapes[name]
            parameter.data.copy_(read("param", name, 0, _size(shape)).view(shape))

    def _refresh_partitions(self) -> None:
        """Make ZeRO-3's working partitions from the masters as DeepSpeed does at the end of its step; collective.

        Small parameters, which stay whole on every rank, are gathered by the next forward, as in a fresh engine: it is
        by gathering a weight that another module uses (a head in the loss) that DeepSpeed learns of that use. Were
        they whole already, it would learn so after it has recorded the order of modules, and refuse the next forward.
        """
        optimizer = self._engine.optimizer
        optimizer._partition_all_parameters()
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)

    def _partition(self) -> Iterator[tuple[StateGroup, str, int, Tensor]]:
        """Yield this rank's fragments: group, parameter, where it starts, and the fragment as a flat view."""
        for group in STATE_GROUPS:
            for name, parameter in self._parameters.items():
                owned = self._owned(parameter, group)
                if owned is not None:
                    yield group, name, *owned

    def _owned(self, parameter: nn.Parameter, group: StateGroup) -> tuple[int, Tensor] | None:
        """Return where this rank's fragment of a parameter starts, and the fragment as a flat view."""
        key = None if group == "param" else group
        if self._zero == 3:
            optimizer = self._engine.optimizer
            local = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=True, optim_state_key=key)[
                0
            ]
            start = distributed.rank() * local.numel()
            count = min(local.numel(), self._sizes[id(parameter)] - start)
            return (start, local[:count]) if count > 0 else None
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key)

    def close(self) -> None:
        """Remove DeepSpeed's hooks."""
        self._engine.destroy()


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _gradient_partitions(optimizer: Any) -> list[Tensor]:
    partitions: dict[int, Tensor] = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    return list(partitions.values())


def _remove_hooks(offload: Any) -> Callable[..., Any]:
    """Take DeepSpeed's hooks off the module; returns the one that registering does not restore."""
    for parameter in offload.module.parameters():
        parameter.ds_active_sub_modules.clear()
    start_of_forward: Callable[..., Any] = offload.module._forward_pre_hooks[offload.fwd_pre_hook.id]
    for hook in [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]:
        hook.remove()
    offload.forward_hooks = []
    offload.backward_hooks = []
    return start_of_forward


def _add_hooks(offload: Any, start_of_forward: Callable[..., Any]) -> None:
    offload.fwd_pre_hook = offload.module.register_forward_pre_hook(start_of_forward)
    offload._register_deepspeed_module(offload.module)
