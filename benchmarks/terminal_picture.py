"""``python -m benchmarks.terminal_picture OUTPUT PNG``: what a command printed, as a picture of a terminal.

``docs/images/rehearsal.png`` is a rehearsal's verdict:

    COLUMNS=140 REHEARSE=1 bash examples/fipo/run-qwen3-4B.sh > output.txt
    sed -n '/^verdict/,$p' output.txt > verdict.txt
    python -m benchmarks.terminal_picture verdict.txt docs/images/rehearsal.png
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.text import Text

from tests.report.rig import chromium

PAGE = (
    "<!doctype html><meta charset=utf-8><style>body{{margin:0;background:#fff}}pre{{display:inline-block;margin:0;"
    "padding:14px 18px;font:13px/1.45 monospace;color:{foreground}}}{stylesheet}</style><pre>{code}</pre>"
)


def main(output: Path, picture: Path) -> None:
    """Write ``picture`` from the text in ``output``; marks in their colors."""
    text = Text(output.read_text(encoding="utf-8").strip("\n"))
    text.highlight_words(["✓"], "bold green4")
    text.highlight_words(["✗"], "bold red")
    text.highlight_regex(r"^(verdict|nothing wrong|\d+ wrong.*)", "bold")
    width = max(map(len, text.plain.splitlines()))
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(text, soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = Path(folder, "page.html")
        page_file.write_text(console.export_html(code_format=PAGE), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 900}, device_scale_factor=1.5)
        page.goto(page_file.as_uri())
        page.locator("pre").screenshot(path=picture)
        browser.close()
    print(f"{picture}: {picture.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
