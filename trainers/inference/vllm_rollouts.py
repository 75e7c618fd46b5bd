"""Sampling by vLLM: weights go over by version and digest, prompts as token ids; what comes back is checked.

Shapes: B responses, P prompt tokens, R response tokens.
"""

import hashlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from recipes.errors import RequestError, StageError
from recipes.stages.rollout_engines import VllmEngine
from trainers.data.batches import PromptBatch
from trainers.engine.protocol import Engine
from trainers.inference.generation import SamplingSettings
from trainers.inference.rollouts import Sampled, SampleKey, StopReason, WeightsVersion
from trainers.inference.vllm_process import EngineDiedError, VllmProcess
from trainers.runtime.observer import Observer, Watch

GIB = 1 << 30
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can be opened for."""
NAMED = 3
"""So many tensors a message names."""

Digests = Mapping[str, str]
"""Digests of values by the names of tensors."""


class OtherWeightsError(StageError):
    """vLLM holds other weights than the learner."""


class ServedPolicy(Protocol):
    """A policy as the files that an engine outside of the learner opens. Tensors are as they are sampled by."""

    @property
    def adapter_rank(self) -> int | None:
        """Rank of the adapter that is sent by itself; None: whole models are sent."""

    def whole(self) -> Mapping[str, Tensor]:
        """The model by its names in files, without the adapter where that is sent by itself; collective."""

    def write_whole(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write these with the configuration."""

    def adapter(self) -> Mapping[str, Tensor]:
        """The adapter by its names in files; collective."""

    def write_adapter(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write these with the configuration."""

    def multiplied(self, adapter: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The adapter with its scale in the second factor, as it is multiplied by."""


@dataclass(frozen=True)
class Limits:
    """What a process is opened for."""

    dtype: str
    max_model_len: int
    """Tokens of the longest prompt and response together."""
    threads: int


class VllmRollouts:
    """Samples in a process of vLLM's own environment, one on each rank.

    The process answers only by weights that were compared, tensor by tensor and digest by digest, with the learner's.
    One that dies is replaced, with the same weights, and answers the same prompts with the same seeds.
    """

    def __init__(
        self,
        engine: Engine,
        policy: ServedPolicy,
        settings: VllmEngine,
        limits: Limits,
        seed: int,
        observer: Observer,
    ) -> None:
        self._engine, self._policy, self._settings = engine, policy, settings
        self._limits, self._seed, self._observer = limits, seed, observer
        if (finding := settings.missing()) is not None:
            raise RequestError(f"rollout.engine: {finding}; this is node {socket.gethostname()}")
        self._folder = Path(tempfile.mkdtemp(prefix="trainwright-vllm-"))
        self._process: VllmProcess | None = None
        self._version = WeightsVersion(-1, -1)
        self._sent: dict[str, _Sent] = {}
        """What the folder holds, by the request that takes it over."""
        self._adapters = 0
        """Sent so far: vLLM knows each by a number that no other had."""
        self._replaced = 0

    def sync(self, iteration: int) -> WeightsVersion:
        """Send the learner's weights, compare what vLLM holds with them, and have it answer by these; collective."""
        policy, steps = self._policy, self._engine.steps_applied
        is_first = not self._sent
        if is_first or policy.adapter_rank is None:
            self._send("load", self._folder / "whole", policy.whole(), policy.write_whole)
        if policy.adapter_rank is not None:
            self._adapters += 1
            tensors = policy.adapter()
            held = policy.multiplied(tensors)
            self._send("load_adapter", self._folder / f"adapter-{self._adapters}", tensors, policy.write_adapter, held)
        digest = hashlib.sha256(repr([sorted(sent.digests.items()) for sent in self._sent.values()]).encode())
        self._version, before = WeightsVersion(iteration, steps, digest.hexdigest()), self._version
        try:
            self._taken_over(before, is_open=not is_first)
        except EngineDiedError as error:
            self._let_go(error)
            self._taken_over(before, is_open=False)
        return self._version

    def generate(
        self, prompts: PromptBatch, keys: Sequence[SampleKey], sampling: SamplingSettings, watch: Watch
    ) -> Sampled:
        """Answer prompts; a key, the seed and the iteration give the seed of a response."""
        requests = [
            {"prompt": ids[mask].tolist(), "seed": response_seed(self._seed, self._version.iteration, key)}
            for ids, mask, key in zip(prompts.input_ids_BP, prompts.attention_mask_BP.bool(), keys, strict=True)
        ]
        asked = {
            "version": self._version.digest,
            "requests": requests,
            "sampling": {
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "stop_token_ids": list(sampling.stop_ids),
                **({"allowed_token_ids": list(range(sampling.num_tokens))} if self._has_idle_rows(sampling) else {}),
            },
        }
        while True:
            process = self._process or self._taken_over(self._version, is_open=False)
            try:
                drawn = process.ask("generate", lambda done: watch(done / len(requests)), **asked)
                return _sampled(drawn, sampling, prompts.input_ids_BP.device, self._version)
            except EngineDiedError as error:
                self._let_go(error)
            except StageError:  # refused: nothing is under way
                raise
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End the process and forget its files."""
        if self._process is not None:
            self._process.close()
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)
        self._sent = {}

    def _let_go(self, error: EngineDiedError) -> None:
        """Count a process that died; raises what it died of where no further one may take its place."""
        self._process = None
        self._replaced += 1
        if self._replaced > self._settings.replacements:
            raise error
        self._observer.notify(f"warning: {error}; another one takes its place")

    def _has_idle_rows(self, sampling: SamplingSettings) -> bool:
        """Whether the embedding has rows without a token, which are never drawn."""
        return self._sent["load"].most_rows > sampling.num_tokens

    def _send(
        self,
        op: str,
        folder: Path,
        tensors: Mapping[str, Tensor],
        write: Callable[[Path, Mapping[str, Tensor]], None],
        held: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write tensors to where the process reads them; `held` is what it then multiplies by, by default the same."""
        if (before := self._sent.get(op)) is not None:
            shutil.rmtree(before.folder)
        write(folder, tensors)
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        digests = {name: tensor_digest(tensor) for name, tensor in (held or tensors).items()}
        self._sent[op] = _Sent(folder, shapes, digests, {} if before is None else before.digests)

    def _taken_over(self, before: WeightsVersion, *, is_open: bool) -> VllmProcess:
        """The process with what was sent; it is opened unless it is open already. Raises StageError for other weights.

        `before` is the version that it answered by until now.
        """
        whole, adapter, rank = self._sent["load"], self._sent.get("load_adapter"), self._policy.adapter_rank
        process = self._process
        try:
            if process is None or not is_open:
                process = self._process = self._opened(whole.folder, rank)
                self._compare("held", process.ask("held", shapes=whole.shapes), whole, before)
            elif rank is None:
                found = process.ask("load", folder=str(whole.folder), shapes=whole.shapes)
                self._compare("load", found, whole, before)
            if adapter is not None:
                found = process.ask(
                    "load_adapter", folder=str(adapter.folder), number=self._adapters, shapes=adapter.shapes
                )
                self._compare("load_adapter", found, adapter, before)
            process.ask("commit", version=self._version.digest)
        except (OtherWeightsError, EngineDiedError):  # not committed, so it answers nothing; or gone
            raise
        except BaseException:
            self.close()
            raise
        return process

    def _opened(self, folder: Path, rank: int | None) -> VllmProcess:
        """A new process with the model in a folder."""
        limits, settings = self._limits, self._settings
        if self._process is not None:
            self._process.close()
        process = VllmProcess(self._settings.python, limits.threads, lambda: self._observer.phase("vllm"))
        process.ask(
            "open",
            folder=str(folder),
            lora_rank=None if rank is None else next(known for known in LORA_RANKS if known >= rank),
            dtype=limits.dtype,
            max_model_len=limits.max_model_len,
            max_num_seqs=settings.max_responses,
            kv_cache_memory_bytes=int(settings.cache_gib * GIB),
        )
        return process

    def _compare(self, op: str, found: Mapping[str, Any], sent: "_Sent", before: WeightsVersion) -> None:
        """Raise StageError unless vLLM holds exactly what was sent."""
        held: Digests = found["digests"]
        wrong = [name for name, digest in sent.digests.items() if held.get(name) != digest]
        if not wrong and not found["unknown"]:
            return
        wanted = _text(self._version)
        stale = [name for name in wrong if name in held and held[name] == sent.before.get(name)]
        named = ", ".join(wrong[:NAMED]) + (", ..." if len(wrong) > NAMED else "")
        fault = f"{len(wrong)} of {len(sent.digests)} tensors are other ones ({named})"
        if stale and len(stale) == len(wrong):
            fault += ", the ones that were sent before"
        if not wrong:
            fault = f"it holds {len(found['unknown'])} parameters that were not sent ({found['unknown'][0]}, ...)"
        since = "" if before.iteration < 0 else f"; until now it answered by {_text(before)}"
        raise OtherWeightsError(f"vLLM does not hold the learner's weights of {wanted} after {op}: {fault}{since}")


@dataclass(frozen=True)
class _Sent:
    """What a folder holds for the process to load."""

    folder: Path
    shapes: Mapping[str, list[int]]
    digests: Digests
    before: Digests
    """Of what was sent before it."""

    @property
    def most_rows(self) -> int:
        """Rows of the tallest tensor that is an embedding or a head."""
        rows = [shape[0] for name, shape in self.shapes.items() if len(shape) == 2 and _is_vocabulary(name)]
        return max(rows, default=0)


def _is_vocabulary(name: str) -> bool:
    return any(part in name for part in ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out"))


def _text(version: WeightsVersion) -> str:
    return f"iteration {version.iteration}, step {version.steps_applied}"


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values, as `vllm_server` takes it."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(data).hexdigest()


def response_seed(seed: int, iteration: int, key: SampleKey) -> int:
    """The seed of a response's draws, of 63 bits: keyed by (seed, iteration, key) alone."""
    text = "\n".join(map(str, (seed, "rollout", iteration, *key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _sampled(
    drawn: Sequence[Mapping[str, Any]], sampling: SamplingSettings, device: torch.device, version: WeightsVersion
) -> Sampled:
    """Responses as tables, padded on the right."""
    shape = (len(drawn), sampling.max_new_tokens)
    tokens_BR = torch.full(shape, sampling.pad_id, dtype=torch.int64)
    mask_BR, logprobs_BR = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    for row, response in enumerate(drawn):
        length = len(response["tokens"])
        tokens_BR[row, :length] = torch.tensor(response["tokens"])
        logprobs_BR[row, :length] = torch.tensor(response["logprobs"])
        mask_BR[row, :length] = True
    reasons: list[StopReason] = ["stop" if response["reason"] == "stop" else "length" for response in drawn]
    return Sampled(tokens_BR.to(device), mask_BR.to(device), logprobs_BR.to(device), tuple(reasons), version)
