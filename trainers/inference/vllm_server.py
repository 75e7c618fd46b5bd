"""vLLM as a process: it samples, takes weights over, and says by digest which it holds.

It runs in vLLM's own environment, where nothing of Trainwright is installed, and is spoken to in lines of JSON over the
socket that it is started with. Every request is answered by one line, `{"ok": ...}` or `{"error": ...}`; sampling says
in lines before that how far it is. It ends with the process that started it.

Weights are used only once they are committed: until its holder has compared digests, no prompt is answered.
"""

import ctypes
import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

PROGRESS_S = 0.5
"""Sampling says this often how far it is."""
_PR_SET_PDEATHSIG = 1
_BEFORE_MODULES = "base_model.model."
"""What all names in an adapter's file start with."""


class Held:
    """What vLLM's worker answers about its weights; vLLM makes it a base class of the worker."""

    model_runner: Any

    def held_weights(self, shapes: Mapping[str, list[int]]) -> dict[str, Any]:
        """Digests of the model's tensors by their names in files, and parameters that come from none of these.

        vLLM keeps some tensors of a file below each other in one parameter; its rows are distinguished by their shapes.
        """
        model = self.model_runner.get_model()
        packed = getattr(model, "packed_modules_mapping", {})
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        mapped = {name: mapper.get_rename_mapper().apply_list([name])[0] if mapper else name for name in shapes}
        in_files = {new: old for old, new in mapped.items()}
        digests: dict[str, str] = {}
        unknown: list[str] = []
        for name, parameter in model.named_parameters():
            sources = [in_files.get(part) for part in _parts(name.replace(".base_layer.", "."), packed, in_files)]
            start = 0
            for source in sources:
                if source is None or list(parameter.shape[1:]) != shapes[source][1:]:
                    unknown.append(name)
                    break
                stop = start + (shapes[source][0] if shapes[source] else 1)
                digests[source] = digest(parameter.data[start:stop])
                start = stop
        return {"digests": digests, "unknown": unknown}

    def held_adapter(self, number: int, shapes: Mapping[str, list[int]]) -> dict[str, Any]:
        """Digests of an adapter's tensors as the model multiplies by them, by their names in files."""
        manager = self.model_runner.lora_manager._adapter_manager
        slot = manager.lora_index_to_id.index(number)
        digests: dict[str, str] = {}
        for name, (rows, columns) in shapes.items():
            module, _, factor = name.removeprefix(_BEFORE_MODULES).rpartition(".lora_")
            found = _adapted_layer(manager, module)
            if found is not None:
                layer, place = found
                stacked = (layer.lora_a_stacked if factor.startswith("A") else layer.lora_b_stacked)[place]
                digests[name] = digest(stacked[slot, 0, :rows, :columns])
        return {"digests": digests, "unknown": []}


def _parts(name: str, packed: Mapping[str, list[str]], known: Mapping[str, str]) -> list[str]:
    """Names of the tensors in a parameter, in the order of their rows."""
    if name not in known:
        for whole, parts in packed.items():
            if f".{whole}." in name:
                return [name.replace(f".{whole}.", f".{part}.") for part in parts]
    return [name]


def _adapted_layer(manager: Any, module: str) -> tuple[Any, int] | None:
    """The layer that holds a module's adapter, and the module's place in it; None: no layer does."""
    if module in manager.modules:
        return manager.modules[module], 0
    parent, _, child = module.rpartition(".")
    for whole, parts in manager.packed_modules_mapping.items():
        if child in parts and f"{parent}.{whole}" in manager.modules:
            return manager.modules[f"{parent}.{whole}"], parts.index(child)
    return None


def digest(tensor: Any) -> str:
    """SHA-256 of a tensor's values, row by row."""
    import torch

    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


class Server:
    """One model in vLLM, and the requests about it."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._adapter: Any = None
        self._committed: str | None = None

    def open(self, folder: str, lora_rank: int | None, **settings: Any) -> dict[str, Any]:
        """Open the model in a folder; its weights are not committed."""
        import torch

        if not torch.cuda.is_available():
            os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else the first answer waits for a compiler of C++
            _keep_weights_plain()
        import vllm

        lora = {} if lora_rank is None else {"enable_lora": True, "max_lora_rank": lora_rank, "max_loras": 1}
        self._llm = vllm.LLM(
            folder,
            worker_extension_cls="__main__.Held",
            skip_tokenizer_init=True,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            enforce_eager=not torch.cuda.is_available(),
            disable_log_stats=True,
            seed=0,
            **lora,
            **settings,
        )
        return {"vllm": vllm.__version__}

    def held(self, shapes: Mapping[str, list[int]]) -> Any:
        """See `Held.held_weights`."""
        return self._llm.collective_rpc("held_weights", args=(shapes,))[0]

    def load(self, folder: str, shapes: Mapping[str, list[int]]) -> Any:
        """Take over the weights in a folder and say which are held now; they are not committed."""
        self._committed = None
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        return self.held(shapes)

    def load_adapter(self, folder: str, number: int, shapes: Mapping[str, list[int]]) -> Any:
        """Take over an adapter under a number that no other had, and say what is held of it; it is not committed."""
        from vllm.lora.request import LoRARequest

        self._committed = None
        engine, before = self._llm.llm_engine, self._adapter
        self._adapter = LoRARequest(f"adapter-{number}", number, folder)
        if before is not None:
            engine.remove_lora(before.lora_int_id)
        engine.add_lora(self._adapter)
        return self._llm.collective_rpc("held_adapter", args=(number, shapes))[0]

    def commit(self, version: str) -> dict[str, Any]:
        """From now on answer prompts by the weights that are held; what was cached of others is forgotten."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM does not forget its cached prefixes")
        self._llm.llm_engine.set_weight_version(version)
        self._committed = version
        return {}

    def generate(self, version: str, requests: list[dict[str, Any]], sampling: Mapping[str, Any]) -> Iterator[Any]:
        """Yield how many of the requests are done, and in the end tokens, log-probabilities and reasons of all.

        A request is `{"prompt": token ids, "seed": int}`.
        """
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        if version != self._committed:
            raise RuntimeError(f"asked for answers by weights {version}; committed are {self._committed}")
        engine, drawn, said_at = self._llm.llm_engine, {}, time.monotonic()
        for number, request in enumerate(requests):
            params = SamplingParams(
                seed=request["seed"],
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                **sampling,
            )
            prompt = tokens_input(request["prompt"])
            engine.add_request(str(number), prompt, params, lora_request=self._adapter)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    drawn[int(output.request_id)] = _answer(output, version)
            if time.monotonic() - said_at > PROGRESS_S:
                said_at = time.monotonic()
                yield len(drawn)
        yield [drawn[number] for number in range(len(requests))]


def _answer(output: Any, version: str) -> dict[str, Any]:
    """A response with the log-probability of each of its tokens."""
    (response,) = output.outputs
    spans = {span.version for span in response.weight_versions or ()}
    if spans - {version}:
        raise RuntimeError(f"a response by weights {sorted(spans)}; committed are {version}")
    tokens = list(response.token_ids)
    logprobs = [given[token].logprob for token, given in zip(tokens, response.logprobs, strict=True)]
    return {"tokens": tokens, "logprobs": logprobs, "reason": response.finish_reason}


def _keep_weights_plain() -> None:
    """Multiply by the very weights that are held: on CPUs vLLM repacks them and throws them away otherwise."""
    import torch
    from vllm.model_executor.layers import utils

    def dispatch(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = dispatch


def serve(connection: socket.socket) -> None:
    """Answer requests until the other side is gone."""
    server, lines = Server(), connection.makefile("rb")

    def send(message: Mapping[str, Any]) -> None:
        connection.sendall(json.dumps(message).encode() + b"\n")

    for line in lines:
        request = json.loads(line)
        try:
            answer = getattr(server, request.pop("op"))(**request)
            if isinstance(answer, Iterator):
                for last in answer:
                    if isinstance(last, int):
                        send({"done": last})
                    else:
                        answer = last
            send({"ok": answer})
        except OSError:
            raise
        except Exception as error:
            import traceback

            traceback.print_exc()
            send({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    """Serve the socket whose descriptor is the only argument."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1:
        return
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
