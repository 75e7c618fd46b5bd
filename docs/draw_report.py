"""Redraw the picture of a report that the README shows, from a run of the quickstart, in a real Chromium.

Usage: python -m docs.draw_report RUN [--store URI], after `trainwright run recipes/quickstart.yaml`.
"""

import argparse
import tempfile
from pathlib import Path

from PIL import Image

import launch
from tests.chromium import browsers

PICTURE = Path(__file__).parent / "images" / "report.png"
WIDTH, HEIGHT = 1200, 2200
LAST = "document.querySelectorAll('.sample')[1]"
"""What the picture ends below."""
MARGIN = 24


def main() -> None:
    """Write the report, open it, and keep what is shown of it, in as many colours as it needs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--store")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, browsers(1, WIDTH, HEIGHT) as (page,):
        path = Path(folder) / "report.html"
        launch.report(arguments.run, store=arguments.store, output=path)
        page.open(path.as_uri())
        page.screenshot(PICTURE)
        bottom = round(page.run(f"return {LAST}.getBoundingClientRect().bottom")) + MARGIN
    Image.open(PICTURE).convert("RGB").crop((0, 0, WIDTH, bottom)).quantize(64).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
