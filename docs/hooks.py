"""Pages made from the code when the documentation is built, so that they are never stale.

`catalogue/*.md` lists what the registries hold; `api/*.md` has a page for every public module.
"""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Sequence
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOMS = {
    "vesalius": "The front door",
    "vesalius.model": "Open a model, run it, intervene",
    "vesalius.tasks": "Prompts with counterfactuals",
    "vesalius.build": "Models made here",
    "vesalius.find": "Methods",
    "vesalius.prove": "Proof, comparison, reuse",
    "vesalius.report": "Reports",
    "vesalius.cli": "Commands",
}
GROUND = ("parts", "scores", "runs", "records", "registry", "errors")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the API pages into the navigation."""
    rooms = [{name: f"api/{name}.md"} for name in [*ROOMS, *(f"vesalius.{g}" for g in GROUND)] if _exists(name)]
    assert config.nav is not None
    config.nav = [{"API": rooms} if "API" in entry else entry for entry in config.nav]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    pages = {
        "catalogue/methods.md": methods(),
        "catalogue/tasks.md": tasks(),
        "catalogue/metrics.md": metrics(),
        "catalogue/models.md": models(),
        "catalogue/families.md": families(),
        "catalogue/planted.md": planted(),
    }
    for name, what in ROOMS.items():
        if _exists(name):
            pages[f"api/{name}.md"] = api(name, what)
    for name in GROUND:
        pages[f"api/vesalius.{name}.md"] = f"::: vesalius.{name}\n"
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def _exists(name: str) -> bool:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return False
    return found is not None and found.origin is not None  # a folder alone is not a module


def api(package: str, what: str) -> str:
    """One page for a package: what it exports, then its public modules."""
    text = [f"# `{package}`", "", what + ".", ""]
    module = importlib.import_module(package)
    if package == "vesalius":
        text += ["::: vesalius", "    options:", "      members: false", ""]
        return "\n".join(text)
    text += [f"::: {package}", "    options:", "      members: false", "      show_root_heading: false", ""]
    names = sorted(m.name for m in pkgutil.iter_modules(module.__path__) if not m.name.startswith("_"))
    text += [f"::: {package}.{name}\n" for name in names]
    return "\n".join(text)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    return [
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(map(cell, row)) + " |" for row in rows),
        "",
    ]


def _description(obj: Any) -> str:
    """The docstring without its `Args:`, `Returns:`... sections."""
    lines = []
    for line in (inspect.getdoc(obj) or "").splitlines():
        if line.strip() in ("Args:", "Returns:", "Raises:", "Example:", "Examples:"):
            break
        lines.append(line)
    return "\n".join(lines).strip()


def _arguments(obj: Any) -> dict[str, str]:
    """What the docstring's `Args:` section says of each name (several `name: text.` may share a line)."""
    doc = inspect.getdoc(obj) or ""
    if "Args:" not in doc:
        return {}
    section = re.split(r"\n(?:Returns|Raises|Example|Examples|Yields):", doc.split("Args:", 1)[1])[0]
    text = " ".join(section.split())
    searched = ((re.search(rf"(?:^|[.)\]] ){name}: ", text), name) for name in inspect.signature(obj).parameters)
    starts = [(found, name) for found, name in searched if found is not None]
    starts.sort(key=lambda pair: pair[0].start())
    described = {}
    for i, (found, name) in enumerate(starts):
        end = starts[i + 1][0].start() + 1 if i + 1 < len(starts) else len(text)
        described[name] = text[found.end() : end].strip()
    return described


def _annotation(parameter: inspect.Parameter) -> str:
    kind = parameter.annotation
    return (
        ""
        if kind is inspect.Parameter.empty
        else f"`{kind if isinstance(kind, str) else inspect.formatannotation(kind)}`".replace(" | ", " or ")
    )


def methods() -> str:
    """Every method with its parameters, from its signature."""
    from vesalius.find import METHODS
    from vesalius.find.base import parameters

    text = ["# Methods", "", "What `vesalius.find(NAME, model, task)` and `--method NAME` accept.", ""]
    text += _table(
        ["name", "what it gives", "levels", "paper"],
        [(f"[`{e.name}`](#{e.name})", e.summary, ", ".join(e.info.get("levels", ())), e.paper) for e in METHODS],
    )
    for entry in METHODS:
        function = METHODS.get(entry.name)
        text += [f"## {entry.name}", "", _description(function) or entry.summary, ""]
        text += [f"Levels: {', '.join(entry.info.get('levels', ('node',)))}. Paper: {entry.paper}.", ""]
        told = _arguments(function)
        rows = [
            (f"`{n}`", _annotation(p), f"`{p.default!r}`", told.get(n, "")) for n, p in parameters(entry.name).items()
        ]
        text += _table(["parameter", "type", "default", ""], rows) if rows else ["It has no parameters.", ""]
    return "\n".join(text)


def tasks() -> str:
    """Every task with its parameters."""
    from vesalius.tasks import DEFAULT_N, TASKS

    text = [
        "# Tasks",
        "",
        f"What `vesalius.task(NAME, n={DEFAULT_N}, seed=0)` and `--task NAME` accept; also the path of",
    ]
    text += ["your own [prompt file](../howto/your-own-prompts.md).", ""]
    rows = [(f"[`{e.name}`](#{e.name})", e.summary, f"`{TASKS.get(e.name).metric}`", e.paper) for e in TASKS]
    text += _table(["name", "what is asked", "metric", "paper"], rows)
    for entry in TASKS:
        made = TASKS.get(entry.name)
        text += [f"## {entry.name}", "", _description(made.stream) or entry.summary, "", f"Paper: {entry.paper}.", ""]
        found = made.parameters.values()
        rows = [
            (f"`{p.name}`", ", ".join(f"`{c}`" for c in p.choices) or f"`{p.kind.__name__}`", f"`{p.default!r}`")
            for p in found
        ]
        text += _table(["parameter", "values", "default"], rows) if rows else ["It has no parameters.", ""]
    return "\n".join(text)


def metrics() -> str:
    """Every metric."""
    from vesalius.tasks import METRICS

    text = ["# Metrics", "", "What is measured of an answer: `--metric NAME`. Larger is more of the right answer.", ""]
    return "\n".join(
        text + _table(["name", "what it is", "paper"], [(f"`{e.name}`", e.summary, e.paper) for e in METRICS])
    )


def models() -> str:
    """Models that open by a short name."""
    from vesalius.model.opening import DEFAULT_MODEL
    from vesalius.model.sources.catalogue import catalogue

    rows = [
        (f"`{e.name}`", e.what, f"{e.parameters / 1e6:.0f} M", e.licence, type(e.source).__name__.lower())
        for e in catalogue().values()
    ]
    text = [
        "# Models",
        "",
        "Names that open by themselves; any other model of a known [family](families.md) opens by its",
    ]
    text += [f"hub name, folder or file ([how](../howto/open-any-model.md)). The default is `{DEFAULT_MODEL}`.", ""]
    return "\n".join(text + _table(["name", "what it is", "parameters", "licence", "comes from"], rows))


def families() -> str:
    """Architectures that can be opened."""
    from vesalius.model.anatomy import families as known

    def yes(value: bool | str) -> str:
        return "from the config" if isinstance(value, str) else "yes" if value else ""

    rows = [
        (f"`{name}`", "encoder, decoder" if len(s.stacks) > 1 else "decoder" if s.causal else "encoder", s.norm)
        + (yes(s.parallel), yes(s.post_norm), yes(s.gated), "yes" if s.attention == "interface" else "")
        for name, s in sorted(known().items())
    ]
    text = [
        "# Families",
        "",
        "Any checkpoint whose `model_type` stands here opens, whatever its name, size or source.",
        "",
    ]
    header = ["model_type", "stacks", "norm", "parallel blocks", "post-norm", "gated MLP", "attention interface"]
    return "\n".join(text + _table(header, rows))


def planted() -> str:
    """Planted models."""
    from vesalius.build import PLANTED

    text = [
        "# Planted models",
        "",
        "Models whose mechanism was set by hand, with the true circuit listed: ground truth for any",
    ]
    text += ["method ([how to use them](../howto/planted-models.md)).", ""]
    return "\n".join(
        text + _table(["name", "mechanism", "paper"], [(f"`{e.name}`", e.summary, e.paper) for e in PLANTED])
    )
