"""Rates of this machine: where they are kept, which machine they are of, and the times that follow from them."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.session import local_nodes
from launch.capacity.calibration import FORMAT, calibrated_rates, calibration_file, machine_of, process_bytes_of
from launch.capacity.workers import Workers, hardware_of
from launch.checks.memory import Room
from recipes.planning.cost import Rates
from recipes.planning.memory import Memory, Sizes
from recipes.planning.settle import PROCESS_BYTES
from tests.unit.launch.bench import Bench

RATES = {
    "products": {"fp32": 130e9, "bf16": 900e9},
    "training": {"fp32": {"64": 50e9, "256": 100e9}, "bf16": {"64": 60e9, "256": 180e9}},
    "adapters": {"fp32": {"64": 40e9, "256": 80e9}, "bf16": {"64": 50e9, "256": 90e9}},
    "convolutions": {"fp32": 80e9, "bf16": 160e9},
    "bytes_per_s": 16e9,
    "layer_s": 0.001,
    "writing": 30e9,
}


def keep(machine: dict[str, Any], **further: Any) -> None:
    """Write a calibration of a machine."""
    record = {"measured_at": "2026-11-30T12:00:00+00:00", "machine": machine, "rates": {**RATES, **further}}
    calibration_file().parent.mkdir(parents=True)
    calibration_file().write_text(json.dumps({"format": FORMAT, "machines": [record]}))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_rates_between_two_widths() -> None:
    rates = Rates({"fp32": [(64, 50.0), (256, 100.0)]}, 1.0, "", {"fp32": [(64, 40.0)]}, {"fp32": 80.0})
    assert [rates.training("fp32", width) for width in (8, 64, 128, 256, 4096)] == [50, 50, 75, 100, 100]
    assert rates.training("fp32", 64, is_adapted=True) == 40
    assert rates.training("fp32", None) == 80


def test_a_plan_of_this_machine_tells_times(call: Any, bench: Bench, recipe: Path) -> None:
    arguments = ("plan", str(recipe), "--set", "cluster.workers=1", "--store", bench.store.uri)
    _, out, _ = call(*arguments)
    assert "time: not known: `trainwright doctor --calibrate` measures this machine" in out
    keep(machine_of(local_nodes()[0]))
    _, out, _ = call(*arguments)
    assert "at 2026-11-30T12:00:00+00:00: fp32 50 to 100 GFLOP/s in training (130 peak)" in out
    code, out, _ = call(*arguments, "--json")
    base = json.loads(out)["stages"][0]
    speed = 50e9 if base["precision"] == "fp32" else 60e9
    updates = 4 * base["sizes"]["trainable_parameters"] * 28 / 16e9
    assert code == 0
    assert base["cost"]["seconds"] == pytest.approx(sum(base["cost"]["flops"].values()) / speed + updates)


def test_another_machine_s_rates_are_not_taken() -> None:
    node = local_nodes()[0]
    keep({**machine_of(node), "host": "elsewhere"})
    assert calibrated_rates(node) is None


def test_what_a_process_takes_is_what_was_measured() -> None:
    nodes = local_nodes()
    assert process_bytes_of(nodes) == PROCESS_BYTES
    keep(machine_of(nodes[0]), process_bytes=123 << 20)
    assert process_bytes_of(nodes) == hardware_of(nodes, Workers(1, 0)).process_bytes == 123 << 20
    sizes = Sizes(1, 1, Memory(weights=1000), 0, 0, 24)
    assert Room(nodes, on_gpu=False).needed(sizes) == 1024 + (123 << 20)
    assert process_bytes_of([*nodes, *nodes]) == PROCESS_BYTES, "other machines were not measured"


@pytest.mark.long
@pytest.mark.serial
def test_doctor_measures_this_machine(call: Any) -> None:
    _, out, _ = call("doctor", "--calibrate")
    assert "calibration: measured on" in out
    rates = calibrated_rates(local_nodes()[0])
    assert rates is not None
    assert 0 < rates.training("fp32", 64) < rates.training("fp32", 768)
    assert 100 << 20 < process_bytes_of(local_nodes()) < 1 << 30
