"""A self-contained HTML page: no network, no files beside it, no scripts."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from jaxmodels.report.pieces import Heard, Marked, Picture, Piece, Table, Tokens

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5d6670; --paper: #fbfbfa; --card: #ffffff; --line: #e2e4e7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --soft: #9aa4ae; --paper: #15181b; --card: #1d2125; --line: #33393f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; color: var(--soft); }
nav { margin: .75rem 0 0; }
nav a { color: inherit; margin-right: 1.1rem; }
figure { margin: 1rem 0 1.75rem; }
/* pictures keep their white background in dark mode */
img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; padding: 8px; }
figcaption, .note { color: var(--soft); font-size: .9rem; margin-top: .5rem; max-width: 60rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; background: var(--card); border: 1px solid var(--line); font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; max-width: 40rem; white-space: pre-line; }
th { font-weight: 600; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
.tokens { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem;
  line-height: 2; margin-bottom: .5rem; }
.tokens b { display: block; font-weight: 600; color: var(--soft); font-size: .85rem; line-height: 1.5; }
.heard { display: flex; flex-wrap: wrap; gap: .75rem; }
.heard label { color: var(--soft); font-size: .85rem; }
.heard audio { display: block; width: 15rem; height: 2.2rem; }
.marked { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem;
  margin-bottom: .5rem; max-width: 60rem; }
.marked b { display: block; font-weight: 600; color: var(--soft); font-size: .85rem; }
mark { color: inherit; background: none; border-radius: 3px; padding: .05rem .1rem; }
mark.hit { background: rgba(31, 111, 214, .35); }
mark.said { background: rgba(214, 60, 31, .3); }
mark.missed { text-decoration: underline 2px dashed rgb(31, 111, 214); text-underline-offset: 3px; }
.tokens span { padding: .1rem .25rem; border-radius: 3px; margin-right: .12rem; white-space: pre; }
"""


@dataclass(frozen=True)
class Part:
    """Pieces of one run, or a note if there are none."""

    pieces: Sequence[Piece] = ()
    run: str = ""
    """The run's name, if there are several."""
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and the parts below it."""

    title: str
    parts: Sequence[Part]


def render(title: str, sections: Sequence[Section], images: dict[Picture, bytes]) -> str:
    """Render the page as HTML; `images` are the pictures' PNGs."""
    links = " ".join(f'<a href="#{anchor(s.title)}">{escape(s.title)}</a>' for s in sections)
    body = []
    for section in sections:
        body.append(f'<h2 id="{anchor(section.title)}">{escape(section.title)}</h2>')
        for part in section.parts:
            if part.run:
                body.append(f"<h3>{escape(part.run)}</h3>")
            body += [html(piece, images) for piece in part.pieces]
            if part.note:
                body.append(f'<p class="note">{escape(part.note)}</p>')
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n<nav>{links}</nav>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def anchor(title: str) -> str:
    """Turn a heading into the name of its anchor."""
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def html(piece: Piece, images: dict[Picture, bytes]) -> str:
    """Render a piece as HTML."""
    caption = f"<figcaption>{escape(piece.caption)}</figcaption>" if piece.caption else ""
    if isinstance(piece, Picture):
        data = images[piece]
        # a PNG states its width in bytes 16 to 19; pictures are drawn for high-density screens
        width = int.from_bytes(data[16:20], "big") * 4 // 5
        source = base64.b64encode(data).decode()
        name = escape(piece.name, quote=True)
        return f'<figure><img src="data:image/png;base64,{source}" width="{width}" alt="{name}">{caption}</figure>'
    if isinstance(piece, Table):
        return f'<figure><div class="wide">{table(piece)}</div>{caption}</figure>'
    if isinstance(piece, Heard):
        return f'<figure><div class="heard">{"".join(map(player, piece.sounds))}</div>{caption}</figure>'
    if isinstance(piece, Marked):
        return f"<figure>{marked(piece)}{caption}</figure>"
    return f"<figure>{tokens(piece)}{caption}</figure>"


def player(sound: tuple[str, bytes]) -> str:
    """Render a sound as a player, with its heading."""
    heading, content = sound
    source = f"data:audio/wav;base64,{base64.b64encode(content).decode()}"
    return f'<label>{escape(heading)}<audio controls preload="metadata" src="{source}"></audio></label>'


def table(piece: Table) -> str:
    """Render rows and columns; columns of numbers are aligned right."""
    right = [i > 0 and all(map(numeric, cells)) for i, cells in enumerate(zip(*piece.rows, strict=True))]

    def row(kind: str, cells: Sequence[str]) -> str:
        sides = (' class="number"' if side else "" for side in right)
        return "".join(f"<{kind}{side}>{escape(cell)}</{kind}>" for cell, side in zip(cells, sides, strict=True))

    rows = "".join(f"<tr>{row('td', cells)}</tr>" for cells in piece.rows)
    return f"<table><tr>{row('th', piece.head)}</tr>{rows}</table>"


def numeric(cell: str) -> bool:
    """Whether a cell is a number or a placeholder for one."""
    return bool(re.fullmatch(r"[-+]?[\d,.]+(e[-+]?\d+)?%?|–|nan|inf", cell))


def tokens(piece: Tokens) -> str:
    """Render texts with a background color for each token."""
    out = []
    for heading, labels, values in piece.texts:
        spans = "".join(
            f'<span style="background: {tint(value)}" title="{value:+.2f}">{escape(label)}</span>'
            for label, value in zip(labels, np.asarray(values, float).tolist(), strict=True)
        )
        out.append(f'<div class="tokens"><b>{escape(heading)}</b>{spans}</div>')
    return "".join(out)


def marked(piece: Marked) -> str:
    """Render texts with their marked parts."""
    out = []
    for heading, parts in piece.texts:
        text = "".join(f'<mark class="{mark}">{escape(part)}</mark>' if mark else escape(part) for part, mark in parts)
        out.append(f'<div class="marked"><b>{escape(heading)}</b>{text}</div>')
    return "".join(out)


def tint(value: float) -> str:
    """Blue for values above 0, red for values below; translucent, so that it suits light and dark mode."""
    color = "31, 111, 214" if value > 0 else "214, 60, 31"
    return f"rgba({color}, {min(abs(value), 1) * 0.6:.2f})"
