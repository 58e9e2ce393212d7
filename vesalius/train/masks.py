"""Who may read whom: one description of an attention mask, and the form each kind of attention takes it in.

A mask is a product: a shape (causal, full, or causal with a part that is read both ways) times documents packed into
one row times padding. Position t may read position s where

    (s <= t  or  s belongs to the two-way part  or  the shape is full)  and  document(s) = document(t) != padding

Padding reads itself alone, so that no softmax is empty, and nothing reads it. Where positions are counted from
(the row or the document) is a separate choice: `positions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vesalius.errors import VesaliusError

PADDING = -1  # the document number of padding
BROKEN_BY_MASK = "builds its distance bias from a mask of padding, (row, pos), and takes no other"

# Families whose stock classes were seen to attend exactly where a given (row, 1, query, key) mask allows
# (tests/train/test_masks.py, gradient over all pairs).
TAKES_MASK = frozenset(
    ("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gptj")
    + ("opt", "bert", "roberta", "distilbert", "t5")
)
REFUSES_MASK = {"bloom": BROKEN_BY_MASK, "mpt": BROKEN_BY_MASK}
RELATIVE = frozenset({"t5", "bloom", "mpt"})  # no position numbers to restart: only distances matter
BY_MASK = frozenset({"opt"})  # read position numbers off a mask of padding, unless they are given
OFFSET = frozenset({"roberta", "xlm-roberta", "camembert", "longformer"})  # count positions from pad_token_id + 1


@dataclass(frozen=True)
class Mask:
    """A description of who may read whom; built by `causal`, `full`, `prefix` or `cross`.

    Attributes:
        shape: `causal` (each reads itself and what is before) or `full` (each reads all).
        query: document of each reading position, (row, query) integers; -1 for padding.
        key: document of each position read, (row, key); the same tensor as `query` in self-attention.
        both_ways: (row, key) bool, positions of the part that is read both ways; None for none.
    """

    shape: Literal["causal", "full"]
    query: Tensor
    key: Tensor
    both_ways: Tensor | None = None

    @staticmethod
    def causal(segments: Tensor) -> Mask:
        """Each position reads its document up to itself; segments (row, pos)."""
        return Mask("causal", segments, segments)

    @staticmethod
    def full(segments: Tensor) -> Mask:
        """Each position reads its whole document; segments (row, pos)."""
        return Mask("full", segments, segments)

    @staticmethod
    def prefix(segments: Tensor, prefix: Tensor) -> Mask:
        """Causal, but the prefix is read by its whole document.

        Args:
            segments: (row, pos) document numbers.
            prefix: (row, pos) bool, or (row,) lengths counted from the start of each document of the row.

        Example:
            >>> one_document = torch.zeros(1, 3, dtype=torch.long)
            >>> Mask.prefix(one_document, torch.tensor([2])).allowed()[0, 0].int().tolist()
            [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
        """
        if prefix.ndim == 1:
            prefix = positions(segments) < prefix[:, None]
        return Mask("causal", segments, segments, prefix)

    @staticmethod
    def cross(query: Tensor, key: Tensor) -> Mask:
        """Each position of the decoder reads the same document's positions of the encoder: (row, query), (row, key)."""
        return Mask("full", query, key)

    def __len__(self) -> int:
        return len(self.query)

    def __getitem__(self, rows: slice) -> Mask:
        """A part of the rows."""
        both = None if self.both_ways is None else self.both_ways[rows]
        query = self.query[rows]
        return Mask(self.shape, query, query if self.is_self else self.key[rows], both)

    def to(self, device: torch.device | str) -> Mask:
        """On another device."""
        both = None if self.both_ways is None else self.both_ways.to(device)
        query = self.query.to(device)
        return Mask(self.shape, query, query if self.is_self else self.key.to(device), both)

    @property
    def is_self(self) -> bool:
        """Whether positions read among themselves."""
        return self.key is self.query

    def allowed(self) -> Tensor:
        """The mask as scaled_dot_product_attention takes it: (row, 1, query, key) bool, true where reading is allowed.

        Padding reads itself (in cross-attention: everything), and no other position reads padding.
        """
        query, key = self.query[:, :, None], self.key[:, None, :]  # (row, query, 1), (row, 1, key)
        together = query == key  # (row, query, key)
        if self.shape == "causal":
            n = self.query.shape[1]
            below = torch.ones(n, n, dtype=torch.bool, device=self.query.device).tril_()
            together &= below if self.both_ways is None else below | self.both_ways[:, None, :]
        pad = self.query == PADDING
        if bool(pad.any()):
            together &= ~pad[:, :, None]
            if self.is_self:
                together.diagonal(dim1=1, dim2=2).logical_or_(pad)
            else:
                together |= pad[:, :, None]
        return together[:, None]

    def additive(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The mask as eager attention adds it to scores: 0 where reading is allowed, else the dtype's lowest number."""
        return additive(self.allowed(), dtype)

    def block(self, block_size: int = 128) -> Any:
        """The mask as FlexAttention takes it: a BlockMask, (row, 1, query, key)."""
        from torch.nn.attention.flex_attention import create_block_mask

        query_of, key_of, both, is_causal, is_self = (
            self.query,
            self.key,
            self.both_ways,
            self.shape == "causal",
            self.is_self,
        )

        def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            mine = query_of[row, query]
            together = (mine == key_of[row, key]) & (mine != PADDING)
            if is_causal:
                ordered = key <= query
                together = together & (ordered if both is None else ordered | both[row, key])
            return together | ((mine == PADDING) & (query == key if is_self else key >= 0))

        return create_block_mask(
            allowed,
            B=len(self),
            H=None,
            Q_LEN=self.query.shape[1],
            KV_LEN=self.key.shape[1],
            device=self.query.device,
            BLOCK_SIZE=block_size,
        )

    @property
    def is_plain_causal(self) -> bool:
        """Whether a causal model needs no mask at all: one document a row, and padding, if any, at the end."""
        if self.shape != "causal" or self.both_ways is not None:
            return False
        same = (self.query == self.query[:, :1]) | (self.query == PADDING)
        return bool(same.all()) and self._padding_is_last()

    @property
    def is_padding(self) -> bool:
        """Whether the mask only hides padding: full, one document a row."""
        same = (self.key == self.key.amax(1, keepdim=True)) | (self.key == PADDING)
        return self.shape == "full" and bool(same.all())

    def _padding_is_last(self) -> bool:
        pad = self.query == PADDING
        return not bool((pad[:, :-1] & ~pad[:, 1:]).any())


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as numbers added to scores."""
    low = torch.finfo(dtype).min
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, low)


def positions(segments: Tensor) -> Tensor:
    """Positions counted from the start of each document, (row, pos): the switch apart from the mask.

    Example:
        >>> positions(torch.tensor([[0, 0, 1, 1, 1, -1]])).tolist()
        [[0, 1, 0, 1, 2, 0]]
    """
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values


def attention_inputs(mask: Mask, model: nn.Module, restart_positions: bool = False) -> dict[str, Any]:
    """What a transformers model takes so that it attends as the mask says: entries for its `forward`.

    The form follows the model's attention (`sdpa`: bool; `eager`: additive in the model's dtype; `flex_attention`: a
    BlockMask). Nothing is given where the model's own behaviour is already the mask, which keeps the fast causal
    kernel. For an encoder-decoder the mask is the encoder's, and hides padding only: stock classes read the encoder
    through the same mask from the decoder; `packed_inputs` does the rest.

    Args:
        mask: what is wanted; rows and positions as in the batch, on the model's device.
        model: any `PreTrainedModel` of a family in `TAKES_MASK`, or of a class that says `takes_mask = True`.
        restart_positions: count positions from the start of each document, where the model numbers positions.

    Raises:
        VesaliusError: if the model cannot attend so, naming the family and what to do.

    Example:
        >>> logits = model(ids, **attention_inputs(Mask.causal(segments), model)).logits         # doctest: +SKIP
    """
    plain = getattr(model, "module", model)
    config: Any = plain.config
    family, kind = str(config.model_type), kind_of(config)
    given: dict[str, Any] = {}
    if restart_positions and family not in RELATIVE:
        if family == "distilbert":
            raise VesaliusError("distilbert numbers its positions itself; leave restart_positions off")
        first = int(config.pad_token_id) + 1 if family in OFFSET else 0
        given["position_ids"] = positions(mask.query) + first
    if kind == "causal" and mask.is_plain_causal:
        return given
    if kind != "causal" and mask.is_padding:
        if bool((mask.key == PADDING).any()):
            given["attention_mask"] = (mask.key != PADDING).long()
        return given
    if config.is_encoder_decoder:
        raise VesaliusError(
            f"{family} reads its encoder through the encoder's own mask, so it cannot take packed documents; "
            "use masks.packed_inputs, or cross_document: allow"
        )
    given["attention_mask"] = lower(mask, plain)
    if family in BY_MASK and not restart_positions:
        given["position_ids"] = torch.arange(mask.query.shape[1], device=mask.query.device).expand_as(mask.query)
    return given


def lower(mask: Mask, model: nn.Module) -> Any:
    """The mask in the form the model's attention takes; refuses by name what cannot be honoured."""
    config: Any = model.config
    family, how = str(config.model_type), str(getattr(config, "_attn_implementation", "eager"))
    if family in REFUSES_MASK:
        raise VesaliusError(
            f"{family} {REFUSES_MASK[family]}: it can only be trained causally across the whole row "
            "(cross_document: allow, mask: causal); choose another family for prefix or packed masks"
        )
    if family not in TAKES_MASK and not getattr(model, "takes_mask", False):
        raise VesaliusError(
            f"it is not known whether the family '{family}' attends where a given mask says (known: "
            f"{', '.join(sorted(TAKES_MASK))}); masks.leaks(model, mask) tells; or use "
            "cross_document: allow, mask: causal"
        )
    window = getattr(config, "sliding_window", None)
    slides = bool(window) and getattr(config, "use_sliding_window", True)
    if slides and window is not None and window < mask.key.shape[1]:
        raise VesaliusError(
            f"{family} reads through a window of {window} tokens, which a given mask of {mask.key.shape[1]} would "
            "replace; shorten data.length, or set sliding_window of the model at least as long"
        )
    if how == "flex_attention":
        return mask.block()
    if how == "sdpa":
        return mask.allowed()
    if how == "eager":
        return mask.additive(next(model.parameters()).dtype)
    raise VesaliusError(f"attention '{how}' takes no mask of pairs; open the model with attn_implementation='sdpa'")


def packed_inputs(model: nn.Module, input_ids: Tensor, encoder: Mask, decoder: Mask) -> dict[str, Any]:
    """Inputs of an encoder-decoder whose rows hold several documents; runs the encoder, differentiably.

    Args:
        model: an encoder-decoder with a stock `encoder` (T5).
        input_ids: (row, key) of the encoder.
        encoder: its mask, `Mask.full(documents)`.
        decoder: the decoder's mask, `Mask.causal(documents)`; documents are numbered alike on both sides.
    """
    encode: Any = model.get_encoder  # a method of PreTrainedModel
    states = encode()(input_ids=input_ids, attention_mask=lower(encoder, model))
    cross = Mask.cross(decoder.query, encoder.key)
    return {
        "encoder_outputs": states,
        "attention_mask": lower(cross, model),
        "decoder_attention_mask": lower(decoder, model),
    }


def leaks(model: nn.Module, mask: Mask, ids: Tensor, restart_positions: bool = False) -> tuple[int, int]:
    """Proof of a mask by gradient: how many pairs read what they must not, and how many allowed pairs are never read.

    The gradient of position t's logits by the embedding at s is compared with the mask, over all pairs of positions
    that are not padding. With several layers reading passes through third positions, which these masks already
    contain: whoever may be read reads no more than its reader.

    Args:
        model: a decoder or an encoder, small enough for one backward pass a position.
        mask: of self-attention.
        ids: (row, pos) token ids.
        restart_positions: as for `attention_inputs`.

    Returns:
        (violations, missing).
    """
    embeddings: Any = model.get_input_embeddings  # a method of PreTrainedModel
    vectors = embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=vectors, **attention_inputs(mask, model, restart_positions)).logits
    return compare(mask, _read(logits, vectors))


def compare(mask: Mask, read: Tensor) -> tuple[int, int]:
    """(violations, missing) of what was read, (row, query, key) bool, where neither side is padding."""
    real = (mask.query != PADDING)[:, :, None] & (mask.key != PADDING)[:, None, :]
    allowed = mask.allowed()[:, 0]
    return int((read & ~allowed & real).sum()), int((~read & allowed & real).sum())


def _read(logits: Tensor, vectors: Tensor) -> Tensor:
    """Whether the logits at t depend on the vector at s: (row, t, s) bool, by one backward pass a position."""
    weight = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(0)).to(logits)
    found = []
    for t in range(logits.shape[1]):
        (gradient,) = torch.autograd.grad((logits[:, t] @ weight).sum(), vectors, retain_graph=True)
        found.append(gradient.abs().amax(-1) > 0)  # (row, s)
    return torch.stack(found, 1)


def kind_of(config: Any) -> str:
    """Whether the model attends causally unless told otherwise."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    names = " ".join(getattr(config, "architectures", None) or [])
    is_masked = config.model_type in {"bert", "roberta", "distilbert", "longformer"} and not getattr(
        config, "is_decoder", False
    )
    is_masked = is_masked or getattr(config, "is_causal", True) is False  # models of parts
    return "masked" if is_masked or "MaskedLM" in names else "causal"
