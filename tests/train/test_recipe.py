from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vesalius.errors import VesaliusError
from vesalius.train.recipe import Recipe, merge, read_recipe, recipes

GOOD = {"model": {"preset": "tiny-pythia"}, "data": {"corpus": "bible-kjv"}, "steps": 10}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stpes": 3}, r"unknown recipe key 'stpes'; did you mean 'steps'"),
        ({"data.lenght": 3}, r"unknown recipe key 'lenght'; did you mean 'length'.*in the recipe \(in 'data'\)"),
        ({"checkpoints.evry": 3}, r"'evry'; did you mean 'every'.*in 'checkpoints'"),
        ({"branch.stp": 3}, r"'stp'; did you mean 'step'.*in 'branch'|lacks 'branch.run'"),
        ({"steps": 0}, r"steps: input should be greater than or equal to 1, not 0"),
        ({"steps": "many"}, r"steps: .*valid integer.*not 'many'"),
        ({"data.corpus": None}, r"data: give corpus \(real text\) or synthetic"),
        ({"data.synthetic": "induction"}, r"data: give corpus \(real text\) or synthetic"),
        ({"model": {"source": "x", "preset": "y"}}, r"model: give either source"),
        ({"precision": "float8"}, r"precision: .*'float32', 'bfloat16' or 'float16', not 'float8'"),
        ({"name": "a b"}, r"name: "),
        ({"optimizer": {"lr": 1}}, r"lacks 'optimizer.name'"),
        ({"preset": "indction"}, r"unknown recipe preset 'indction'; did you mean 'induction'"),
    ],
)
def test_what_is_wrong_is_named_with_what_was_meant(change: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(VesaliusError, match=message):
        if "preset" in change:
            read_recipe(change)
        else:
            read_recipe(GOOD, change)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    for content, message in ((b"a: [1", "cannot be read as YAML"), (b"- 1", "holds no recipe"), (b"\xff\xfe", "YAML")):
        path = tmp_path / "r.yaml"
        path.write_bytes(content)
        with pytest.raises(VesaliusError, match=message):
            read_recipe(path)
    with pytest.raises(VesaliusError, match="there is no recipe .*missing.yaml"):
        read_recipe(tmp_path / "missing.yaml")
    with pytest.raises(VesaliusError, match="unknown recipe 'tiny-pithia'; did you mean 'tiny-pythia'"):
        read_recipe("tiny-pithia")


@pytest.mark.parametrize("name", sorted(recipes()))
def test_a_recipe_that_comes_with_us_is_whole_and_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(name)
    assert recipe.about
    path = tmp_path / "again.yaml"
    path.write_text(recipe.yaml())
    assert read_recipe(path) == recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_a_preset_is_changed_key_by_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"preset": "tiny-pythia", "data": {"rows": 4}, "optimizer": {"lr": 0.5}}))
    recipe, base = read_recipe(path, {"steps": 7, "schedule.warmup": 0.5}), read_recipe("tiny-pythia")
    assert recipe.data.rows == 4 and recipe.data.corpus == base.data.corpus
    assert recipe.optimizer.name == "adamw" and recipe.optimizer.settings["lr"] == 0.5
    assert recipe.optimizer.settings["betas"] == base.optimizer.settings["betas"]
    assert recipe.steps == 7 and recipe.schedule.settings["warmup"] == 0.5


def test_another_optimizer_does_not_inherit_the_settings_of_the_first() -> None:
    base = {"optimizer": {"name": "adamw", "betas": [0.9, 0.95], "lr": 1.0}}
    assert merge(base, {"optimizer": {"name": "adan"}}) == {"optimizer": {"name": "adan"}}
    assert merge(base, {"optimizer": {"lr": 2.0}})["optimizer"] == {"name": "adamw", "betas": [0.9, 0.95], "lr": 2.0}
    assert read_recipe(GOOD, {"optimizer": "adan"}).optimizer.name == "adan"
