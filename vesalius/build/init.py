"""Initial weights by name: for every tensor a standard deviation from its purpose, and a stream of its own.

The stream of a tensor depends on the seed and on the tensor's name in the parts model alone, so that a stock class and
the parts model of one architecture start from the same numbers, and adding a part leaves the others as they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from vesalius.registry import Registry

if TYPE_CHECKING:
    from vesalius.build.architecture import Architecture

# embedding: token rows. position: learnt positions, segments, biases by distance. head: untied output layer.
# query: makes attention's queries. input: reads the stream. output: writes to it.
Purpose = Literal["embedding", "position", "head", "query", "input", "output"]
Scheme = Callable[["Architecture", Purpose, int], float]  # (architecture, purpose, fan-in) -> standard deviation

INITS: Registry[Scheme] = Registry("init")


@INITS.register("gpt2", "N(0, 0.02); what writes to the stream / sqrt(2 layers)", paper="Radford et al. 2019")
def gpt2(architecture: Architecture, purpose: Purpose, fan_in: int) -> float:
    """Two writes a block, so that the stream's variance does not grow with depth."""
    return 0.02 / (2 * architecture.layers) ** 0.5 if purpose == "output" else 0.02


@INITS.register("bert", "N(0, 0.02) everywhere", paper="arXiv 1810.04805")
def bert(architecture: Architecture, purpose: Purpose, fan_in: int) -> float:
    """One deviation for all."""
    return 0.02


@INITS.register(
    "neox", "small init sqrt(2 / 5d) for inputs, Wang's 2 / (layers sqrt(d)) for outputs", paper="arXiv 2204.06745"
)
def neox(architecture: Architecture, purpose: Purpose, fan_in: int) -> float:
    """Pythia's: Nguyen and Salazar's small init (arXiv 1910.05895), and the output layers of Wang and Komatsuzaki."""
    d = architecture.d_model
    return float(2 / (architecture.layers * d**0.5) if purpose == "output" else (2 / (5 * d)) ** 0.5)


@INITS.register("palm", "N(0, 1 / fan-in); embeddings N(0, 1), to go with logits / sqrt(d)", paper="arXiv 2204.02311")
def palm(architecture: Architecture, purpose: Purpose, fan_in: int) -> float:
    """Fan-in scaling of all maps."""
    return 1.0 if purpose == "embedding" else fan_in**-0.5


@INITS.register("t5", "N(0, 1 / fan-in); embeddings N(0, 1); T5's unscaled queries smaller", paper="arXiv 1910.10683")
def t5(architecture: Architecture, purpose: Purpose, fan_in: int) -> float:
    """As `palm`; where scores are not divided by sqrt(d_head), queries are. Biases by distance as T5."""
    if purpose == "embedding":
        return 1.0
    if purpose == "position":
        return float(architecture.d_model**-0.5)
    unscaled = purpose == "query" and not architecture.scaled_scores
    return float(fan_in**-0.5 * (architecture.d_head**-0.5 if unscaled else 1.0))


def purpose_of(name: str) -> Purpose:
    """What a matrix of the parts model is for, by its name."""
    if name.endswith("embed.weight"):
        return "embedding"
    if ".positions." in name or "token_types" in name:
        return "position"
    if name == "lm_head.weight":
        return "head"
    if name.endswith(".q.weight"):
        return "query"
    return "output" if name.endswith((".o.weight", ".down.weight")) else "input"


def fresh(name: str, shape: Sequence[int], architecture: Architecture, seed: int) -> Tensor:
    """The initial value of one parameter: gains are 1, biases 0, matrices N(0, std) from the stream of their name.

    Args:
        name: in the parts model. seed: same seed, same weights.

    Returns:
        float32 on the CPU, so alike everywhere.
    """
    if len(shape) < 2:
        return torch.full(tuple(shape), 1.0 if name.endswith("weight") else 0.0)
    # linear maps are (out, in); the recurrence of an LSTM is (head, in, out)
    std = INITS.get(architecture.init)(architecture, purpose_of(name), shape[1])
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(tuple(shape), generator=generator) * std
