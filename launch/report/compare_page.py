"""The page of a comparison: figures, differences drawn to scale, and the rows that changed, with both answers.

It refers to nothing outside of it and has no script.
"""

from collections.abc import Iterator
from functools import cache
from html import escape
from importlib.resources import files

from launch.report.compare import LEVEL, Comparison, Figure, Row, interval

MOST_ROWS = 100
"""Of a figure that are shown, each way."""
WIDTH, HEIGHT = 160, 22


def compare_page(found: Comparison) -> str:
    """The whole page."""
    first, *others = found.models
    title = f"{', '.join(dict.fromkeys(others))} against {first}"
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    tests = sum(figure.is_judged for figure in found.figures)
    facts = (
        f"Figures with 95 % intervals, differences on the same rows. Marked where p &lt; {LEVEL}: of {tests} tests "
        f"{LEVEL * tests:.1f} would be by chance. Shares are tested by McNemar's exact test, other figures by a paired "
        "bootstrap."
    )
    apart = "".join(f'<p class="soft">not compared: {escape(text)}</p>' for text in found.apart)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{_style()}</style></head><body><main><h1>{escape(title)}</h1>"
        f'<p class="soft">{facts}</p>{apart}{_table(found)}{"".join(_changed(found))}</main></body></html>\n'
    )


@cache
def _style() -> str:
    return files("launch.report").joinpath("page.css").read_text(encoding="utf-8") + "td{white-space:nowrap}"


def _table(found: Comparison) -> str:
    scales: dict[str, float] = {}
    for figure in found.figures:
        furthest = max(abs(figure.difference.low), abs(figure.difference.high))
        scales[_scale(figure)] = max(scales.get(_scale(figure), 1e-9), furthest)
    rows = "".join(_line(figure, scales[_scale(figure)]) for figure in found.figures)
    heads = ("figure", "rows", found.models[0], "model", "", "difference", "", "p", "")
    return (
        f'<div class="card"><table><tr>{"".join(f"<th>{escape(head)}</th>" for head in heads)}</tr>{rows}</table></div>'
    )


def _scale(figure: Figure) -> str:
    """Figures that are drawn to one scale: all shares, else a benchmark's own."""
    return "" if 0 <= min(figure.first[1], figure.own[1]) <= max(figure.first[2], figure.own[2]) <= 1 else figure.name


def _line(figure: Figure, scale: float) -> str:
    kind = {"worse": "bad", "better": "ok"}.get(figure.verdict, "")
    badge = f'<span class="badge {kind}">{figure.verdict}</span>' if kind else ""
    cells = (
        escape(figure.name), str(figure.rows), interval(figure.first), escape(figure.model), interval(figure.own),
        interval(figure.difference[:3], signed=True), _bar(figure, scale, kind), f"{figure.difference.p:.2g}", badge,
    )  # fmt: skip
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _bar(figure: Figure, scale: float, kind: str) -> str:
    """The difference and its interval around 0."""
    middle, y = WIDTH / 2, HEIGHT / 2

    def at(value: float) -> str:
        return f"{middle + value / scale * (middle - 8):.1f}"

    color = {"bad": "var(--bad)", "ok": "var(--ok)"}.get(kind, "var(--c5)")
    low, high, said = (
        at(figure.difference.low),
        at(figure.difference.high),
        interval(figure.difference[:3], signed=True),
    )
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{said}">'
        f'<line x1="{middle}" x2="{middle}" y1="0" y2="{HEIGHT}" stroke="var(--line)"/>'
        f'<line x1="{low}" x2="{high}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="2"/>'
        f'<circle cx="{at(figure.difference.mean)}" cy="{y}" r="4" fill="{color}"/></svg>'
    )


def _changed(found: Comparison) -> Iterator[str]:
    yield "<h2>Rows that changed</h2>"
    for figure in found.figures:
        lost = [rows for rows in figure.changed if figure.step(rows) < 0]
        gained = [rows for rows in reversed(figure.changed) if figure.step(rows) > 0]
        for word, rows in (("lost", lost), ("gained", gained)):
            if rows:
                shown = "" if len(rows) <= MOST_ROWS else f", the first {MOST_ROWS}"
                title = f"{figure.name}: {len(rows)} {word} by {figure.model}{shown}"
                samples = "".join(_sample(figure, found.models[0], *pair) for pair in rows[:MOST_ROWS])
                yield f"<details><summary>{escape(title)}</summary>{samples}</details>"


def _sample(figure: Figure, first: str, before: Row, after: Row) -> str:
    prompt = f"{before['id']}\n{before['question']}\n→ {before['answer']}"
    answers = "".join(
        f'<div class="answer"><div class="who"><b>{escape(name)}</b>'
        f"<span>{row['values'][figure.metric]:.4g}</span></div>{escape(row['said'])}</div>"
        for name, row in ((first, before), (figure.model, after))
    )
    return f'<div class="sample"><div class="prompt">{escape(prompt)}</div><div class="answers">{answers}</div></div>'
