"""How one stage of a run ended."""

from dataclasses import dataclass

from trainers.store.manifest import ArtifactManifest


@dataclass(frozen=True)
class StageResult:
    """How one stage of a run ended."""

    name: str
    kind: str
    cached: bool
    manifest: ArtifactManifest
    seconds: float
    attempts: int

    @property
    def gate_failed(self) -> bool:
        """Whether the artifact carries a failed gate."""
        return not self.manifest.gate.passed
