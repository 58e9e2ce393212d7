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
    "vesalius.build.mixers": "What moves information between positions",
    "vesalius.corpus": "Text, tokens and their order",
    "vesalius.train": "The trainer",
    "vesalius.train.objectives": "What a model is trained to do",
    "vesalius.train.optimizers": "Optimizers",
    "vesalius.train.parallel": "Training on several processes",
    "vesalius.evaluate": "Memorization and other behaviour",
    "vesalius.find": "Methods",
    "vesalius.find.detectors": "Head detectors",
    "vesalius.find.recall": "Factual recall",
    "vesalius.find.anchored": "Anchored answers",
    "vesalius.lens": "Readings of the residual stream",
    "vesalius.features": "Directions, probes",
    "vesalius.features.bias": "The bias audit",
    "vesalius.features.dictionaries": "Sparse autoencoders, codes",
    "vesalius.features.codebooks": "Codebook features",
    "vesalius.prove": "Proof, comparison, reuse",
    "vesalius.report": "Reports",
    "vesalius.cli": "Commands",
}
GROUND = ("parts", "scores", "runs", "checkpoints", "records", "registry", "errors")


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
        "catalogue/recipes.md": recipes(),
        "catalogue/presets.md": presets(),
        "catalogue/mixers.md": mixers(),
        "catalogue/optimizers.md": optimizers(),
        "catalogue/objectives.md": objectives(),
        "catalogue/schedules.md": schedules(),
        "catalogue/corpora.md": corpora(),
        "catalogue/concepts.md": concepts(),
        "catalogue/lenses.md": lenses(),
        "catalogue/detectors.md": detectors(),
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
    from vesalius.defaults import DEFAULT_MODEL
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


def recipes() -> str:
    """Recipes that come with Vesalius, and every key a recipe may have."""
    from vesalius.train import recipe as r

    text = [
        "# Recipes",
        "",
        "What `vesalius train NAME` trains ([how](../howto/train-a-model.md)); a recipe of your own may start from one",
        "of them (`preset: NAME`) and state what differs.",
        "",
    ]
    rows = []
    for name, raw in r.recipes().items():
        made = r.read_recipe(name)
        data = made.data.corpus or made.data.synthetic
        rows.append((f"[`{name}`](#{name})", raw["about"], f"`{data}`", f"{made.steps:,}"))
    text += _table(["name", "what it is", "reads", "steps"], rows)
    for name in r.recipes():
        text += [f"## {name}", "", "```yaml", r.read_recipe(name).yaml().strip(), "```", ""]
    text += ["## Keys", "", "Every key with its default; what is not said is refused with the key that was meant.", ""]
    for title, section in _sections():
        text += [f"### {title}", "", *_attributes(section), ""]
        fields = section.model_fields.items()
        shown = [(f"`{key}`", f"`{_kind(field)}`".replace(" | ", " or "), _default(field)) for key, field in fields]
        text += _table(["key", "type", "default"], shown)
    return "\n".join(text)


def _attributes(obj: Any) -> list[str]:
    """A docstring's description, and its `Attributes:` as a list."""
    told, _, attributes = _description(obj).partition("Attributes:\n")
    lines: list[str] = []
    for line in attributes.splitlines():
        if line.startswith(" " * 5) and lines:  # goes on
            lines[-1] += " " + line.strip()
        else:
            lines.append("- " + line.strip())
    return [told.strip(), "", *lines]


def _sections() -> list[tuple[str, Any]]:
    from vesalius.train import recipe as r

    named = ("model", "data", "parameters", "norms", "checkpoints", "evaluate", "branch")
    sections = (r.ModelSection, r.DataSection, r.ParameterSection, r.NormSection)
    kinds = (*sections, r.CheckpointSection, r.EvaluateSection, r.BranchSection)
    return [("The recipe", r.Recipe), *zip(named, kinds, strict=True)]


def _kind(field: Any) -> str:
    return inspect.formatannotation(field.annotation).replace("vesalius.train.recipe.", "").replace("typing.", "")


def _default(field: Any) -> str:
    from pydantic import BaseModel

    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        given = value.model_dump()
        return f"`{given['name']}`" if "name" in given else "see below"
    return f"`{value!r}`"


def presets() -> str:
    """Architectures by name."""
    from vesalius.build import presets as listing

    text = [
        "# Presets",
        "",
        "What `vesalius.build.preset(NAME)` and a recipe's `model: {preset: NAME}` accept, with any key changed",
        "([how](../howto/build-a-model.md)). Those called `tiny-...` are for a CPU; a recipe fits the vocabulary to",
        "its tokenizer.",
        "",
    ]
    rows = [
        (f"`{r['name']}`", r["kind"], f"{r['parameters'] / 1e6:,.1f} M", r["layers"], r["d_model"], r["heads"])
        + (f"{r['vocab_size']:,}", r["class"], r["paper"])
        for r in listing().to_dict("records")
    ]
    header = ["name", "kind", "parameters", "layers", "d_model", "heads", "vocabulary", "class", "paper"]
    return "\n".join(text + _table(header, rows))


def mixers() -> str:
    """Mixers and feed-forwards: the parts an architecture names."""
    from vesalius.build import FEEDFORWARDS, INITS, MIXERS, STOCK

    costs = {"n2": "the square of the length", "nlogn": "n log n", "n": "the length", "nw": "length x window"}
    text = [
        "# Mixers and feed-forwards",
        "",
        "Parts an [architecture](../howto/build-a-model.md) is put together from.",
        "",
        "## Mixers",
        "",
        "What moves information between positions: `mixers: attn`, `mixers: '[qlstm,attn]*2'`.",
    ]
    rows = []
    for entry in MIXERS:
        made = MIXERS.get(entry.name)
        options = ", ".join(f"`{k}={f.default}`" for k, f in made.Options.model_fields.items())
        rows.append((f"`{entry.name}`", entry.summary, costs[made.growth], options, entry.paper))
    text += _table(["name", "what it is", "cost grows with", "options", "paper"], rows)
    text += ["## Feed-forwards", "", "What happens at each position by itself: `feed_forward: swiglu`."]
    text += _table(["name", "what it is", "paper"], [(f"`{e.name}`", e.summary, e.paper) for e in FEEDFORWARDS])
    text += ["## First weights", "", "How weights start: `init: gpt2`."]
    text += _table(["name", "what it is", "paper"], [(f"`{e.name}`", e.summary, e.paper) for e in INITS])
    text += ["## Stock classes", "", "Classes of transformers that are used where they compute the same thing; the"]
    text += ["first that fits. `vesalius.build.why_not(architecture)` says what keeps each from it."]
    text += _table(["name", "class"], [(f"`{name}`", f"`{s.model}`") for name, s in STOCK.items()])
    return "\n".join(text)


def _settings(values: dict[str, Any]) -> str:
    given = {k: v for k, v in values.items() if v is not inspect.Parameter.empty}
    return ", ".join(f"`{k}={v}`" for k, v in given.items())


def optimizers() -> str:
    """Every optimizer with its defaults and the size of its state."""
    from vesalius.train.optimizers import OPTIMIZERS, settings

    text = [
        "# Optimizers",
        "",
        "What a recipe's `optimizer: {name: NAME, SETTING: VALUE}` accepts; `vesalius race` sets them against each",
        "other ([how](../howto/race.md)). The state is counted in numbers kept for each parameter.",
        "",
    ]
    rows = [
        (f"`{e.name}`", e.summary, e.info["state_per_parameter"], _settings(settings(e.name)), e.paper)
        for e in OPTIMIZERS
    ]
    return "\n".join(text + _table(["name", "what it is", "state", "settings and their defaults", "paper"], rows))


def objectives() -> str:
    """Every objective with its settings."""
    import dataclasses

    from vesalius.train.objectives import OBJECTIVES

    text = ["# Objectives", "", "What a recipe's `objective: {name: NAME, SETTING: VALUE}` accepts.", ""]
    rows = []
    for e in OBJECTIVES:
        fields = [f for f in dataclasses.fields(OBJECTIVES.get(e.name)) if f.init]
        known = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
        rows.append((f"`{e.name}`", e.summary, _settings(known), e.paper))
    return "\n".join(text + _table(["name", "what is foretold", "settings and their defaults", "paper"], rows))


def schedules() -> str:
    """Every schedule of the learning rate."""
    from vesalius.train.schedules import SCHEDULES, schedule_settings

    text = [
        "# Schedules",
        "",
        "What a recipe's `schedule: {name: NAME, SETTING: VALUE}` accepts: the factor of the learning rate at each",
        "step. `warmup` and `decay` are shares of the run, `final` is a share of the peak.",
        "",
    ]
    rows = [
        (f"`{e.name}`", _description(SCHEDULES.get(e.name)), _settings(schedule_settings(e.name)), e.paper)
        for e in SCHEDULES
    ]
    return "\n".join(text + _table(["name", "what it does", "settings and their defaults", "paper"], rows))


def detectors() -> str:
    """Every head detector with its parameters, from its signature; and the series of successor heads."""
    from vesalius.find.detectors import DETECTORS
    from vesalius.find.detectors.base import detector_parameters
    from vesalius.find.detectors.kinds import series

    text = ["# Head detectors", "", "What `detect(model, NAME)` and `vesalius heads --detectors NAME` accept; see"]
    text += ["[how to](../howto/heads.md). Roles give a head its leading role; the others are shown beside them.", ""]
    rows = [
        (f"[`{e.name}`](#{e.name})", e.summary, "yes" if e.info.get("role") else "", e.paper)
        for e in sorted(DETECTORS, key=lambda e: (e.info.get("place", 99), e.name))
    ]
    text += _table(["name", "what it finds", "role", "paper"], rows)
    for entry in DETECTORS:
        function = DETECTORS.get(entry.name)
        text += [f"## {entry.name}", "", _description(function) or entry.summary, ""]
        told, known = _arguments(function), detector_parameters(entry.name)
        rows = [(f"`{n}`", _annotation(p), f"`{p.default!r}`", told.get(n, "")) for n, p in known.items()]
        text += _table(["parameter", "type", "default", ""], rows) if rows else ["It has no parameters.", ""]
    text += ["## Series of successor heads", "", "Items that are single tokens of the model's vocabulary are used.", ""]
    rows = [
        (f"`{n}`", ", ".join(items[:4]) + " ...", len(items), "yes" if around else "")
        for n, (items, around) in series().items()
    ]
    return "\n".join(text + _table(["name", "items", "how many", "begins again"], rows))


def lenses() -> str:
    """Lenses, how a tuned one is trained, and detectors of odd prompts."""
    import dataclasses

    from vesalius.lens import LENSES, LensRecipe
    from vesalius.lens.anomaly import DETECTORS

    text = ["# Lenses", "", "What `trajectory(model, prompt, lens=NAME)` accepts; see [how to](../howto/lens.md). A"]
    text += ["function of the same kind can be registered in `vesalius.lens.LENSES`.", ""]
    rows = [(f"`{e.name}`", e.summary, e.info.get("needs", ""), e.paper) for e in LENSES]
    text += _table(["name", "what it is", "needs", "paper"], rows)
    text += ["## Training a tuned lens", "", "`vesalius lens train`, `vesalius.lens.LensRecipe`.", ""]
    fields = dataclasses.fields(LensRecipe)
    text += _table(["setting", "default"], [(f"`{f.name}`", f"`{f.default!r}`") for f in fields])
    text += ["## Detectors of odd prompts", "", "`vesalius lens anomaly --detector NAME`.", ""]
    rows = [(f"`{e.name}`", e.summary, e.paper) for e in DETECTORS]
    return "\n".join(text + _table(["name", "what it is", "paper"], rows))


def concepts() -> str:
    """Concepts, the ways to find their axes, and association tests."""
    from vesalius.features import AXES, concept
    from vesalius.features import concepts as known
    from vesalius.features.bias import tests

    text = ["# Concepts and word sets", "", "What `vesalius direction NAME` accepts, beside"]
    text += ["[a file of your own](../howto/directions.md).", ""]
    rows = []
    for name, what in known().items():
        it = concept(name)
        sizes = f"{len(it.positive)} {it.poles[0]}, {len(it.negative)} {it.poles[1]}"
        rows.append((f"`{name}`", what, sizes, len(it.graded) or "", len(it.pairs), len(it.templates) or "", it.paper))
    text += _table(["name", "what it is", "phrases", "rated", "pairs", "templates", "paper"], rows)
    text += ["## Axes", "", "`vesalius direction --method NAME`; a function of the same kind can be registered in"]
    text += ["`vesalius.features.AXES`.", ""]
    text += _table(["name", "what it is", "source"], [(f"`{e.name}`", e.summary, e.paper) for e in AXES])
    text += [
        "## Association tests",
        "",
        "`vesalius bias --weat NAME`; word lists as published by Caliskan et al. 2017,",
    ]
    text += ["Science 356, 183-186.", ""]
    rows = [
        (f"`{t.name}`", t.what, f"{len(t.x.words)} + {len(t.y.words)}", f"{len(t.a.words)} + {len(t.b.words)}")
        for t in tests().values()
    ]
    return "\n".join(text + _table(["name", "what is compared", "targets", "attributes"], rows))


def corpora() -> str:
    """Real text by name, synthetic tasks, tokenizers."""
    import dataclasses

    from vesalius.corpus import RECIPES, SYNTHETIC
    from vesalius.corpus.sources import catalogue

    text = [
        "# Corpora",
        "",
        "What a recipe's `data: {corpus: NAME}` and `vesalius.corpus.documents(NAME)` accept, beside",
        "[files and folders of your own](../howto/your-own-corpus.md). A text is fetched once, as a released package,",
        "and checked by its sha256; nothing of it is kept in this repository.",
        "",
    ]
    rows = [
        (f"`{e.name}`", e.what, e.language, e.document, e.licence, f"{e.download / 2**20:.0f} MB")
        for e in catalogue().values()
    ]
    text += _table(["name", "what it is", "language", "a document is a", "licence", "to fetch"], rows)
    text += ["## Synthetic tasks", "", "`data: {synthetic: NAME, settings: {...}}`: fresh rows at every step, with a"]
    text += ["known best answer. Loss is on the scored tokens alone ([why that matters](../footguns.md)).", ""]
    rows = []
    for entry in SYNTHETIC:
        task = SYNTHETIC.get(entry.name)
        rows.append((f"`{entry.name}`", entry.summary, _settings(task.defaults), _description(task), entry.paper))
    text += _table(["name", "what is asked", "settings", "how a row is made", "paper"], rows)
    text += [
        "## Tokenizers",
        "",
        "`data: {tokenizer: {kind: bpe, vocab_size: 4096}}` trains one on the corpus. Recipes",
    ]
    text += ["of record, by `vesalius.corpus.train_tokenizer(documents, NAME)`:", ""]
    rows = [
        (f"`{name}`", f"`{r.kind}`", f"{r.vocab_size:,}", " ".join(f"`{s}`" for s in r.special))
        for name, r in RECIPES.items()
    ]
    text += _table(["name", "kind", "vocabulary", "special tokens"], rows)
    keys = ", ".join(f"`{f.name}`" for f in dataclasses.fields(RECIPES["gpt"]))
    return "\n".join([*text, f"Settings of all kinds: {keys}.", ""])
