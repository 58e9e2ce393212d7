"""Feed-forward parts: what happens at each position by itself.

    dense  down(act(up(x)))          gated  down(act(gate(x)) * up(x))      (Shazeer 2020, arXiv 2002.05202)

The contract is that of mixers without a cache: `y, losses = part(x)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from vesalius.registry import Registry

if TYPE_CHECKING:
    from vesalius.build.architecture import Architecture


class FeedForward(nn.Module):
    """Two or three matrices and an activation.

    Attributes:
        up, gate, down: the matrices (`gate` of gated ones). act: the activation. activation: its name in transformers.
    """

    gated: ClassVar[bool] = False
    activation: ClassVar[str]

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        if self.gated:
            self.gate = nn.Linear(a.d_model, a.d_ff, bias=a.bias)
        self.up = nn.Linear(a.d_model, a.d_ff, bias=a.bias)
        self.act = ACTIVATIONS[self.activation]()
        self.down = nn.Linear(a.d_ff, a.d_model, bias=a.bias)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        up = self.up(hidden_states)
        inner = self.act(self.gate(hidden_states)) * up if self.gated else self.act(up)
        return self.down(inner), {}

    @classmethod
    def parameters_of(cls, architecture: Architecture) -> int:
        a, matrices = architecture, 3 if cls.gated else 2
        return matrices * a.d_model * a.d_ff + ((matrices - 1) * a.d_ff + a.d_model if a.bias else 0)

    @classmethod
    def flops(cls, architecture: Architecture, length: int) -> int:
        """Multiplications and additions of matrix products for one sequence, forward."""
        return 2 * length * (3 if cls.gated else 2) * architecture.d_model * architecture.d_ff


class _TanhGelu(nn.Module):
    """GELU by the tanh formula of its paper, which GPT-2, BLOOM and T5 1.1 use."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "gelu_new": _TanhGelu, "relu": nn.ReLU, "silu": nn.SiLU}
FEEDFORWARDS: Registry[type[FeedForward]] = Registry("feed-forward")


@FEEDFORWARDS.register("gelu", "two matrices, exact GELU (BERT, GPT-NeoX)", gated=False)
class Gelu(FeedForward):
    """Two matrices and GELU."""

    activation = "gelu"


@FEEDFORWARDS.register("gelu-tanh", "two matrices, GELU by the tanh formula (GPT-2, BLOOM)", gated=False)
class GeluTanh(FeedForward):
    """Two matrices and GELU by the tanh formula."""

    activation = "gelu_new"


@FEEDFORWARDS.register("relu", "two matrices, ReLU (T5)", gated=False)
class Relu(FeedForward):
    """Two matrices and ReLU."""

    activation = "relu"


@FEEDFORWARDS.register("swiglu", "three matrices, SiLU gate (PaLM, Llama)", paper="arXiv 2002.05202", gated=True)
class SwiGlu(FeedForward):
    """Three matrices and a SiLU gate."""

    gated, activation = True, "silu"


@FEEDFORWARDS.register("geglu", "three matrices, exact GELU gate", paper="arXiv 2002.05202", gated=True)
class GeGlu(FeedForward):
    """Three matrices and a GELU gate."""

    gated, activation = True, "gelu"


@FEEDFORWARDS.register("geglu-tanh", "three matrices, tanh GELU gate (T5 1.1)", paper="arXiv 2002.05202", gated=True)
class GeGluTanh(FeedForward):
    """Three matrices and a gate of GELU by the tanh formula."""

    gated, activation = True, "gelu_new"
