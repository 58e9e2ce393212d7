"""Folders that are written whole or not at all, by one process at a time."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from vesalius import checkpoints
from vesalius.errors import RunError

OTHER = """
import sys, time
from pathlib import Path
from vesalius import checkpoints

def fill(part):
    (part / "a.txt").write_text("theirs")
    Path(sys.argv[2]).touch()
    while Path(sys.argv[2]).exists():
        time.sleep(0.01)

checkpoints.write(Path(sys.argv[1]), fill)
"""


def _ours(part: Path) -> None:
    (part / "a.txt").write_text("ours")


def test_two_processes_with_one_place_in_mind(tmp_path: Path) -> None:
    place, busy = tmp_path / "model", tmp_path / "busy"
    other = subprocess.Popen([sys.executable, "-c", OTHER, str(place), str(busy)])
    try:
        while not busy.exists():
            assert other.poll() is None
            time.sleep(0.01)
        with pytest.raises(RunError, match=f"process {other.pid} .*wait for it.*or choose another"):
            checkpoints.write(place, _ours, "free some space, or choose another folder")
        busy.unlink()
        assert other.wait() == 0
    finally:
        other.kill()
    assert (place / "a.txt").read_text() == "theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert sorted(p.name for p in place.iterdir()) == ["a.txt", checkpoints.MANIFEST]


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / "model.part"
    (left / "deep").mkdir(parents=True)
    (left / "deep" / "half.bin").write_bytes(b"x")
    (left / "lock").write_text('{"pid": 999999999, "host": "gone"}')
    (left / "half.txt").write_text("x")
    checkpoints.write(tmp_path / "model", _ours)
    assert list(checkpoints.manifest(tmp_path / "model")) == ["a.txt"]
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["a.txt", checkpoints.MANIFEST]
    assert not left.exists()


def test_a_damaged_folder_is_written_again(tmp_path: Path) -> None:
    place = checkpoints.write(tmp_path / "model", _ours)
    (place / "a.txt").write_text("edited")
    assert checkpoints.troubles(place)
    checkpoints.write(place, _ours)
    assert (place / "a.txt").read_text() == "ours" and not checkpoints.troubles(place)
