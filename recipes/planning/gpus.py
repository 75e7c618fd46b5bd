"""Common GPUs by their data sheets, so that a plan can be made for machines that one does not have (pure).

Figures are the makers' peaks without sparsity: NVIDIA's data sheets of B200 and H200 (HGX, 2024), H100 (2023), GH200
(2023), A100 (2021), A40, A10, L40S, L40, L4, RTX A6000, RTX 6000 Ada, V100 (2018), T4 (2019), AWS's A10G, and the
architecture papers of the RTX 3090 (GA102), 4090 (Ada) and 5090 (Blackwell). Where a sheet gives a figure with
sparsity alone, half of it is taken. fp32 is what torch multiplies it by here: TF32 from Ampere on.
"""

import re
from dataclasses import dataclass

from recipes.errors import RequestError
from recipes.nearest import nearest

GPUS_PER_NODE = 8
TERA = 10**12


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU."""

    name: str
    gib: float
    """Memory."""
    terabytes_per_s: float
    """Bandwidth of its memory."""
    bf16: float
    """Peak in 10^12 operations a second; 0: it has no bf16."""
    fp32: float
    capability: int
    """Compute capability, 10 x major + minor."""

    @property
    def memory_bytes(self) -> int:
        """What a process can ask for, the driver's own share included."""
        return int(self.gib * 2**30)

    def flops_per_s(self, precision: str) -> float:
        """Peak in a precision of a recipe."""
        return TERA * (self.bf16 if precision == "bf16" and self.bf16 else self.fp32)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("B200", 180, 8.0, 2250, 1125, 100),
        Gpu("H200", 141, 4.8, 989, 494, 90),
        Gpu("GH200", 96, 4.0, 989, 494, 90),
        Gpu("H100", 80, 3.35, 989, 494, 90),
        Gpu("H100-NVL", 94, 3.9, 835, 417, 90),
        Gpu("H100-PCIe", 80, 2.0, 756, 378, 90),
        Gpu("A100", 80, 2.04, 312, 156, 80),
        Gpu("A100-40", 40, 1.56, 312, 156, 80),
        Gpu("A40", 48, 0.70, 150, 75, 86),
        Gpu("A10", 24, 0.60, 125, 62, 86),
        Gpu("A10G", 24, 0.60, 70, 35, 86),
        Gpu("L40S", 48, 0.86, 362, 183, 89),
        Gpu("L40", 48, 0.86, 181, 90, 89),
        Gpu("L4", 24, 0.30, 121, 60, 89),
        Gpu("RTX-A6000", 48, 0.77, 155, 77, 86),
        Gpu("RTX-6000-Ada", 48, 0.96, 364, 182, 89),
        Gpu("RTX-5090", 32, 1.79, 209, 105, 120),
        Gpu("RTX-4090", 24, 1.01, 165, 83, 89),
        Gpu("RTX-3090", 24, 0.94, 71, 36, 86),
        Gpu("V100", 32, 0.90, 0, 15.7, 70),
        Gpu("T4", 16, 0.32, 0, 8.1, 75),
    )
}
_WRITTEN = re.compile(r"(?:(?P<count>[1-9][0-9]{0,4})\s*[xX*]\s*)?(?P<name>[A-Za-z][A-Za-z0-9 _-]*)")


@dataclass(frozen=True, slots=True)
class Gpus:
    """So many GPUs of a kind."""

    count: int
    gpu: Gpu

    def __str__(self) -> str:
        return f"{self.count}x{self.gpu.name}"


def parse_gpus(text: str) -> Gpus:
    """`8xH100` or `A100`; raises RequestError that names the nearest for what is not in the table."""
    found = _WRITTEN.fullmatch(text.strip())
    if found is None:
        raise RequestError(f"--on {text}: give a number and a GPU, for example 8xH100")
    known = {_key(name): gpu for name, gpu in GPUS.items()}
    gpu = known.get(_key(found["name"]))
    if gpu is None:
        guess = nearest(_key(found["name"]), list(known))
        advice = f"did you mean {known[guess].name}?" if guess else "known are " + ", ".join(GPUS)
        raise RequestError(f"--on {text}: no GPU of this name is known; {advice}")
    return Gpus(int(found["count"] or 1), gpu)


def nearest_gpu(memory_bytes: int, capability: int) -> Gpu:
    """The kind that a GPU of so much memory and such a capability most likely is."""
    return min(GPUS.values(), key=lambda gpu: (abs(gpu.capability - capability), abs(gpu.memory_bytes - memory_bytes)))


def _key(name: str) -> str:
    """A name without its separators."""
    return re.sub(r"[ _-]", "", name).lower()
