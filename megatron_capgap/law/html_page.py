"""Builds report.html: the report with embedded pictures in one file, which works offline and can be printed."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from markdown import markdown

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 0.875rem;
  font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ccc; padding: 0.25rem 0.45rem; text-align: left;
  white-space: nowrap; }
th { border-bottom: 2px solid #666; }
@media print { body, table { font-size: 11px; max-width: none; margin: 0; } img { max-width: 70%; } h2, img, table, tr
  { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def page(report: str, folder: Path) -> str:
    """The HTML page.

    Args:
        report: Markdown that refers to pictures in `folder`.
        folder: folder of the pictures.
    """
    body = markdown(report, extensions=["tables"])
    title = report.partition("\n")[0].removeprefix("# ")

    def embedded(match: re.Match[str]) -> str:
        picture = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{picture}"'

    body = re.sub(r'src="([\w.]+\.png)"', embedded, body)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )
