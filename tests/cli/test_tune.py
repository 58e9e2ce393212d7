"""`vesalius tune` as a user meets it, on a model whose mechanism was built in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from cli_helpers import vesalius
from transformers import AutoModelForCausalLM

SMALL = ("--corpus", "none", "--share", "0.01", "--mlps", "0", "--draws", "2", "--steps", "2", "--rows", "4")


def test_it_finds_knocks_out_and_trains(mover: Path, tmp_path: Path) -> None:
    given = ("tune", "--model", mover, "--task", mover / "ioi.jsonl", "--n", "32", "--out", tmp_path, "--json", *SMALL)
    told = vesalius(*given).json
    assert len(told["heads"]) == 1 and [r["tuned"] for r in told["tuned"]] == ["before", "found", "random", "full"]
    out = {r["without"]: r["accuracy"] for r in told["knocked_out"]}
    assert out["nothing"] == 1 and out["found"] < 0.3
    AutoModelForCausalLM.from_pretrained(told["checkpoint"])
    page = Path(told["report"]).read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "What training changed" in page
    assert vesalius(*given).json == told  # the run is found again
    shutil.rmtree(told["checkpoint"])
    again = vesalius(*given).json
    assert again["run"] == told["run"]
    AutoModelForCausalLM.from_pretrained(again["checkpoint"])  # what was deleted is made again
    no = vesalius(*given, "--no-train").json
    assert "tuned" not in no and no["checkpoint"] is None


def test_nonsense_is_one_line(mover: Path, tmp_path: Path) -> None:
    ask = ("tune", "--model", mover, "--task", mover / "ioi.jsonl", "--n", "32", "--out", tmp_path, *SMALL)
    assert "--share 2 is no share" in vesalius(*ask, "--share", "2").error
    assert "unknown task 'sums'" in vesalius(*ask, "--also", "sums").error
    assert "lr=0.0" in vesalius(*ask, "--lr", "0").error


def test_another_text_in_the_same_file_is_another_run(mover: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    common = ("--model", mover, "--task", mover / "ioi.jsonl", "--n", "32", "--out", tmp_path, *SMALL, "--no-train")
    runs = set()
    for word in ("mary", "tom"):
        path.write_text("\n".join(json.dumps({"text": f"{word} and kate " * 40}) for _ in range(16)))
        runs.add(vesalius("tune", *common, "--corpus", path, "--json").json["run"])
    assert len(runs) == 2
