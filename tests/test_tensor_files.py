"""Tensors in files: what has two names is written once and read under both."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vesalius.checkpoints import load_tensors, save_tensors, write
from vesalius.errors import RunError
from vesalius.records import write_atomic


def test_a_tensor_with_two_names_is_written_once(tmp_path: Path) -> None:
    weight, other = torch.randn(50, 40), torch.randn(50, 40)
    tied = {"head": weight, "embed": weight, "plain": other, "rows": weight[:10], "empty": torch.zeros(0), "none":
            torch.zeros(0)}  # fmt: skip
    save_tensors(tmp_path / "tied.safetensors", tied)
    found = load_tensors(tmp_path / "tied.safetensors")
    assert found.keys() == tied.keys() and all(torch.equal(found[k], v) for k, v in tied.items())
    assert (tmp_path / "tied.safetensors").stat().st_size < 4 * (2 * 2000 + 400) + 1000
    save_tensors(tmp_path / "again.safetensors", dict(reversed(tied.items())))
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "tied.safetensors").read_bytes()


def test_a_file_is_readable_as_others_beside_it(tmp_path: Path) -> None:
    """A colleague reads a shared lens or checkpoint: safetensors alone would keep it to its owner."""
    before = os.umask(0o022)
    try:
        write_atomic(tmp_path / "lens.safetensors", lambda path: save_tensors(path, {"a": torch.ones(3)}))
        write(tmp_path / "model", lambda folder: save_tensors(folder / "model.safetensors", {"a": torch.ones(3)}))
    finally:
        os.umask(before)
    files = (tmp_path / "lens.safetensors", tmp_path / "model" / "model.safetensors")
    assert [oct(f.stat().st_mode & 0o777) for f in files] == ["0o644", "0o644"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(3)})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RunError, match=r"x\.safetensors cannot be read"):
        load_tensors(path)
