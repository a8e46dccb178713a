"""Tables and figures as one HTML file that opens from disk and loads nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --text: #1b1d20; --quiet: #55595f; --page: #fff; --line: #d5d8dc; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6e9; --quiet: #a4a9b0; --page: #15171a; --line: #3a3e44; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
p { max-width: 44rem; } .quiet, figcaption { color: var(--quiet); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem; align-items: start; }
figure { margin: 0; min-width: 0; max-width: 40rem; } figcaption { font-size: .9rem; } svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; margin: 1rem 0; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
blockquote { margin: 1rem 0; padding-left: 1rem; max-width: 44rem; border-left: 3px solid var(--line); white-space: pre-wrap;
  overflow-wrap: anywhere; }
td.number { text-align: right; } details { margin: .8rem 0; } summary { cursor: pointer; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Table:
    """rows: text under `heads`. With a summary the table is folded away under it."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    summary: str = ""

    def html(self) -> str:
        head = "".join(f'<th scope="col">{escape(h)}</th>' for h in self.heads)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in self.rows)
        table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
        return f"<details><summary>{escape(self.summary)}</summary>{table}</details>" if self.summary else table


@dataclass(frozen=True)
class Picture:
    """svg: as `figures.svg` makes it. name: of an exported file."""

    name: str
    title: str
    svg: str

    def html(self) -> str:
        return f'<figure id="{escape(self.name)}">{self.svg}<figcaption>{escape(self.title)}</figcaption></figure>'


@dataclass(frozen=True)
class Section:
    """A heading, then sentences (`notes`), figures side by side, tables, quotations: (of whom, text)."""

    title: str
    notes: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    quotations: Sequence[tuple[str, str]] = ()

    def html(self) -> str:
        parts = [f"<h2>{escape(self.title)}</h2>", *(f'<p class="quiet">{escape(note)}</p>' for note in self.notes)]
        if self.pictures:
            parts.append(f'<div class="figures">{"".join(p.html() for p in self.pictures)}</div>')
        parts += [t.html() for t in self.tables]
        parts += [f'<p class="quiet">{escape(whose)}</p><blockquote>{escape(text)}</blockquote>' for whose, text in self.quotations]
        return "\n".join(["<section>", *parts, "</section>"])


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole file."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">\
<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{escape(title)}</title>'
    body = "\n".join(section.html() for section in sections)
    body = f"<body><h1>{escape(title)}</h1>\n{body}\n</body>"
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n{body}</html>\n'


def _cell(text: str) -> str:
    number = text.lstrip("+-")[:1].isdigit() and all(c in "0123456789.,+-e %" for c in text)
    return f'<td class="number">{escape(text)}</td>' if number else f"<td>{escape(text)}</td>"
