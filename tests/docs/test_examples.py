"""The documentation says what is true: its Python runs, its commands parse, its links lead somewhere.

Python blocks of a page run one after another in one namespace. Where they open a model by name, they are given a small
random one with a tokenizer of its own; the numbers on the pages were measured on the models they name.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import vesalius.model
from vesalius.build import preset
from vesalius.change.merge import MergePlan
from vesalius.cli.app import command_line
from vesalius.cli.quantize import METHODS as QUANTIZERS
from vesalius.cli.train import parse_changes
from vesalius.errors import UnknownName
from vesalius.features import AXES, concept
from vesalius.find.base import METHODS, parameters
from vesalius.find.detectors import DETECTORS
from vesalius.model import Model
from vesalius.model.sources.catalogue import catalogue
from vesalius.tasks import TASKS
from vesalius.train import OPTIMIZERS, read_recipe

sys.path.append(str(Path(__file__).parents[1] / "tasks"))
from task_helpers import bpe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SKIPS = 3  # blocks that may be left out, over all pages
SKIP = re.compile(r"<!-- test: skip, (?P<reason>.+?) -->\s*\Z")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```\s*$", re.M | re.S)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
EXAMPLE = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"), ("Egypt", "Cairo")]


class Block(NamedTuple):
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    skipped: bool


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        indent = found["indent"]
        body = "".join(line.removeprefix(indent) for line in found["body"].splitlines(keepends=True))
        line = text.count("\n", 0, found.start()) + 2
        yield Block(page, line, found["language"], body, SKIP.search(text, 0, found.start()) is not None)


ALL = [block for page in PAGES for block in blocks(page)]
PYTHON = [page for page in PAGES if any(b.page == page and b.language == "python" for b in ALL)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands() -> list[tuple[str, str]]:
    """(where, command) for every `vesalius ...` line of a shell block, comments left out."""
    found = []
    for block in ALL:
        if block.language in ("", "bash", "sh"):
            for i, line in enumerate(block.text.replace("\\\n", " ").splitlines()):
                if line.removeprefix("$ ").startswith("vesalius "):
                    found.append((f"{name(block.page)}:{block.line + i}", line.removeprefix("$ ")))
    return found


# -- commands --------------------------------------------------------------------------------------------------------


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """The command's name and its parameters, as the program itself reads them; nothing is run."""
    words = shlex.split(line, comments=True)[1:]
    root = typer.main.get_command(command_line())
    context = root.make_context("vesalius", list(words))
    rest = [*context._protected_args, *context.args]
    found, command, rest = root.resolve_command(context, rest)  # type: ignore[attr-defined]
    while hasattr(command, "commands"):  # a group: `vesalius lens train`
        context = command.make_context(found, rest, parent=context)
        found, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    return found, command.make_context(found, rest, parent=context).params


@pytest.mark.parametrize(("where", "line"), commands(), ids=[f"{w} {c[:60]}" for w, c in commands()])
def test_commands_exist_with_these_options(where: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if shlex.split(line, comments=True)[1:] in (["--help"], ["--version"]):
        return
    command, given = parsed(line)
    if command == "direction":
        assert AXES.entry(given["method"] or "pca")
        assert Path(given["concept"]).suffix or concept(given["concept"])
    elif command == "merge":
        assert MergePlan(given["method"])
    elif command == "quantize":
        assert given["method"] in QUANTIZERS
    elif (method := given.get("method")) is not None:
        own = parameters(method)  # refuses an unknown method
    if "method_set" in given:
        for item in given.get("method_set") or []:
            assert item.partition("=")[0].replace("-", "_") in own, item
        for option in ("direction", "steps", "budget", "position"):
            assert given.get(option) is None or option in own, option
    for task in filter(None, str(given.get("task") or given.get("tasks") or "").split(",")):
        if task == "none" and command in ("dynamics", "heads"):
            continue
        assert Path(task).suffix in (".jsonl", ".csv") or TASKS.entry(task), task
        for item in given.get("task_set") or []:
            key = item.partition("=")[0]
            assert key in ("metric", "scoring", "on_misaligned") or key in TASKS.get(task).parameters, item
    if command in ("train", "race"):
        recipe = given.get("recipe") or given.get("preset")
        if recipe is not None and not recipe.endswith(".yaml"):
            read_recipe(recipe, parse_changes(given.get("changes") or []))  # refuses unknown recipes and keys
        for optimizer in filter(None, str(given.get("optimizers") or "").split(",")):
            assert OPTIMIZERS.entry(optimizer)
        for model in filter(None, str(given.get("models") or "").split(",")):
            assert preset(model)
        return
    for model in filter(None, str(given.get("model") or given.get("models") or "").split(",")):
        known = model in catalogue() or model.isupper() or "/" in model or model.endswith(".gguf")
        assert known or model.startswith("wheel:"), model


def test_an_option_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(Exception, match="No such option.*--no-such-option"):
        parsed("vesalius circuit --no-such-option")
    with pytest.raises(UnknownName):
        METHODS.entry("rellp")
    assert parsed("vesalius circuit --task ioi --n 8  # few")[1]["n"] == 8
    assert len(commands()) > 10


# -- Python ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Model:
    """A random Llama of the default model's family whose tokenizer knows the word lists."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe(r"\d", ["<eos>"]), eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return Model.wrap(LlamaForCausalLM(config).eval(), tokenizer, name="small")


@pytest.mark.parametrize("page", PYTHON, ids=name)
def test_python_runs(page: Path, small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = vesalius.model.open_model

    def opened(spec: Any = "smollm2-135m", **options: Any) -> Model:
        local = not isinstance(spec, str) or Path(spec).exists()
        assert local or spec in catalogue() or "/" in spec or spec.endswith(".gguf"), spec
        return real(spec, **options) if local else small

    monkeypatch.setattr(vesalius.model, "open_model", opened)
    for registry in (METHODS, DETECTORS):  # a page registers a method, another a detector
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = [
        {"clean": form.format(a), "corrupted": form.format(b), "answer": f" {x}", "wrong": f" {y}"}
        for form in ("The capital of {} is", "The city to see in {} is")
        for (a, x), (b, y) in pairwise([*EXAMPLE, EXAMPLE[0]])
    ]
    Path("my_prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    namespace: dict[str, Any] = {}
    for block in ALL:
        if block.page == page and block.language == "python" and not block.skipped:
            # Line numbers of a traceback are those of the page.
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)


def test_few_blocks_are_skipped() -> None:
    skipped = [f"{name(b.page)}:{b.line}" for b in ALL if b.skipped]
    assert len(skipped) <= SKIPS, skipped
    assert len(PYTHON) >= 8


# -- pages -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generated() -> set[Path]:
    """Pages that are made from the code when the documentation is built."""
    files = pytest.importorskip("mkdocs.structure.files")
    from mkdocs.config import load_config

    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    config = load_config(str(ROOT / "mkdocs.yml"))
    config.plugins._current_plugin = "docs"  # mkdocs sets it while it calls a hook
    return {ROOT / "docs" / file.src_uri for file in hooks.on_files(files.Files([]), config)}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path, generated: set[Path]) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for found in LINK.finditer(text):
        target = found["target"].partition("#")[0]
        if target and "://" not in target:
            path = (page.parent / target).resolve()
            assert path.exists() or path in generated, f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_nothing_is_left_to_write(page: Path) -> None:
    assert not re.search(r"<!-- to (write|check)", page.read_text(encoding="utf-8"))


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in nav, page
