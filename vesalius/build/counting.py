"""What an architecture costs, from its shape alone: parameters, forward FLOPs, bytes kept while generating.

FLOPs count a multiplication and an addition as two, and matrix products only, as `torch.utils.flop_counter` does; the
attention map is counted whole, masked entries too.
"""

from __future__ import annotations

from vesalius.build.architecture import Architecture
from vesalius.build.feedforwards import FEEDFORWARDS
from vesalius.build.mixers import MIXERS


def parameters(architecture: Architecture, embeddings: bool = True) -> int:
    """How many numbers the model learns, tied ones once.

    Args:
        embeddings: with token, position and segment vectors and the output layer, or the blocks and norms alone.
    """
    a = architecture
    norm = a.d_model * (2 if a.norm.bias else 1)
    if a.kind == "encoder-decoder":
        encoder, decoder = (parameters(a.side(which), embeddings) for which in ("encoder", "decoder"))
        cross = a.layers * (MIXERS.get("attn").parameters_of(a) + norm)
        shared = a.vocab_size * a.d_model * (1 if a.tied else 2) if embeddings else 0  # counted on both sides
        return encoder + decoder + cross - shared
    count = sum(MIXERS.get(name).parameters_of(a) for name in a.stack)
    count += a.layers * (FEEDFORWARDS.get(a.feed_forward).parameters_of(a) + norm)
    count += 0 if a.block == "parallel-shared" else a.layers * norm
    count += norm * ((a.norm.place == "pre") + a.norm.embedding)
    if not embeddings:
        return count
    count += a.vocab_size * a.d_model * (1 if a.tied else 2) + a.token_types * a.d_model
    count += {"learned": a.max_length * a.d_model, "t5": a.positions.buckets * a.heads}.get(a.positions.kind, 0)
    if a.head == "transform":
        count += a.d_model**2 + a.d_model + norm + a.vocab_size
    return count


def flops(architecture: Architecture, length: int, source: int | None = None) -> int:
    """Forward FLOPs of one sequence, output layer included.

    Args:
        length: tokens. source: for an encoder-decoder, tokens of the encoder; `length` is then the decoder's.
    """
    a = architecture
    if a.kind == "encoder-decoder":
        if source is None:
            from vesalius.errors import VesaliusError

            raise VesaliusError(
                "flops of an encoder-decoder need source, the encoder's length; give flops(a, 114, 512)"
            )
        blocks = _block_flops(a.side("encoder"), source) + _block_flops(a.side("decoder"), length)
        return blocks + a.layers * cross_flops(a, length, source) + 2 * length * a.d_model * a.vocab_size
    count = _block_flops(a, length)
    count += 2 * length * a.d_model * a.d_model if a.head == "transform" else 0
    return count + 2 * length * a.d_model * a.vocab_size


def cross_flops(architecture: Architecture, length: int, source: int) -> int:
    """FLOPs of one layer's cross-attention: queries and outputs of the decoder, keys and values of the encoder."""
    a = architecture
    inner, shared = a.heads * a.d_head, a.kv_heads * a.d_head
    return 4 * (length * inner + source * shared) * a.d_model + 4 * length * source * inner


def _block_flops(a: Architecture, length: int) -> int:
    feed = a.layers * FEEDFORWARDS.get(a.feed_forward).flops(a, length)
    return sum(MIXERS.get(name).flops(a, length) for name in a.stack) + feed


def cache_bytes(architecture: Architecture, length: int, itemsize: int = 4) -> int:
    """Bytes kept for one sequence of this length while generating (its decoder's own, without cross-attention)."""
    return sum(MIXERS.get(name).state_bytes(architecture, length, itemsize) for name in architecture.stack)
