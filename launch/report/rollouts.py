"""The rollout browser: one page, without a reference to anything outside of it, of what a stage of RL sampled.

Everything from the data lies in a block of JSON that no parser of HTML can leave, and the script writes it as text.
"""

import json
from collections.abc import Mapping
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any


def rollouts_page(title: str, found: Mapping[str, Any], value: str) -> str:
    """The page; `found` is what `read_rollouts` gave, `value` what the number at each token is."""
    data = json.dumps({**found, "value": value}, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)} · rollouts</title><style>{_part('page.css')}{_part('rollouts.css')}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{_part('rollouts.html')}</main>"
        f'<script type="application/json" id="data">{data}</script>'
        f"<script>{_part('rollouts.js')}</script></body></html>\n"
    )


@cache
def _part(name: str) -> str:
    return files("launch.report").joinpath(name).read_text(encoding="utf-8")
