"""``make screenshots``: the README's two pictures, from the demo's run directory.

``docs/images/training.png`` is the run's own picture; ``docs/images/report.png`` the report's What if view with a
response open, as a browser shows it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from slime_fipo.report.command import write_report
from tests.report.rig import chromium

IMAGES = Path(__file__).parents[1] / "docs" / "images"
MAX_BYTES = 300_000
# The response with the most clipped weights, under What if.
OPEN = """() => {
  const clipped = FATE.CLIPPED_HIGH | FATE.CLIPPED_LOW;
  const count = ({ start, stop }) => report.arrays.fate.slice(start, stop).filter((fate) => fate & clipped).length;
  const counts = report.responses.map(count);
  state.response = counts.indexOf(Math.max(...counts));
  go("whatif");
}"""


def main(run: Path) -> None:
    """Take the pictures of the run directory ``run``."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "training.png", IMAGES / "training.png")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path, _ = write_report([run], Path(folder, "report.html"))
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 960}, color_scheme="light")
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        page.evaluate(OPEN)
        page.get_by_label("τ, half-life in tokens").fill("8")
        page.wait_for_timeout(500)
        page.screenshot(path=IMAGES / "report.png")
        browser.close()
    for image in IMAGES.glob("*.png"):
        size = image.stat().st_size
        print(f"{image}: {size / 1e3:.0f} kB")
        if size > MAX_BYTES:
            sys.exit(f"{image} is larger than {MAX_BYTES / 1e3:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
