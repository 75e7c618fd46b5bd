"""Holding resources for a group: feasible at all? then a placement group, a deadline, the names of holders."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from cluster.topology import Node, Refusal, Request, fit
from recipes.errors import CapacityError, Preempted

PATIENCE_S = 1  # Ray takes whole seconds
NODE_LABEL = "ray.io/node-id"


@dataclass(frozen=True, slots=True)
class Reservation:
    """One bundle per worker, held until `release`."""

    group: PlacementGroup
    node_of_bundle: dict[int, str]

    def release(self) -> None:
        """Gives the resources back; whatever still runs in the bundles is killed by Ray."""
        with contextlib.suppress(Exception):  # the cluster may be gone already
            remove_placement_group(self.group)


def reserve(
    request: Request,
    nodes: Callable[[], Sequence[Node]],
    name: str,
    timeout_s: float,
    on_wait: Callable[[str], None] = lambda text: None,
    is_cancelled: Callable[[], bool] = lambda: False,
    avoided: Sequence[str] = (),
) -> Reservation:
    """Reserves the request, on none of the nodes with the `avoided` ids, which Ray has not given up yet.

    Raises `CapacityError`, at once if it can never be, at the deadline if others hold it; `Preempted` when cancelled.
    """
    present = nodes()
    possible = fit(request, present)
    if isinstance(possible, Refusal):
        raise CapacityError(possible.reason)
    bundle = {"CPU": request.cpus_per_worker, "GPU": float(request.gpus_per_worker)}
    group = placement_group(
        [{key: amount for key, amount in bundle.items() if amount} for _ in range(request.num_workers)],
        strategy="STRICT_PACK" if request.same_node else "PACK",
        name=name,
        bundle_label_selector=[{NODE_LABEL: f"!in({','.join(avoided)})"}] * request.num_workers if avoided else None,
    )
    deadline = time.monotonic() + timeout_s
    told = ""
    try:
        while not group.wait(timeout_seconds=PATIENCE_S):
            if is_cancelled():
                raise Preempted("stopped while it waited for resources")
            present = nodes()
            lost = fit(request, present)
            if isinstance(lost, Refusal):
                raise CapacityError(lost.reason)
            short = fit(request, present, free=True)
            reason = short.reason if isinstance(short, Refusal) else "room, but Ray has not placed it"
            holding = f"{reason}; held by {', '.join(holders(name)) or 'work that Ray does not name'}"
            if holding != told:
                told = holding
                on_wait(f"waiting for resources: {holding}")
            if time.monotonic() >= deadline:
                raise CapacityError(f"{holding}; gave up after {timeout_s:g} s")
        table: dict[str, Any] = placement_group_table(group)
        places = {int(index): str(node) for index, node in table["bundles_to_node_id"].items()}
    except BaseException:
        remove_placement_group(group)
        raise
    if told:
        on_wait("")
    return Reservation(group, places)


def holders(but: str = "") -> list[str]:
    """Who holds resources: placement groups by name, then actors outside of any."""
    found = []
    groups: dict[str, dict[str, Any]] = placement_group_table()
    for entry in groups.values():
        if entry["state"] == "CREATED" and entry["name"] != but:
            total: dict[str, float] = {}
            for bundle in entry["bundles"].values():
                for key, amount in bundle.items():
                    total[key] = total.get(key, 0.0) + amount
            amounts = " and ".join(
                f"{amount:g} {key}" for key, amount in sorted(total.items()) if key in ("CPU", "GPU")
            )
            label = f"'{entry['name']}'" if entry["name"] else f"placement group {entry['placement_group_id'][:8]}"
            found.append(f"{label} ({amounts})" if amounts else label)
    return sorted([*found, *_actors_outside_groups()])


def _actors_outside_groups() -> list[str]:
    found = []
    with contextlib.suppress(Exception):  # a private view of Ray's: its absence costs a name in a message
        actors: dict[str, dict[str, Any]] = ray._private.state.actors()
        for entry in actors.values():
            resources = entry.get("RequiredResources") or {}
            amounts = [f"{resources[key]:g} {key}" for key in ("CPU", "GPU") if resources.get(key)]
            if entry.get("State") == "ALIVE" and amounts and not any("_group_" in key for key in resources):
                label = entry.get("Name") or entry.get("ActorClassName") or entry["ActorID"][:8]
                found.append(f"actor {label} of job {entry['JobID']} ({' and '.join(amounts)})")
    return found
