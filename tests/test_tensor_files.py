"""Tensors in files: what has two names is written once and read under both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vesalius.checkpoints import load_tensors, save_tensors
from vesalius.errors import RunError


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


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(3)})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RunError, match=r"x\.safetensors cannot be read"):
        load_tensors(path)
