"""A self-contained page with rows as they will be trained on, made of `data_view`'s findings."""

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import islice

from launch.checks.data_view import ShownRow, Side, SourceView
from trainers.data.dataset import NUM_EXAMPLES

_STYLE = """
.tokens{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:13px;white-space:pre-wrap;word-break:break-word}
.tokens span{border-right:1px solid var(--line)}.tokens .target{background:var(--new);color:var(--ok)}
"""


def data_page(recipe: str, views: Sequence[SourceView]) -> str:
    """Render the page; targets are marked, a token's id shows where the pointer rests on it."""
    style = (files("launch.report") / "page.css").read_text(encoding="utf-8") + _STYLE
    body = "".join(piece for view in views for piece in _source(view)) or "<p>No rows of text to show.</p>"
    title = f"Data of {escape(recipe)}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<main><h1>{title}</h1>"
        '<p class="soft">Tokens that are learnt are <span class="tokens"><span class="target">marked</span></span>.</p>'
        f"{body}</main></html>"
    )


def summary(view: SourceView) -> list[str]:
    """Say what becomes of a source's first rows, in sentences."""
    report = view.report
    said = [f"{view.rows_in:,} rows read as {view.role}, template: {view.template}, tokenizer: {view.tokenizer}"]
    if forms := report.get("forms"):
        said.append("recognised as " + ", ".join(f"{name} ({count:,} rows)" for name, count in forms.items()))
    if unread := report.get("unread"):
        said.append("not read: " + ", ".join(f"{name} ({count:,} rows)" for name, count in unread.items()))
    if truncated := report.get("truncated"):
        said.append(f"truncated: {truncated:,} rows")
    for kind, word in (("filtered", "left out by filters"), ("dropped", "dropped")):
        for reason, count in report.get(kind, {}).items():
            examples = ", ".join(islice(view.lost[reason], NUM_EXAMPLES))
            said.append(f"{word} ({reason}): {count:,} rows, for example {examples}")
    return said


def _source(view: SourceView) -> Iterator[str]:
    yield f"<h2>{escape(view.stage)}.{escape(view.field)}</h2>"
    yield "".join(f"<p>{escape(text)}</p>" for text in summary(view))
    for row in view.rows:
        yield from _row(row)
    for reason, rows in view.lost.items():
        yield f"<h3>Dropped: {escape(reason)}</h3>"
        yield "".join(
            f'<div class="card"><p class="soft">{escape(name)}</p><div class="tokens">{escape(held)}</div></div>'
            for name, held in rows.items()
        )


def _row(row: ShownRow) -> Iterator[str]:
    yield f"<h3>{escape(row.row)}</h3>"
    for side in row.sides:
        yield f'<div class="card"><p class="soft">{escape(counts(side))}</p><div class="tokens">'
        for token in side.tokens:
            kind = ' class="target"' if token.is_target else ""
            yield f'<span{kind} title="{token.id}">{escape(token.text)}</span>'
        yield "</div></div>"
    if row.label is not None:
        yield f"<p>label: {escape(row.label)}</p>"


def counts(side: Side) -> str:
    """Say how many tokens a sequence has, and how many of them are learnt."""
    name = f"{side.name}: " if side.name else ""
    return f"{name}{len(side.tokens):,} tokens, {side.targets:,} targets"
