"""The report page: what it holds, and that it needs nothing from outside."""

import math
import re
from html.parser import HTMLParser

import pytest

from launch.report.charts import Node, Series, depth_of, line_chart, lineage_graph, smooth, thin, ticks
from launch.report.page import (
    RunReport,
    StageReport,
    curves_of,
    grids_of_models,
    grids_over_training,
    metric_table,
    render,
    side_by_side,
    stage_charts,
)


class Wellformed(HTMLParser):
    VOID = ("meta", "img", "line", "polyline", "circle", "path", "rect", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def check(html: str) -> None:
    parser = Wellformed()
    parser.feed(html)
    assert parser.open == []


def test_a_resumed_attempt_replaces_the_steps_that_it_repeats() -> None:
    records = [
        {"step": 1, "values": {"loss": 3.0}},
        {"step": 2, "values": {"loss": 9.0}},
        {"step": 2, "values": {"loss": 2.0, "held": {"out": 1.5}}},
    ]
    assert curves_of(records) == {"loss": [(1, 3.0), (2, 2.0)], "held.out": [(2, 1.5)]}


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(0, 10) == pytest.approx([0, 2.5, 5, 7.5, 10])
    assert ticks(0.13, 0.52) == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert ticks(3, 3) == [3]


def test_thinning_keeps_the_extremes() -> None:
    points = [(x, math.sin(x)) for x in range(5000)]
    points[1234] = (1234, 50.0)
    kept = thin(points)
    assert len(kept) <= 310
    assert (1234, 50.0) in kept


def test_smoothing_of_a_constant_is_the_constant() -> None:
    assert [y for _, y in smooth([(x, 4.0) for x in range(100)])] == pytest.approx([4.0] * 100)


def test_points_that_are_not_finite_leave_a_chart_readable() -> None:
    chart = line_chart("loss", [Series("loss", [(1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0)])])
    assert "nan" not in chart
    assert "inf" not in chart
    check(chart)


def test_held_out_lies_over_its_training_curve_and_loss_comes_first() -> None:
    shown, folded = stage_charts(
        {"grad_norm": [(1, 1), (2, 2)], "eval/loss": [(2, 2)], "loss": [(1, 3), (2, 2)]}, ("loss",)
    )
    assert len(shown) == len(folded) == 1
    assert "held out" in shown[0]
    assert "grad norm" in folded[0]
    assert stage_charts({"policy.win_rate": [(0, 0.5)]}, ()) == ([], [])


def test_lineage_columns_follow_the_parents() -> None:
    nodes = [
        Node("base", "", "cached"),
        Node("chat", "", "committed", ("base",)),
        Node("eval", "", "failed", ("base", "chat")),
    ]
    assert depth_of({node.name: node for node in nodes}) == {"base": 0, "chat": 1, "eval": 2}
    check(lineage_graph(nodes))


def test_metrics_of_models_become_columns() -> None:
    table = metric_table({"chat": {"score": 0.5}, "policy": {"score": 1.5, "win_rate": 0.7}, "prompts": 200}, ())
    assert re.search(r"<th>chat</th><th>policy</th>", table)
    assert re.search(r"score</td><td class=\"num\">0.5</td><td class=\"num\">1.5</td>", table)
    assert "200" in table


def test_the_truth_stands_first_noise_last_and_a_reward_that_prefers_noise_is_called_out() -> None:
    metrics = {
        "policy.win_rate_judge": 0.8,
        "random_tokens.beats_truth_judge": 0.64,
        "random_tokens.win_rate_judge": 0.9,
        "truth.win_rate_judge": 0.7,
    }
    table = metric_table(metrics, ())
    assert re.search("<th>truth</th><th>policy</th><th>random_tokens</th>", table)
    assert re.search('class="warning">judge .*64%', table)
    assert "warning" not in metric_table({**metrics, "random_tokens.beats_truth_judge": 0.2}, ())


def test_answers_stand_side_by_side_and_the_best_is_marked() -> None:
    html = side_by_side(
        [
            {"prompt": "p<1>", "model": "chat", "response": "a", "score": 0.1},
            {"prompt": "p<1>", "model": "policy", "response": "b", "score": 0.9},
        ]
    )
    assert "p&lt;1&gt;" in html
    assert html.index("chat") < html.index("answer best") < html.index("policy")
    check(html)


def test_the_page_is_whole_escaped_and_self_contained() -> None:
    stage = StageReport(
        name="base",
        kind="pretrain",
        state="committed",
        parents=["store://x"],
        fingerprint="f" * 64,
        seconds=61,
        curves={"loss": [(1, 3.0), (2, 2.0)]},
        samples=[{"step": 1, "prompt": "</script><b>", "response": "r"}],
        manifest={
            "gate": {"passed": False, "reasons": ["accuracy 0.4 < 0.55"]},
            "metrics": {"held_out_loss": 2.0},
            "files": {"model/config.json": {"sha256": "0", "bytes": 2048}},
            "outcome": {"state": "stopped_by", "rule": "kl_limit", "steps_done": 3, "steps_planned": 10},
            "verification": {"how": "clean-process", "max_logit_difference": 1e-7},
        },
        builds={"data": {"rows_in": 10, "kept": 8, "dropped": {"empty": 2}}},
    )
    failed = StageReport(name="chat", kind="finetune", state="failed", parents=["base"], error="<boom>")
    page = render(RunReport("r-1", "demo", "failed", [stage, failed], "name: demo\n", message="it <failed>"))
    check(page)
    assert "</script>" not in page
    assert "&lt;boom&gt;" in page
    assert "accuracy 0.4 &lt; 0.55" in page
    assert "stopped by kl_limit" in page
    assert not re.search(r"(src|href)=[\"'](?!#)", page)
    assert "http" not in page
    assert "prefers-color-scheme:dark" in page


def _grid(step: int, name: str = "png", **more: str) -> dict[str, object]:
    return {"step": step, "image": f"data:image/{name};base64,AAAA{step}", **more}


def test_grids_stand_in_the_order_of_training_and_the_last_is_there() -> None:
    samples = [_grid(step) for step in range(100, 1100, 100)] + [_grid(300)]
    html = grids_over_training(samples)
    shown = [int(part.split('"')[0]) for part in html.split("AAAA")[1:]]
    assert shown == sorted(shown)
    assert len(shown) == 6
    assert shown[0] == 100
    assert shown[-1] == 1000


def test_only_embedded_png_images_get_into_the_page() -> None:
    assert grids_over_training([_grid(1, "svg+xml"), {"step": 2, "image": "https://elsewhere/x.png"}]) == ""
    assert "elsewhere" not in grids_of_models([{"model": "m", "image": "https://elsewhere/x.png"}])
    html = grids_of_models([_grid(0, model="<b>")])
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
