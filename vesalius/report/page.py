"""One HTML file that opens offline: sections of charts, drawings and tables, with the libraries inlined once.

The page carries a content-security policy that forbids any request, so a report can never phone home, whatever a prompt
contains. Text is escaped by the template; chart specifications travel as JSON with `<` escaped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vesalius.records import plain, write_atomic
from vesalius.report.words import number
from vesalius.runs import Run


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite specification and what to call it."""

    spec: dict[str, Any]
    label: str
    caption: str = ""
    wide: bool = True  # the full width of the column, or one of several side by side

    @property
    def embedded(self) -> Markup:
        """The specification as JSON that cannot end its script element."""
        text = json.dumps(plain(self.spec), ensure_ascii=True, separators=(",", ":"))
        return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@dataclass(frozen=True)
class Drawing:
    """Finished SVG or HTML whose text was escaped where it was made."""

    markup: Markup
    caption: str = ""
    span: bool = False  # over the whole width, also where blocks stand side by side


@dataclass(frozen=True)
class Cell:
    """One cell of a table: its text, what it sorts by, and a style class."""

    text: str | Markup
    key: float | str | None
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose columns sort when their heads are clicked; rows beyond `shown` wait behind a button."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    shown: int = 25
    caption: str = ""

    @classmethod
    def of(cls, heads: Sequence[str], rows: Sequence[Sequence[Any]], shown: int = 25, caption: str = "") -> Table:
        """From plain values: numbers are rounded to three significant digits and set to the right."""
        return cls(heads, [[cell(v) for v in row] for row in rows], shown, caption)


def cell(value: Any) -> Cell:
    """A cell of a plain value; None and NaN are shown as a dash and sort last."""
    value = plain(value)
    if isinstance(value, bool):
        return Cell("yes" if value else "no", int(value))
    if isinstance(value, (int, float)):
        return Cell(number(value, pad=abs(value) >= 0.01), float(value), "num")
    if value is None or value == "":
        return Cell("–", None, "none")
    return Cell(str(value), str(value), "word" if len(str(value)) <= 24 else "")


@dataclass(frozen=True)
class Section:
    """A numbered figure or table: its title, its blocks, and a line that says how to read it.

    `missing` stands instead of the blocks when something was not measured.
    """

    title: str
    blocks: Sequence[Chart | Drawing | Table] = ()
    read: str = ""
    missing: str = ""
    layout: str = "stack"  # or "pair", "grid"
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """A whole report."""

    kind: str
    title: str
    subtitle: str
    lead: str
    facts: Sequence[tuple[str, str, str]] = ()  # label, value, small print
    warnings: Sequence[str] = ()
    sections: Sequence[Section] = ()
    record: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = field(default=())
    refresh: int = 0  # seconds after which a browser reads the page again; 0 for never

    def html(self) -> str:
        """The page as text, everything inlined."""
        here = files("vesalius.report") / "templates"
        environment = jinja2.Environment(
            loader=jinja2.FunctionLoader(lambda name: (here / name).read_text("utf-8")),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        environment.tests["chart"] = lambda block: isinstance(block, Chart)
        environment.tests["table"] = lambda block: isinstance(block, Table)
        drawn = any(isinstance(b, Chart) for s in self.sections for b in s.blocks)
        return environment.get_template("page.html").render(
            page=self,
            style=Markup((here / "style.css").read_text("utf-8")),
            script=Markup((here / "page.js").read_text("utf-8")),
            bundle=Markup(_bundle()) if drawn else None,
        )


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script (0.9 MB), from the copy that altair's own inline export uses."""
    import vl_convert

    text: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub forgets the default
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def write(run: Run, page: Page, name: str = "report.html") -> Path:
    """Writes the page into the run's folder and returns its path.

    The report is not in the run's manifest: it is drawn from what is, and can be drawn again at any time.
    """
    path = run.folder / name
    write_atomic(path, page.html().encode("utf-8", "backslashreplace"))
    return path


def record(run: Run, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run was: command, state, request, versions."""
    status, found = run.status, run.versions
    rows = [
        ("command", str(summary.get("command") or status.get("command") or "not recorded")),
        ("run", run.name),
        ("state", f"{status['state']}; begun {status.get('started', '?')}, ended {status.get('ended') or '–'}"),
    ]
    request = dict(run.request)
    arguments = request.pop("arguments", None)
    request.pop("command", None)
    for name, value in {**request, **(arguments if isinstance(arguments, dict) else {})}.items():
        if value is None:
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        rows.append((name.replace("_", " "), text))
    earlier = found.pop("earlier", [])
    merged = {**found, **(summary.get("versions") or {})}
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in merged.items() if v is not None)))
    if earlier:
        old = [", ".join(f"{k} {v}" for k, v in e.items() if v is not None) for e in earlier]
        rows.append(("begun under other versions", " · ".join(old)))
    return rows


def warnings(run: Run) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = []
    if run.state != "done":
        reason = run.status.get("error")
        found.append(f"This run is {run.state}{f' ({reason})' if reason else ''}: what follows is what it had stored.")
    if run.versions.get("earlier"):
        found.append("This run was begun under other versions of its libraries than it ended with (see the end).")
    return found
