"""Registries load what they name only when asked, refuse doubles, and suggest near names."""

from __future__ import annotations

import sys

import pytest

from vesalius.errors import UnknownName, VesaliusError
from vesalius.registry import Registry


def made() -> Registry:
    found: Registry = Registry("method")
    found.add("relp", "json:dumps", "relevance", "a paper", levels=("node",))
    found.add("attribution-patching", "json:loads", "first order")
    return found


def test_a_second_one_of_a_name_is_refused_and_the_same_one_is_not() -> None:
    methods = made()
    with pytest.raises(ValueError, match="method 'relp' is registered twice: json:dumps and json:loads"):
        methods.add("relp", "json:loads", "another")
    with pytest.raises(ValueError, match="twice"):
        methods.register("relp", "another")(lambda: 0)
    methods.add("relp", "json:dumps", "relevance")  # a module read twice
    import json

    assert methods.get("relp") is json.dumps


@pytest.mark.parametrize(
    ("wrong", "near"), [("rel", "relp"), ("relpp", "relp"), ("atribution-patching", "attribution-patching")]
)
def test_a_wrong_name_gets_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(UnknownName) as caught:
        made().get(wrong)
    text = str(caught.value)
    assert f"unknown method '{wrong}'; did you mean '{near}'" in text
    assert "(known: attribution-patching, relp)" in text and "\n" not in text
    assert isinstance(caught.value, VesaliusError)


def test_a_name_near_nothing_gets_the_list_alone() -> None:
    with pytest.raises(UnknownName) as caught:
        made().entry("zzzzzz")
    assert "did you mean" not in str(caught.value) and "known: attribution-patching, relp" in str(caught.value)


def test_a_long_list_is_cut_and_says_so() -> None:
    assert str(UnknownName("part", "q", [f"name{i:03d}" for i in range(41)])).count("name") == 40
    assert "..." in str(UnknownName("part", "q", [f"name{i:03d}" for i in range(41)]))


def test_entries_are_listed_by_name_with_what_they_were_given() -> None:
    methods = made()
    assert methods.names() == [e.name for e in methods] == ["attribution-patching", "relp"]
    entry = methods.entry("relp")
    assert (entry.summary, entry.paper, entry.info) == ("relevance", "a paper", {"levels": ("node",)})
    assert "relp" in methods and "eap" not in methods


def test_a_lazy_entry_is_imported_when_asked_for(tmp_path, monkeypatch) -> None:
    (tmp_path / "vesalius_lazy_probe.py").write_text("value = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    methods: Registry = Registry("method")
    methods.add("lazy", "vesalius_lazy_probe:value", "x")
    assert list(methods) and "vesalius_lazy_probe" not in sys.modules
    assert methods.get("lazy") == 7
    sys.modules.pop("vesalius_lazy_probe")


def test_the_decorator_gives_the_object_back() -> None:
    methods: Registry = Registry("method")

    @methods.register("one", summary="x")
    def one() -> int:
        return 1

    assert one() == 1 and methods.get("one") is one
