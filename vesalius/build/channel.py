"""A planted channel: one weak component of one head, among 31 stronger ones, that one later head reads.

Two layers of 16 attention heads (d_head 32, d_model 256) without norms and MLPs. The sender's output matrix has 32
orthonormal components; the weakest writes a direction v that nothing else writes. One of the receiver's 32 dimensions
reads v, with its queries, keys or values; everything else is random. Read with its values, v becomes w, the only
direction on which the logits of two tokens lie, so the answer to every prompt goes through this one component.

The undecomposed composition score of the pair is lost among those of the 255 others: the case for decomposing (Merullo
et al. 2024, arXiv 2406.09519).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from vesalius.errors import UnknownName
from vesalius.parts import Edge, Part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Side = Literal["q", "k", "v"]
D_MODEL, HEADS, D_HEAD, VOCABULARY = 256, 16, 32, 8
READS = (0.0, 0.0, 0.0, 1.0, -1.0, 2.0, -2.0, 0.5)  # of each token, along what the planted component reads


@dataclass(frozen=True)
class PlantedChannel:
    """A model with one channel.

    Attributes:
        hf: `LlamaForCausalLM` whose norms are taken out, float32, without a tokenizer.
        edge: the channel, such as `L0.H3->L1.H11.v`. component: its number in the sender, the largest first.
        direction: what the component writes, (d_model,). right, wrong: tokens whose logits it moves, if read by values.
    """

    hf: PreTrainedModel
    edge: Edge
    component: int
    direction: Tensor
    right: int = 1
    wrong: int = 2


def planted_channel(side: str = "v", seed: int = 0, strength: float = 0.5) -> PlantedChannel:
    """Makes the model.

    Args:
        side: what of the receiver reads the channel: `q`, `k` or `v`.
        seed: of everything random. strength: singular value of the planted component; the others have 1 to 2.

    Example:
        >>> planted_channel("v").edge
        L0.H3->L1.H11.v
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if side not in get_args(Side):
        raise UnknownName("side", side, get_args(Side))
    sender, receiver = 3, 11
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=D_HEAD,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    hf = LlamaForCausalLM(config).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    special = torch.linalg.qr(torch.randn(D_MODEL, 3, generator=g)).Q.T  # what is read, written, and said in the end
    read, written, said = special

    def drawn(rows: int) -> Tensor:
        """Random rows of the stream, orthogonal to the three, (row, d_model), entries of variance 1."""
        x = torch.randn(rows, D_MODEL, generator=g)
        return x - x @ special.T @ special

    def basis(first: Tensor) -> Tensor:
        """Orthonormal rows, the first one given, (d_head, d_model)."""
        q = torch.linalg.qr(torch.cat([first[None], drawn(D_HEAD - 1)]).T).Q.T
        return q * (q[0] @ first).sign()

    for block in hf.model.layers:
        block.input_layernorm = block.post_attention_layernorm = nn.Identity()
        block.mlp.down_proj.weight.zero_()
        for name in ("q_proj", "k_proj"):  # attention is spread evenly
            getattr(block.self_attn, name).weight.copy_(1e-3 * drawn(HEADS * D_HEAD))
        block.self_attn.v_proj.weight.copy_(drawn(HEADS * D_HEAD) / D_MODEL**0.5)
        block.self_attn.o_proj.weight.copy_(drawn(HEADS * D_HEAD).T / D_MODEL**0.5)
    hf.model.norm = nn.Identity()
    first, second = (block.self_attn for block in hf.model.layers)
    sizes = torch.linspace(1.0, 2.0, D_HEAD)
    sizes[0] = strength
    mine = slice(sender * D_HEAD, (sender + 1) * D_HEAD)
    first.v_proj.weight[mine] = basis(read)
    first.o_proj.weight[:, mine] = (sizes[:, None] * basis(written)).T
    row = receiver * D_HEAD
    reader = getattr(second, f"{side}_proj").weight
    reader[row] = written * reader[row + 1].norm()
    if side == "v":
        out = second.o_proj.weight
        out[:, row] = said * out[:, row + 1].norm()
    embed, unembed = drawn(VOCABULARY) + torch.outer(torch.tensor(READS), read), drawn(VOCABULARY)
    unembed[1], unembed[2] = 50 * said, -50 * said
    hf.model.embed_tokens.weight.copy_(embed)
    hf.lm_head.weight.copy_(unembed)
    edge = Edge(Part("head", 0, sender), Part("head", 1, receiver, side))
    return PlantedChannel(hf, edge, int((sizes > strength).sum()), written)
