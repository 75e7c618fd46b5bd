"""Inline SVG for the report: line charts and the lineage graph; pure functions of their data."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 26
MAX_POINTS = 300


@dataclass(frozen=True)
class Series:
    """One line of a chart; `color` is an index into the page's palette."""

    name: str
    points: Points
    color: int = 0


def thin(points: Points, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most about `limit` points that keep every bucket's smallest and largest value."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        low, high = min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])
        kept.extend(sorted({low, high}))
    return kept


def smooth(points: Points, share: float = 0.06) -> list[tuple[float, float]]:
    """Exponential moving average whose time constant is a share of the curve, started without bias."""
    keep = 1 - 1 / max(1.0, share * len(points))
    total = weight = 0.0
    line = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        line.append((x, total / weight))
    return line


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A short, readable number."""
    if not math.isfinite(value):
        return "-"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.4g}"


def line_chart(title: str, series: Sequence[Series], x_name: str = "step") -> str:
    """A titled chart of one or more curves over a common x axis; points that are not finite are left out."""
    lines = [Series(s.name, [p for p in s.points if math.isfinite(p[1])], s.color) for s in series]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    margin = (y_high - y_low) * 0.06 or abs(y_high) * 0.1 or 1.0
    y_low, y_high = y_low - margin, y_high + margin
    x_span = (x_high - x_low) or 1.0

    def at(x: float, y: float) -> str:
        px = LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT)
        py = HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return f"{px:.1f},{py:.1f}"

    parts = []
    for y in ticks(y_low, y_high):
        x0, py = at(x_low, y).split(",")
        parts.append(f'<line class="grid" x1="{x0}" x2="{WIDTH - RIGHT}" y1="{py}" y2="{py}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py}" dy="3.5" text-anchor="end">{number(y)}</text>')
    for x in ticks(x_low, x_high, 5):
        px = at(x, y_low).split(",")[0]
        parts.append(f'<text x="{px}" y="{HEIGHT - 8}" text-anchor="middle">{number(x)}</text>')
    for line in lines:
        noisy = len(line.points) >= 40
        raw = " ".join(at(x, y) for x, y in thin(line.points))
        if len(line.points) == 1:
            px, py = raw.split(",")
            parts.append(f'<circle class="dot c{line.color}" cx="{px}" cy="{py}" r="3.5"/>')
            continue
        parts.append(f'<polyline class="curve c{line.color}{" faint" if noisy else ""}" points="{raw}"/>')
        if noisy:
            even = " ".join(at(x, y) for x, y in thin(smooth(line.points)))
            parts.append(f'<polyline class="curve c{line.color}" points="{even}"/>')
        px, py = at(*line.points[-1]).split(",")
        parts.append(f'<circle class="dot c{line.color}" cx="{px}" cy="{py}" r="2.8"/>')
    legend = "".join(
        f'<span class="key c{line.color}">{escape(line.name)} <b>{number(line.points[-1][1])}</b></span>'
        for line in lines
    )
    label = f"{title} over {x_name}, last value {number(lines[0].points[-1][1])}"
    return (
        f'<figure class="chart"><figcaption><span>{escape(title)}</span><span class="keys">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg></figure>'
    )


@dataclass(frozen=True)
class Node:
    """A box of the lineage graph."""

    name: str
    caption: str
    state: str
    parents: tuple[str, ...] = ()


def depth_of(nodes: Mapping[str, Node]) -> dict[str, int]:
    """The column of every node: one more than its furthest parent's."""
    depths: dict[str, int] = {}

    def visit(name: str) -> int:
        if name not in depths:
            depths[name] = 1 + max((visit(parent) for parent in nodes[name].parents if parent in nodes), default=-1)
        return depths[name]

    for name in nodes:
        visit(name)
    return depths


BOX_W, BOX_H, GAP_X, GAP_Y, LANE = 150, 46, 62, 20, 14


def lineage_graph(nodes: Sequence[Node]) -> str:
    """Boxes from left to right, an arrow from what was used to what was made of it.

    An arrow over several columns that would run through a box takes a lane below all boxes.
    """
    by_name = {node.name: node for node in nodes}
    depths = depth_of(by_name)
    columns: dict[int, list[Node]] = {}
    for node in nodes:
        columns.setdefault(depths[node.name], []).append(node)
    rows = max(map(len, columns.values()), default=1)
    width, height = len(columns) * (BOX_W + GAP_X) - GAP_X + 4, rows * (BOX_H + GAP_Y) - GAP_Y + 4
    where: dict[str, tuple[float, float]] = {}
    for column, members in columns.items():
        used = len(members) * (BOX_H + GAP_Y) - GAP_Y
        for row, node in enumerate(members):
            where[node.name] = (2 + column * (BOX_W + GAP_X), (height - used) / 2 + row * (BOX_H + GAP_Y))
    parts = []
    num_lanes = 0
    for node in nodes:
        for parent in dict.fromkeys(node.parents):
            if parent in where:
                lane = None
                if _runs_through(where[parent], where[node.name], where.values()):
                    num_lanes += 1
                    lane = height + num_lanes * LANE
                path = _edge(where[parent], where[node.name], lane)
                parts.append(f'<path class="edge" marker-end="url(#arrow)" d="{path}"/>')
    for node in nodes:
        x, y = where[node.name]
        middle = x + BOX_W / 2
        parts.append(
            f'<g class="node {escape(node.state)}" text-anchor="middle">'
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX_W}" height="{BOX_H}" rx="9"/>'
            f'<text class="name" x="{middle:.0f}" y="{y + 20:.0f}">{escape(node.name[:20])}</text>'
            f'<text x="{middle:.0f}" y="{y + 35:.0f}">{escape(node.caption[:26])}</text></g>'
        )
    arrow = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0,0 L8,4 L0,8 z"/></marker></defs>'
    )
    full_height = height + (num_lanes + 0.5) * LANE if num_lanes else height
    return (
        f'<svg class="lineage" viewBox="0 0 {width:.0f} {full_height:.0f}" style="max-width:{width:.0f}px" role="img" '
        f'aria-label="lineage of the run\'s artifacts">{arrow}{"".join(parts)}</svg>'
    )


def _runs_through(start: tuple[float, float], end: tuple[float, float], boxes: Iterable[tuple[float, float]]) -> bool:
    """Whether the straight way between two boxes crosses another."""
    (x0, y0), (x1, y1) = start, end
    return any(x0 < x < x1 and abs(y0 + (y1 - y0) * (x - x0) / (x1 - x0) - y) < BOX_H / 2 + GAP_Y / 2 for x, y in boxes)


def _edge(start: tuple[float, float], end: tuple[float, float], lane: float | None) -> str:
    """The path of an arrow from the right side of one box to the left side of another."""
    px, py = start[0] + BOX_W, start[1] + BOX_H / 2
    x, y = end[0] - 4, end[1] + BOX_H / 2
    if lane is None:
        bend = GAP_X / 2
        return f"M{px:.0f},{py:.0f} C{px + bend:.0f},{py:.0f} {x - bend:.0f},{y:.0f} {x:.0f},{y:.0f}"
    down, up = px + GAP_X * 0.8, x - GAP_X * 0.8
    return (
        f"M{px:.0f},{py:.0f} C{px + 34:.0f},{py:.0f} {px + 14:.0f},{lane:.0f} {down:.0f},{lane:.0f} "
        f"L{up:.0f},{lane:.0f} C{x - 14:.0f},{lane:.0f} {x - 34:.0f},{y:.0f} {x:.0f},{y:.0f}"
    )
