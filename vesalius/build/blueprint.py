"""Transformers with weights set by hand: heads and neurons described by what they read and write, drawn as matrices.

The residual stream is divided into orthogonal subspaces of named *features* (the current token, its position, whatever
a planted head adds), turned by a random rotation so that no neuron of the stream is special. With features f(x) of the
residual x, a planted head is given by a few bilinear forms of f at the query and at the key (its attention score, in
logits), and by a linear map from features read at the key to features written at the query. Everything else in the
model is idle: random heads and neurons that read all features and write into a subspace that nothing reads.

Norms are made harmless by one large constant coordinate, the ballast, orthogonal to all features and (for LayerNorm) to
the vector of ones: |x| = sqrt(ballast^2 + |f|^2) changes by about |f|^2 / (2 ballast^2), some 1e-5, from token to
token, and the norm's gain undoes the division, so that norm(x) = x to that accuracy. The ballast also serves as the
constant 1 that heads without biases need. It makes these models unfit for half precision.

Positions. GPT-2 has learnt position embeddings: one feature a position. In Llama positions exist only as rotations of
queries and keys, by angle w_k a token in plane k, w_k = base^(-2k / d_head). A head that looks for an offset gets
constant queries and keys in the fast planes, so that keys at distance t score K(t) = sum_k Re(c_k e^(i w_k t)). To seek
offset s, c_k is proportional to w_k^2 e^(-i w_k s): K peaks at s and is lower by a quarter or more everywhere else. To
avoid itself (t = 0), c_k is fitted so that K(0) = 1 and |K(t)| < 0.005 from t = 5 on; in between K falls gradually.
Matching of tokens goes through the slow planes, which hardly turn over the length of a prompt (cos > 0.99).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.parts import Part

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Base = Literal["gpt2", "llama"]
BASES: tuple[Base, ...] = ("gpt2", "llama")

BALLAST = 128.0  # large enough that norms vary by less than 1e-4, small enough to leave float32 its last digits
LONGEST = 32  # tokens in a prompt
ROTARY_BASE = 1e4  # Llama's own
FAST = 0.018  # radians a token: faster planes carry offsets, slower ones tokens
SPECIAL = ("<pad>", "<unk>", "<end>")

# Shape asked of K(t), t = 0, 1, ..., when avoiding oneself; 1 to 4 only lightly: a sharper one needs faster planes.
_DECAY = (1.0, 0.7, 0.35, 0.1, 0.02)


class _Term(NamedTuple):
    """One product in an attention score: what the query reads times what the key reads, (feature,) each."""

    query: Tensor
    key: Tensor


class _Offset(NamedTuple):
    """A score for the key `offset` tokens back: sought if positive, avoided if negative."""

    offset: int
    score: float


class _HeadWeights(NamedTuple):
    """One head in feature coordinates, q, k, v (feature, d_head) and out (d_head, feature), or a block of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


class _MlpWeights(NamedTuple):
    """An MLP in feature coordinates: read and gate (feature, neuron), write (neuron, feature).

    A neuron is act(read . f), times (gate . f) in Llama; GPT-2 has no use for `gate`.
    """

    read: Tensor
    gate: Tensor
    write: Tensor


@dataclass
class HeadPlan:
    """A planted head under construction; all vectors are over features, (feature,).

    Where nothing else scores, a head should rest on the opening word, whose value is 0: then it writes nothing.
    """

    part: Part
    opening: Tensor  # 1 where the token is an opening word
    terms: list[_Term] = field(default_factory=list)
    offsets: list[_Offset] = field(default_factory=list)
    reads: list[Tensor] = field(default_factory=list)
    writes: list[Tensor] = field(default_factory=list)

    def score(self, query: Tensor, key: Tensor) -> None:
        """Adds (query . f_query)(key . f_key) to the attention score, in logits."""
        self.terms.append(_Term(query, key))

    def rest(self, query: Tensor) -> None:
        """Adds query . f_query at the opening word."""
        self.score(query, self.opening)

    def seek(self, offset: int, score: float) -> None:
        """Adds `score` at the key `offset` tokens back, at most 0 at others, and 0 at the opening word."""
        self.offsets.append(_Offset(offset, score))

    def avoid_self(self, score: float) -> None:
        """Takes `score` off where key and query are one token; with rotary positions also some of it up to 4 tokens on.

        The opening word keeps its score.
        """
        self.offsets.append(_Offset(0, -score))

    def copy(self, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        """Moves each read feature of the attended token to the paired feature of the attending one."""
        self.reads.extend(reads)
        self.writes.extend(writes)


class Blueprint:
    """A model in feature coordinates; `build()` turns it into a Hugging Face model.

    Args:
        base: `gpt2` or `llama`.
        n_layers: blocks.
        n_heads: heads in each block, planted and idle.
        words: the vocabulary, without the special tokens.
        openings: the words among them that a prompt can begin with, and nothing else.
        spaces: names and sizes of the subspaces that planted parts write and read, besides `token`.
        seed: of the rotation, of where in its block each planted part sits, and of all idle weights.
    """

    def __init__(
        self,
        base: Base,
        n_layers: int,
        n_heads: int,
        words: Sequence[str],
        openings: Sequence[str],
        spaces: Mapping[str, int],
        seed: int,
    ) -> None:
        self.base: Base = base
        self.n_layers, self.n_heads = n_layers, n_heads
        self.vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
        sizes = {"constant": 1, "token": len(self.vocabulary), **spaces}
        if base == "gpt2":
            sizes["position"] = LONGEST
        needed = sum(sizes.values()) + 1 + 16  # the vector of ones, and some room for the idle parts
        self.d_head = max(64, 2 * math.ceil(max(256, needed) / (2 * n_heads)))
        self.d_model = n_heads * self.d_head
        sizes["idle"] = self.d_model - 1 - sum(sizes.values())
        self._start: dict[str, int] = {}
        self._size = sizes
        at = 0
        for name, size in sizes.items():
            self._start[name] = at
            at += size
        self.n_features = at
        self.d_mlp = self.d_model
        self.openings = tuple(openings)
        # kv heads are shared by two query heads in Llama where that is possible, as in most of today's models
        self.n_kv_heads = n_heads // 2 if base == "llama" and n_heads % 2 == 0 else n_heads
        self._random = torch.Generator().manual_seed(seed)
        self._planted_at = torch.randint(n_heads, (n_layers,), generator=self._random).tolist()
        self._heads: dict[int, HeadPlan] = {}
        self._neurons: dict[int, tuple[Tensor, Tensor]] = {}
        self._logits: tuple[list[int], Tensor] = ([], torch.zeros(0, self.n_features, dtype=torch.float64))

    # features ---------------------------------------------------------------------------------------------------------

    def feature(self, space: str, index: int = 0) -> Tensor:
        """The functional that reads one feature, which is also the direction that writes it, (feature,)."""
        out = torch.zeros(self.n_features, dtype=torch.float64)
        out[self._start[space] + index] = 1.0
        return out

    def all_of(self, space: str) -> Tensor:
        """The sum of a subspace's features, (feature,)."""
        out = torch.zeros(self.n_features, dtype=torch.float64)
        out[self._start[space] : self._start[space] + self._size[space]] = 1.0
        return out

    def token(self, word: str) -> Tensor:
        """The feature that is 1 where the token is `word`, (feature,)."""
        return self.feature("token", self.vocabulary[word])

    def any_token(self, words: Sequence[str]) -> Tensor:
        """1 where the token is one of `words`, (feature,)."""
        return torch.stack([self.token(word) for word in words]).sum(dim=0)

    @property
    def one(self) -> Tensor:
        """The constant 1, (feature,)."""
        return self.feature("constant") / BALLAST

    # parts ------------------------------------------------------------------------------------------------------------

    def head(self, layer: int) -> HeadPlan:
        """A new planted head in this layer, at most one a layer, at a place that the seed decides."""
        plan = HeadPlan(Part("head", layer, int(self._planted_at[layer])), self.any_token(self.openings))
        self._heads[layer] = plan
        return plan

    def neurons(self, layer: int, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> Part:
        """Planted MLP neurons: act(reads[i] . f) writes[i], with act the model's own activation."""
        self._neurons[layer] = (torch.stack(list(reads)), torch.stack(list(writes)))
        return Part("mlp", layer)

    def logits(self, words: Sequence[str], reads: Sequence[Tensor]) -> None:
        """The logit of each of these words as a reading of the final residual; all others are 0."""
        self._logits = ([self.vocabulary[word] for word in words], torch.stack(list(reads)))

    # drawing ----------------------------------------------------------------------------------------------------------

    def _normal(self, *shape: int, std: float) -> Tensor:
        return std * torch.randn(*shape, generator=self._random, dtype=torch.float64)

    def _basis(self) -> Tensor:
        """Orthonormal rows, one a feature, all orthogonal to the vector of ones, (feature, d_model)."""
        square = self._normal(self.d_model, self.d_model, std=1.0)
        square[:, 0] = 1.0
        return torch.linalg.qr(square).Q[:, 1:].T

    def _planted_head(self, plan: HeadPlan) -> _HeadWeights:
        speed = _fast_planes(self.d_head)
        half = self.d_head // 2
        terms = list(plan.terms)
        q, k, v = (torch.zeros(self.n_features, self.d_head, dtype=torch.float64) for _ in range(3))
        out = torch.zeros(self.d_head, self.n_features, dtype=torch.float64)
        key = self.one - plan.opening
        for offset, score in plan.offsets:
            if self.base == "gpt2":
                # f_position at the query, moved back by `offset`, must equal f_position at the key
                terms += [
                    _Term(score * self.feature("position", p), self.feature("position", p - offset))
                    for p in range(offset, LONGEST)
                ]
                continue
            if score > 0:
                wave, gap = _seeking(speed, offset)
                # the peak must be `score` above the rest, which is then brought down to 0
                scale = score / gap
                terms.append(_Term((score - scale) * self.one, key))
            else:
                wave, scale = _avoiding(speed), score
            wave = scale * math.sqrt(self.d_head) * wave
            planes = len(speed)
            q[:, :planes] += torch.outer(self.one, wave.real)
            q[:, half : half + planes] += torch.outer(self.one, wave.imag)
            k[:, :planes] += key[:, None]
        if self.base == "gpt2":
            places = list(range(self.d_head))
        else:  # the slowest planes first
            places = [d for plane in range(half - 1, len(speed) - 1, -1) for d in (plane, plane + half)]
        if len(terms) > len(places) or len(plan.reads) > self.d_head:
            raise VesaliusError(
                f"planted head {plan.part} needs {len(terms)} dimensions for its scores and {len(plan.reads)} for its "
                f"values, and has {len(places)} and {self.d_head}; plant fewer words"
            )
        for place, term in zip(places, terms, strict=False):
            q[:, place] += math.sqrt(self.d_head) * term.query
            k[:, place] += term.key
        for d, (read, write) in enumerate(zip(plan.reads, plan.writes, strict=True)):
            v[:, d], out[d] = read, write
        return _HeadWeights(q, k, v, out)

    def _idle_head(self) -> _HeadWeights:
        """Reads every feature but the constant, attends unevenly, writes a vector of length about 0.4 to `idle`."""
        n = self.n_features
        q, k = self._normal(n, self.d_head, std=1.0), self._normal(n, self.d_head, std=1.0)
        v = self._normal(n, self.d_head, std=self.d_head**-0.5)
        q[0] = k[0] = v[0] = 0.0
        out = torch.zeros(self.d_head, n, dtype=torch.float64)
        idle = self._size["idle"]
        out[:, self._start["idle"] :] = self._normal(self.d_head, idle, std=0.3 * idle**-0.5)
        return _HeadWeights(q, k, v, out)

    def _attention(self, layer: int) -> _HeadWeights:
        """All heads of a layer side by side; k and v once for each key-value head."""
        heads = [self._idle_head() for _ in range(self.n_heads)]
        group = self.n_heads // self.n_kv_heads
        sources = list(range(0, self.n_heads, group))  # whose keys and values each kv head has
        if layer in self._heads:
            plan = self._heads[layer]
            index = plan.part.index or 0
            heads[index] = self._planted_head(plan)
            sources[index // group] = index
        return _HeadWeights(
            torch.cat([head.q for head in heads], dim=1),
            torch.cat([heads[i].k for i in sources], dim=1),
            torch.cat([heads[i].v for i in sources], dim=1),
            torch.cat([head.out for head in heads], dim=0),
        )

    def _mlp(self, layer: int) -> _MlpWeights:
        """The planted neurons at random places, if any; the others read everything and write to `idle`."""
        n, m, idle = self.n_features, self.d_mlp, self._size["idle"]
        read, gate = self._normal(n, m, std=1.0), self._normal(n, m, std=1.0)
        read[0] = gate[0] = 0.0
        write = torch.zeros(m, n, dtype=torch.float64)
        write[:, self._start["idle"] :] = self._normal(m, idle, std=0.2 * (m * idle) ** -0.5)
        if layer in self._neurons:
            reads, writes = self._neurons[layer]
            chosen = torch.randperm(m, generator=self._random)[: len(reads)]
            read[:, chosen], gate[:, chosen], write[chosen] = reads.T, self.one[:, None], writes
        return _MlpWeights(read, gate, write)

    def build(self) -> PreTrainedModel:
        """The model, float32, in evaluation mode. The same blueprint builds it once: idle weights are drawn here."""
        model = self._empty()
        basis = self._basis()  # (feature, d_model)
        state: dict[str, Tensor] = {}
        token = torch.stack([self.feature("token", i) for i in range(len(self.vocabulary))])
        embedding = (token + BALLAST * self.feature("constant")) @ basis
        size = math.sqrt(BALLAST**2 + 1 + (self.base == "gpt2"))
        gain = torch.full((self.d_model,), size / math.sqrt(self.d_model), dtype=torch.float64)
        unembedding = torch.zeros(len(self.vocabulary), self.d_model, dtype=torch.float64)
        unembedding[self._logits[0]] = self._logits[1] @ basis
        state["lm_head.weight"] = unembedding
        for layer in range(self.n_layers):
            q, k, v, out = self._attention(layer)
            read, gate, write = self._mlp(layer)
            q, k, v, read, gate = (basis.T @ w for w in (q, k, v, read, gate))
            out, write = out @ basis, write @ basis
            if self.base == "gpt2":  # Conv1D: (in, out)
                at = f"transformer.h.{layer}."
                state |= {at + "ln_1.weight": gain, at + "ln_2.weight": gain}
                state |= {at + "attn.c_attn.weight": torch.cat([q, k, v], dim=1), at + "attn.c_proj.weight": out}
                state |= {at + "mlp.c_fc.weight": read, at + "mlp.c_proj.weight": write}
            else:  # Linear: (out, in)
                at = f"model.layers.{layer}."
                state |= {at + "input_layernorm.weight": gain, at + "post_attention_layernorm.weight": gain}
                for name, w in (("q", q), ("k", k), ("v", v), ("o", out)):
                    state[f"{at}self_attn.{name}_proj.weight"] = w.T
                for name, w in (("gate", read), ("up", gate), ("down", write)):
                    state[f"{at}mlp.{name}_proj.weight"] = w.T
        if self.base == "gpt2":
            position = torch.stack([self.feature("position", p) for p in range(LONGEST)])
            state |= {"transformer.wte.weight": embedding, "transformer.wpe.weight": position @ basis}
            state["transformer.ln_f.weight"] = gain
        else:
            state |= {"model.embed_tokens.weight": embedding, "model.norm.weight": gain}
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.zero_()  # GPT-2's biases stay so
                if name in state:
                    parameter.copy_(state[name].to(parameter))
        missing = sorted(set(state) - set(parameters))
        if missing:
            raise VesaliusError(f"this transformers names {self.base}'s weights differently: no {missing[0]}")
        return model.eval()

    def _empty(self) -> PreTrainedModel:
        """A model of the right shape, its weights not yet set."""
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

        ends = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
        if self.base == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=len(self.vocabulary),
                    n_positions=LONGEST,
                    n_embd=self.d_model,
                    n_layer=self.n_layers,
                    n_head=self.n_heads,
                    n_inner=self.d_mlp,
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    tie_word_embeddings=False,
                    **ends,
                )
            )
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.vocabulary),
                max_position_embeddings=LONGEST,
                hidden_size=self.d_model,
                intermediate_size=self.d_mlp,
                num_hidden_layers=self.n_layers,
                num_attention_heads=self.n_heads,
                num_key_value_heads=self.n_kv_heads,
                head_dim=self.d_head,
                rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
                tie_word_embeddings=False,
                **ends,
            )
        )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a word, words separated by white space, no special token added; pads on the left."""
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import WhitespaceSplit
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(WordLevel(self.vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<pad>",
            unk_token="<unk>",
            eos_token="<end>",
            padding_side="left",
            model_max_length=LONGEST,
            clean_up_tokenization_spaces=False,
        )


def _fast_planes(d_head: int) -> Tensor:
    """Angles a token w_k of the rotary planes used for offsets, (plane,)."""
    speed = ROTARY_BASE ** (-2 * torch.arange(d_head // 2, dtype=torch.float64) / d_head)
    return speed[speed > FAST]


def _seeking(speed: Tensor, offset: int) -> tuple[Tensor, float]:
    """c_k with K(offset) = 1, complex (plane,), and how far below 1 K stays at all other distances."""
    weight = speed**2 / (speed**2).sum()
    away = torch.arange(1, LONGEST, dtype=torch.float64)
    gap = 1 - float((torch.cos(away[:, None] * speed) @ weight).max())
    return torch.polar(weight, -speed * offset), gap


def _avoiding(speed: Tensor) -> Tensor:
    """c_k with K(0) = 1 and K close to 0 from distance 5 on, complex (plane,)."""
    t = torch.arange(LONGEST, dtype=torch.float64)
    wanted, weight = torch.zeros_like(t), torch.ones_like(t)
    wanted[: len(_DECAY)] = torch.tensor(_DECAY, dtype=torch.float64)
    weight[1 : len(_DECAY)] = 0.01
    angle = t[:, None] * speed
    waves = torch.cat([torch.cos(angle), -torch.sin(angle)], dim=1)  # (distance, plane * 2): real and imaginary parts
    # ridge regression: a little of it keeps the amplitudes near 1 at no cost in shape
    gram = waves.T @ (weight[:, None] * waves) + 1e-6 * torch.eye(2 * len(speed), dtype=torch.float64)
    real, imaginary = torch.linalg.solve(gram, waves.T @ (weight * wanted)).chunk(2)
    return torch.complex(real, imaginary)
