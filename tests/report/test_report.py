"""What a report promises: it opens offline, shows the numbers it was given, and lets no prompt become markup."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import vl_convert
from report_helpers import (
    circuit_run,
    compare_run,
    dynamics_run,
    made_circuit,
    made_scores,
    race_run,
    reuse_run,
    training_run,
)

from vesalius.errors import RunError, UnknownName
from vesalius.parts import parse_part
from vesalius.report import (
    circuit_report,
    compare_report,
    dynamics_report,
    race_report,
    report,
    reuse_report,
    train_report,
)
from vesalius.report.graph import MOST_EDGES, draw, shade, short_role
from vesalius.report.words import count, estimate, listed, number, percent, token
from vesalius.runs import Run

LOADING = {"src", "href", "xlink:href", "srcset", "data", "poster", "action", "background", "formaction", "ping"}


class Page(HTMLParser):
    """A page taken apart: elements with attributes, the chart specifications, and the text outside scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.specs: list[dict[str, Any]] = []
        self.styles: list[str] = []
        self.words: list[str] = []
        self._in: tuple[str, str | None] = ("", None)
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._in = (tag, dict(attrs).get("type"))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._in = ("", None)

    def handle_data(self, data: str) -> None:
        if self._in == ("script", "application/json"):
            self.specs.append(json.loads(data))
        elif self._in[0] == "style":
            self.styles.append(data)
        elif not self._in[0]:
            self.words.append(data)

    def charts(self, label: str) -> list[dict[str, Any]]:
        """Specifications of the charts whose label begins so."""
        names = [a["aria-label"] or "" for t, a in self.elements if t == "div" and "vega" in (a.get("class") or "")]
        return [spec for name, spec in zip(names, self.specs, strict=True) if name.startswith(label)]

    def attributes(self, kind: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if kind in (a.get("class") or "").split()]


def rows(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """All data of a specification."""
    return [row for table in spec["datasets"].values() for row in table]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Page]:
    run = circuit_run(tmp_path_factory.mktemp("node"))
    return run, Page(circuit_report(run))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, node: tuple[Run, Page]) -> dict[str, Page]:
    out = tmp_path_factory.mktemp("others")
    edge = circuit_run(out, 12, 12, edges=200)
    return {
        "node": node[1],
        "edge": Page(circuit_report(edge)),
        "reuse": Page(reuse_report(reuse_run(out))),
        "compare": Page(compare_report(compare_run(out))),
        "train": Page(train_report(training_run(out))),
        "dynamics": Page(dynamics_report(dynamics_run(out))),
        "race": Page(race_report(race_run(out))),
    }


# ---- offline


def test_nothing_is_loaded_from_anywhere(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        for tag, attributes in page.elements:
            loads = LOADING & set(attributes)
            assert not loads, f"{name}: <{tag}> loads {loads}"
            assert "url(" not in (attributes.get("style") or "")
        css = "\n".join(page.styles)
        assert "url(" not in css and "@import" not in css
        policy = [a["content"] for t, a in page.elements if t == "meta" and "Content-Security-Policy" in a.values()]
        assert (
            len(policy) == 1 and (policy[0] or "").startswith("default-src 'none';") and "http" not in (policy[0] or "")
        )
        for spec in page.specs:
            text = json.dumps(spec)
            assert "http" not in text and '"url"' not in text
        assert page.source.count("window.vegaEmbed=") == 1  # the bundle, once


def test_every_chart_is_one_vega_can_draw(pages: dict[str, Page]) -> None:
    n = 0
    for page in pages.values():
        for spec in page.specs:
            svg = vl_convert.vegalite_to_svg(json.dumps(spec))
            assert "<path" in svg
            n += 1
    assert n >= 4 + 6 + 4 + 6 + 3 + 6


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser here to open the page with")
def test_a_browser_draws_all_charts_under_the_policy(pages: dict[str, Page], tmp_path: Path) -> None:
    for name in ("node", "compare", "dynamics"):
        path = tmp_path / f"{name}.html"
        path.write_text(pages[name].source)
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--virtual-time-budget=8000", "--dump-dom", path.as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        assert 'class="vega failed"' not in dom
        drawn = len(re.findall(r'<svg [^>]*class="marks"', dom))
        assert drawn == len(pages[name].specs)


# ---- the numbers given are the numbers shown


def test_scores_are_in_the_map_and_the_table(node: tuple[Run, Page]) -> None:
    run, page = node
    given = run.table("scores").set_index("part")["score"]
    (spec,) = page.charts("Scores of")
    shown = {row["part"]: row for row in rows(spec) if "column" in row}
    assert len(shown) == 300
    members = {p["part"] for p in run.json("circuit")["parts"]}
    for part, score in given.items():
        assert shown[str(part)]["score"] == pytest.approx(score, abs=1e-12)
        assert (shown[str(part)]["member"] == "yes") == (part in members)
        assert (shown[str(part)]["layer"], shown[str(part)]["column"]) == (
            parse_part(str(part)).layer,
            "MLP" if "MLP" in str(part) else str(parse_part(str(part)).index),
        )
    limit = spec["layer"][0]["encoding"]["color"]["scale"]["domain"][-1]
    heads = given[[p for p in given.index if ".H" in p]]
    assert limit == pytest.approx(heads.abs().max())  # one huge MLP does not bleach the heads
    assert "beyond it: L0.MLP (" in page.text
    cells = [float(a["data-v"] or 0) for a in page.attributes("pos") + page.attributes("neg") if "data-v" in a]
    assert sorted(cells) == pytest.approx(sorted(given))


def test_headline_numbers(node: tuple[Run, Page]) -> None:
    text = node[1].text
    for said in (
        "right answer on 98 % of the prompts, by a logit difference of 5.15.",
        "With 48 of 270 heads and 12 of 30 MLPs left in place and the rest mean-ablated, 0.864 of that remains",
        "Random circuits of the same size keep 0.104.",
        "likeliest token on 96 %",
        "[0.832, 0.894]",
        "64 prompts to find the circuit and 100 prompts to prove the circuit",
        "5.15 [4.87, 5.43] on the clean prompts, 0.213 [−0.12, 0.533] on the corrupted ones",
        "Circuit-performance ratio 0.92; circuit-model distance 0.08",
        "vesalius circuit --task ioi --method relp",
        "sha256:5f1c0ab3",
        "python 3.",
    ):
        assert said in text, said


def test_curve_has_the_circuit_and_the_control(node: tuple[Run, Page]) -> None:
    run, page = node
    table = run.table("curve")
    for ablation in ("mean", "resample"):
        (spec,) = page.charts(f"Faithfulness against size, {ablation}")
        data = pd.DataFrame([r for r in rows(spec) if "what" in r])
        part = table[table["ablation"] == ablation]
        mine = data[data["what"] == "the circuit"].set_index("size")["faithfulness"]
        want = part[part["kind"] == "circuit"].set_index("size")["faithfulness"]
        pd.testing.assert_series_equal(mine, want, check_names=False, check_index_type=False)
        control = data[data["what"] != "the circuit"].set_index("size")
        draws = part[part["kind"] == "random"].groupby("size")["faithfulness"]
        pd.testing.assert_series_equal(control["faithfulness"], draws.mean(), check_names=False, check_index_type=False)
        pd.testing.assert_series_equal(control["high"], draws.quantile(0.95), check_names=False, check_index_type=False)
        assert any(r.get("label") == "chosen: 60" for r in rows(spec))
        assert '"type": "log"' in json.dumps(spec)


def test_attention_patterns(node: tuple[Run, Page]) -> None:
    run, page = node
    given = run.json("patterns")
    specs = page.charts("Attention pattern of")
    assert len(specs) == len(given) == 6
    for spec, want in zip(specs, given, strict=True):
        seen = {(r["from"], r["to"]): r["weight"] for r in rows(spec)}
        n = len(want["tokens"])
        assert all(
            seen.get((i, j), 0.0) == pytest.approx(want["pattern"][i][j], abs=1e-4) for i in range(n) for j in range(n)
        )
        assert not any(j > i for i, j in seen)
        assert spec["encoding"]["x"]["axis"]["labelExpr"].startswith('["When", "Mary", "and"')


def test_graph_has_every_member_and_edge_once(tmp_path: Path) -> None:
    circuit = made_circuit(made_scores(30, 9), 48, 12, 200)
    universe = [f"L{layer}.H{h}" for layer in range(30) for h in range(9)] + [f"L{layer}.MLP" for layer in range(30)]
    drawing, remarks = draw(circuit["parts"], circuit["edges"], universe)
    markup = str(drawing.markup)
    assert remarks == []
    nodes = re.findall(r'class="node" data-part="([^"]+)"', markup)
    assert sorted(nodes) == sorted({p["part"] for p in circuit["parts"]} | {"embed", "unembed"})
    edges = re.findall(r'class="edge (pos|neg)" data-a="([^"]+)" data-b="([^"]+)".*?stroke-width="([\d.]+)"', markup)
    assert len(edges) == 200
    by_width = {(a, b): float(w) for _, a, b, w in edges}
    strongest = max(circuit["edges"], key=lambda e: abs(e["score"]))
    key = (strongest["sender"], str(parse_part(strongest["receiver"]).output))
    assert by_width[key] == max(by_width.values())
    signs = {(a, b, s) for s, a, b, _ in edges}
    for e in circuit["edges"]:
        sign = "pos" if e["score"] >= 0 else "neg"
        assert (e["sender"], str(parse_part(e["receiver"]).output), sign) in signs
    centre = {
        p: (float(x), float(y))
        for p, x, y in re.findall(r'data-part="(L\d+\.H\d+)".*?<circle cx="([\d.]+)" cy="([\d.]+)"', markup)
    }
    for p, (x, y) in centre.items():
        for q, (u, v) in centre.items():
            if parse_part(p).layer == parse_part(q).layer and p != q:
                assert y == v and abs(x - u) > 20  # discs of a layer stand level and apart
            elif (parse_part(p).layer or 0) > (parse_part(q).layer or 0):
                assert y < v  # later layers stand higher
    assert markup.count('class="idle"') == len(universe) - len(circuit["parts"])


def test_graph_says_what_it_leaves_out() -> None:
    edges = [{"sender": "embed", "receiver": f"L{i // 9}.H{i % 9}.{s}", "score": i} for i in range(270) for s in "qk"]
    drawing, remarks = draw([], edges)
    assert str(drawing.markup).count("<path") == MOST_EDGES
    assert "400 strongest of 540 edges" in remarks[0]


# ---- what was not measured


def test_missing_tables_are_said_to_be_missing(tmp_path: Path) -> None:
    with Run.start({"command": "circuit", "arguments": {}}, tmp_path) as run:
        run.save_json("summary", {"model": "m", "task": "t", "method": "relp"})
    page = Page(report(Run.open(run.folder)))
    assert page.text.count("Not measured:") == 8
    assert page.specs == [] and "vegaEmbed=" not in page.source  # no bundle for no chart
    assert "None" not in page.text and "nan" not in page.text.lower().split()


def test_unfinished_run_is_marked(tmp_path: Path) -> None:
    with pytest.raises(ValueError), Run.start({"command": "circuit", "arguments": {}}, tmp_path) as run:
        run.save_json("summary", {"model": "m", "task": "t", "method": "relp"})
        raise ValueError("lost <b>power</b>")
    page = Page(report(Run.open(run.folder)))
    assert "This run is failed (ValueError: lost <b>power</b>)" in page.text


def test_bad_tables_are_refused_in_one_line(tmp_path: Path) -> None:
    with Run.start({"command": "circuit", "arguments": {}}, tmp_path) as run:
        run.save_json("summary", {"model": "m", "task": "t", "method": "relp"})
        run.save_table("scores", pd.DataFrame({"part": ["L0.H0"], "value": [1.0]}))
    with pytest.raises(RunError, match=r"scores\.parquet lacks column score \(it has part, value\)"):
        report(Run.open(run.folder))
    (run.folder / "scores.parquet").write_bytes(b"x" * 10)
    with pytest.raises(RunError, match=r"scores\.parquet has 10 bytes instead of"):
        report(Run.open(run.folder))
    with Run.start({"command": "circuit", "arguments": {"n": 1}}, tmp_path) as empty:
        pass
    with pytest.raises(RunError, match="no summary"):
        report(Run.open(empty.folder))
    with Run.start({"command": "circus", "arguments": {}}, tmp_path) as other:
        pass
    with pytest.raises(UnknownName, match="did you mean 'circuit'"):
        report(Run.open(other.folder))


# ---- text from outside


def test_prompts_do_not_become_markup(tmp_path: Path) -> None:
    evil = '</script><script>alert(1)</script><img src=x onerror=alert(2)> & "quotes" {{ 7*7 }} ]]> <!--'
    with Run.start(
        {"command": "circuit", "arguments": {"task": evil, "model": evil}}, tmp_path, command_line=evil
    ) as run:
        run.save_json(
            "summary", {"title": evil, "model": evil, "task": evil, "method": evil, "notes": [evil], "command": evil}
        )
        frame = pd.DataFrame(
            {"part": ["L0.H0", "L0.H1", "L1.MLP"], "kind": ["head", "head", "mlp"], "score": [1.0, -1.0, 0.5]}
        )
        run.save_table("scores", frame)
        run.save_json("circuit", {"parts": [{"part": "L0.H0", "role": evil, "score": 1.0}]})
        example = {"clean": f"a {evil}", "corrupted": f"b {evil}", "answer": [evil], "wrong": evil, "logit_diff": 1.0}
        run.save_json("examples", [example])
        pattern = {"part": "L0.H0", "tokens": [evil, "'\\\" + alert(1) + \u2028"], "pattern": [[1, 0], [0.5, 0.5]]}
        run.save_json("patterns", [pattern])
    page = Page(circuit_report(Run.open(run.folder)))
    tags = [t for t, _ in page.elements]
    assert "img" not in tags
    assert tags.count("script") == len(page.specs) + 2  # the charts, the bundle and the page's own
    assert not any(a for _, attributes in page.elements for a in attributes if a.startswith("on"))
    shown = " ".join(evil.split())
    assert page.text.count(shown) >= 6 and "49" not in page.words
    marked = [i for i, w in enumerate(page.words) if w == "a"]
    assert marked  # the one word in which the prompts differ stands by itself, marked
    (spec,) = page.charts("Attention pattern of")
    labels = spec["encoding"]["x"]["axis"]["labelExpr"]
    assert json.loads(labels.removesuffix("[datum.value]"))[0] == evil  # still one string of a JSON list


# ---- the other reports


def test_reuse_numbers(pages: dict[str, Page]) -> None:
    page = pages["reuse"]
    assert "ioi uses 38 parts and colored-objects uses 38; 24 are the same, where chance would give 4.81." in page.text
    (accuracy,) = page.charts("accuracy on colored-objects")
    values = {r["what"]: r["value"] for r in rows(accuracy)}
    assert values == pytest.approx({"before": 0.30, "control": 0.30, "after": 0.52})
    draws = next(r for r in rows(accuracy) if r["what"] == "control")
    assert draws["low"] == pytest.approx(0.2715) and draws["high"] == pytest.approx(0.3285)
    assert "L17.H4, L19.H2, L20.H0 and L24.H4 as ioi uses them" in page.text
    shared = [a for a in page.attributes("shared") if a.get("data-part")]
    assert len(shared) == 2 * (24 + 0)


def test_compare_numbers(tmp_path: Path, pages: dict[str, Page]) -> None:
    run = compare_run(tmp_path)
    page = pages["compare"]
    table = run.table("matrix").set_index(["a", "b", "kind"])
    heads, mlps, *_ = page.specs
    for spec, kind in ((heads, "head"), (mlps, "mlp")):
        for row in rows(spec):
            assert row["spearman"] == pytest.approx(table.loc[(row["a"], row["b"], kind), "spearman"])
        assert len(rows(spec)) == 16
    assert page.text.count("L0.MLP") == 4


# ---- words


def test_a_training_curve_is_the_log_in_groups_and_says_when_it_is_not_over(
    pages: dict[str, Page], tmp_path: Path
) -> None:
    page = pages["train"]
    run = training_run(tmp_path)
    curve = [r for r in rows(page.charts("Loss by step")[0]) if r["what"] == "training"]
    log = run.table("log")
    assert len(curve) == 300  # 900 steps, three in a group
    assert curve[7]["loss"] == pytest.approx(log["loss"][21:24].mean()) and curve[7]["step"] == 23
    last = run.table("evaluation").iloc[-1]
    assert f"{number(float(last['loss']))} on held-out text (step 800)" in page.text
    assert "1.00 M" in page.text and "6 N T is 0.90 of it" in page.text and "a note" in page.text
    assert 'http-equiv="refresh"' not in page.source
    half = training_run(tmp_path / "half", done=False)
    open_ = Page(train_report(half))
    assert "After 450 of 900 steps" in open_.text and "This run is running" in open_.text
    assert 'http-equiv="refresh"' in open_.source
    half.close()


def test_dynamics_draw_the_head_that_forms(pages: dict[str, Page]) -> None:
    chart = pages["dynamics"].charts("Attention to what followed")[0]
    mine = {r["step"]: r["induction"] for r in rows(chart) if r["part"] == "L1.H2"}
    assert mine[1000] == pytest.approx(0.9) and mine[0] == 0
    domain = chart["layer"][-1]["encoding"]["color"]["scale"]["domain"]
    assert domain[0] == "L1.H2" and len(domain) == 5
    assert "L1.H2 ends at 0.9" in pages["dynamics"].text


def test_a_race_says_when_seeds_overlap(pages: dict[str, Page]) -> None:
    text = pages["race"].text
    assert "adamw ends lowest, at 2.1 nats" in text and "Their seeds overlap." in text and "30 s a run" in text


def test_words() -> None:
    assert [number(x) for x in (0.98333, -12.345, 1536, 1536.2, 123456.7, 1.23e-5, None, float("nan"))] == [
        "0.983", "−12.3", "1536", "1536", "123457", "1.23e−05", "–", "–",
    ]  # fmt: skip
    assert [percent(x) for x in (0.983, 1.0, 0.004, None)] == ["98 %", "100 %", "0.4 %", "–"]
    assert [count(1, "head"), count(34, "head", 270), count(1, "MLP", 30)] == [
        "1 head",
        "34 of 270 heads",
        "1 of 30 MLPs",
    ]
    assert listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a, b and c" and listed([]) == ""
    assert estimate([1, 0.5, 2]) == estimate({"mean": 1, "low": 0.5, "high": 2}) and estimate("x").mean is None
    assert [token(t) for t in ("ĠMary", "▁the", "Ċ", " ", ",")] == ["Mary", "the", "⏎", "␣", ","]
    assert [short_role(r) for r in ("Name Mover", "s-inhibition", "novel")] == ["mov", "inh", "nove"]


def test_colours_tell_sign_and_size() -> None:
    def blue(color: str) -> int:
        return int(color[5:7], 16) - int(color[1:3], 16)

    tones = [shade(v / 10) for v in range(-10, 11)]
    assert shade(0) == "#f1f1ef" and shade(5) == shade(1)
    assert all(blue(t) < 0 for t in tones[:10]) and all(blue(t) > 0 for t in tones[11:])
    light = [sum(int(t[j : j + 2], 16) for j in (1, 3, 5)) for t in tones]
    assert light[10:] == sorted(light[10:], reverse=True) and light[:11] == sorted(light[:11])
