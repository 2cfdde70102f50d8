"""One self-contained page: the shell that Stage 0's and Stage 3's reports share. No script, no outside request, light and dark."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

_STYLE = """
:root{color-scheme:light dark;--ink:#1c1b19;--soft:#6a665f;--page:#faf8f5;--card:#fff;--line:#e4dfd7;--good:#1c6b45;--bad:#a3322b;--accent:#8a4b2a}
@media(prefers-color-scheme:dark){:root{--ink:#ece8e1;--soft:#a8a299;--page:#171614;--card:#211f1c;--line:#3a3732;--good:#6ccf9b;--bad:#f08f86;--accent:#e0a27c}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:2rem 1rem 4rem}
h1{font-size:1.9rem;margin:0 0 .3rem}
h2{margin:2.4rem 0 .6rem;font-size:1.3rem}
p{margin:.4rem 0;max-width:75ch}
.soft{color:var(--soft)}
.good{color:var(--good)}
.bad{color:var(--bad)}
a{color:var(--accent)}
.verdict{border:1px solid var(--line);border-left:6px solid var(--soft);background:var(--card);padding:1rem 1.2rem;border-radius:8px;margin:1rem 0}
.verdict.good{border-left-color:var(--good);color:inherit}
.verdict.bad{border-left-color:var(--bad);color:inherit}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;background:var(--card);font-variant-numeric:tabular-nums}
th,td{border-bottom:1px solid var(--line);padding:.4rem .7rem;text-align:left;vertical-align:top}
th{font-weight:600}
.scroll tr>:first-child{position:sticky;left:0;background:var(--card)}
td.n,th.n{text-align:right}
td small{display:block;color:var(--soft);white-space:nowrap;font-weight:400}
.first tbody tr:first-child{font-weight:600}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:1rem 0}
.tiles{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));margin:1rem 0;padding:0;list-style:none}
.tiles li{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.7rem 1rem;font-size:.9rem}
.tiles b{display:block;font-size:1.5rem;font-variant-numeric:tabular-nums}
figure{margin:0}
img{display:block;max-width:100%;height:auto;border-radius:4px;image-rendering:auto}
figcaption{font-size:.82rem;color:var(--soft);margin-top:.2rem}
.curve{margin:1.2rem 0}
.row{display:grid;gap:.6rem;grid-template-columns:repeat(auto-fit,minmax(110px,1fr));margin:.6rem 0;
padding:.7rem;background:var(--card);border:1px solid var(--line);border-radius:8px}
details{margin:.8rem 0}
summary{cursor:pointer}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--line);padding:.8rem;border-radius:8px;font-size:.82rem}
"""


_NOTICE = re.compile(r'<p class="notice">.*?</p>', re.DOTALL)


def page(title: str, body: Sequence[str], *, lead: str = "") -> str:
    """A whole HTML document from already escaped parts."""
    head = f"<h1>{escape(title)}</h1>" + (f'<p class="soft">{escape(lead)}</p>' if lead else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>{head}{''.join(body)}</main></body></html>\n"
    )


def with_notice(document: str, text: str) -> str:
    """A page of ``page`` with ``text`` above all else, in place of an earlier notice."""
    bare = _NOTICE.sub("", document)
    return bare.replace("<main>", f'<main><p class="notice"><strong>{escape(text)}</strong></p>', 1)


class Measured(NamedTuple):
    """A cell's value, and below it, smaller, what goes with it: an interval, a count."""

    value: str
    beside: str


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, numeric: bool = True, label: str = "", first: bool = False) -> str:
    """A table; all columns but the first are right-aligned when ``numeric``. first: the first row is set off from those it is held against.

    label: its name for screen readers, the first column's title where there is none; no two on a page may be called the same.
    """
    mark = ["", *[' class="n"' if numeric else ""] * (len(columns) - 1)]
    head = "".join(f'<th{m} scope="col">{escape(c)}</th>' for c, m in zip(columns, mark, strict=True))
    lines = "".join("<tr>" + "".join(f"<td{m}>{_cell(v)}</td>" for v, m in zip(row, mark, strict=True)) + "</tr>" for row in rows)
    # a table that is wider than a phone scrolls by itself, and can be scrolled by keyboard
    kind = ' class="first"' if first else ""
    inner = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label or columns[0])}">{inner}</div>'


def _cell(value: object) -> str:
    if isinstance(value, Measured):
        return escape(value.value) + (f"<small>{escape(value.beside)}</small>" if value.beside else "")
    return escape(str(value))


def contents(places: Sequence[tuple[str, str]]) -> str:
    """Links to parts of the page, from (id, title)."""
    links = "".join(f'<a href="#{place}">{escape(title)}</a>' for place, title in places)
    return f'<nav aria-label="contents">{links}</nav>'


def tiles(shown: Sequence[tuple[str, str, str]]) -> str:
    """The few figures that everybody asks for, large, from (value, what it is, what it is held against)."""
    inner = "".join(
        f"<li><b>{escape(value)}</b>{escape(what)}<br><span class='soft'>{escape(against)}</span></li>" for value, what, against in shown
    )
    return f'<ul class="tiles">{inner}</ul>'


def picture(image: NDArray[np.uint8], caption: str, *, side: int = 192) -> str:
    """A figure with the picture inside the page as JPEG. image: (H, W, 3) RGB or (H, W) grey, uint8; scaled to ``side`` at most."""
    rgb = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.ndim == 2 else image
    scale = side / max(rgb.shape[:2])
    size = (max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale)))
    small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88])
    data = base64.b64encode(encoded.tobytes()).decode()
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{escape(caption)}" width="{size[0]}" height="{size[1]}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def curve(title: str, points: Sequence[tuple[float, float]]) -> str:
    """A line over steps as a small drawing with its ends written out; nothing for fewer than two points. points: (step, value)."""
    if len(points) < 2:
        return ""
    steps, values = [p[0] for p in points], [p[1] for p in points]
    low, high = min(values), max(values)
    span, first, last = (high - low) or 1.0, steps[0], steps[-1]
    width = (last - first) or 1.0
    line = " ".join(f"{20 + 560 * (s - first) / width:.1f},{24 + 116 * (high - v) / span:.1f}" for s, v in zip(steps, values, strict=True))
    text = 'font-size="13" fill="currentColor"'
    return (
        f'<figure class="curve"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 600 170" width="600" role="img" aria-label="{escape(title)}" style="max-width:100%;height:auto">'
        f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="2"/>'
        f'<text x="20" y="15" {text}>{high:.4g}</text><text x="20" y="162" {text}>{low:.4g}</text>'
        f'<text x="580" y="162" text-anchor="end" {text}>step {last:g}</text></svg></figure>'
    )


def row(figures: Sequence[str]) -> str:
    """Figures side by side, wrapping on a phone."""
    return f'<div class="row">{"".join(figures)}</div>'


def details(title: str, text: str) -> str:
    """A folded block of preformatted text."""
    return folded(title, f'<pre tabindex="0">{escape(text)}</pre>')


def folded(title: str, inner: str) -> str:
    """Something already escaped that opens when its title is pressed."""
    return f"<details><summary>{escape(title)}</summary>{inner}</details>"
