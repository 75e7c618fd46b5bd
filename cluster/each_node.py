"""One question to every node of a connected cluster."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.rank import find_target
from cluster.topology import Node


def ask_each_node(nodes: Sequence[Node], target: str, payload: Any, timeout_s: float) -> dict[str, Any]:
    """Call "module:function" with a payload on every node; its answer by the node's address, or in words why none.

    Answers and payload are JSON-able and no answer is text, so that the two cannot be confused.
    """
    calls = {
        _address(node, nodes): ray.remote(_call)
        .options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
        .remote(target, payload)
        for node in nodes
    }
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s)
    return {address: answer_of(call, timeout_s) for address, call in calls.items()}


def _address(node: Node, nodes: Sequence[Node]) -> str:
    """A node's address; of several raylets on one machine also the start of the id."""
    is_shared = sum(other.address == node.address for other in nodes) > 1
    return f"{node.address} ({node.id[:8]})" if is_shared else node.address


def _call(target: str, payload: Any) -> Any:
    return find_target(target)(payload)


def answer_of(call: Any, timeout_s: float) -> Any:
    """What a call that was waited for has returned, or in words why nothing."""
    try:
        return ray.get(call, timeout=0)
    except GetTimeoutError:
        # Taken when it comes: Ray prints an error that nobody took, such as that of a call cut off by the driver's end.
        call.future().add_done_callback(Future.exception)
        return f"no answer within {timeout_s:.0f} s"
    except RayError as error:
        return str(error).strip().splitlines()[-1]
