"""Mixers: what moves information between positions. A new one is a new file here and a line in this table."""

from vesalius.build.mixers.base import Context, Mixer, Store
from vesalius.registry import Registry

MIXERS: Registry[type[Mixer]] = Registry("mixer")
MIXERS.add(
    "attn",
    "vesalius.build.mixers.attention:Attention",
    "softmax attention; with kv_heads < heads, keys and values are shared by groups of heads",
    paper="arXiv 1706.03762, 1911.02150, 2305.13245",
)
MIXERS.add(
    "qlstm",
    "vesalius.build.mixers.qlstm:QuasiLstm",
    "LSTM whose gates see the input only, computed in parallel blocks",
    paper="arXiv 2309.11197",
)
MIXERS.add("lstm", "vesalius.build.mixers.qlstm:Lstm", "LSTM by heads, one step at a time", paper="arXiv 2309.11197")
MIXERS.add(
    "ngram",
    "vesalius.build.mixers.ngram:Ngram",
    "hard-wired n-gram heads: the mean of what stood after earlier occurrences of the last 1, 2, 3 tokens",
    paper="arXiv 2401.12973",
)

__all__ = ["MIXERS", "Context", "Mixer", "Store"]
