"""What the identities of `check` are run on: prompts, what was recorded, and references made with plain hooks.

References stand apart from the bench: one hook written here, one full pass of transformers' model, for every change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vesalius.errors import ModelError, VesaliusError
from vesalius.model.anatomy import Block, Side
from vesalius.model.edges import EdgeRun, write_sites, writes
from vesalius.model.graph import Universe, universe_of
from vesalius.model.hooks import Site, Tap
from vesalius.model.intervene import Intervention, sites_of
from vesalius.model.model import Capture, Model
from vesalius.model.pairs import Pairs
from vesalius.model.sweep import trunk
from vesalius.model.weights import matrix
from vesalius.parts import Part

SIDES: tuple[Side, ...] = ("q", "k", "v")


class NotApplicable(Exception):
    """An identity that means nothing for this model, and why."""


class Worst:
    """The largest disagreement seen so far, and where.

    Attributes:
        value: as a share of the size of what is compared. at: where. seen: how many comparisons.
        broken: a failure that is not a matter of size. note: said beside an ok.
    """

    def __init__(self) -> None:
        self.value, self.at, self.seen, self.broken, self.note = 0.0, "", 0, "", ""

    def see(self, got: Tensor, want: Tensor, at: object = "", size: Tensor | float | None = None) -> None:
        """Compares two tensors elementwise; an element's size is its own plus the tensor's mean one, or as given.

        A few very large activations, which many models have, so neither excuse errors elsewhere nor count double.
        """
        if got.shape != want.shape:
            raise VesaliusError(f"{at}: shape {tuple(got.shape)} where {tuple(want.shape)} is right")
        double = torch.float64 if want.dtype == torch.float64 else torch.float32
        got, want = got.detach().to("cpu", double), want.detach().to("cpu", double)
        if size is None:
            size = want.abs()
            size = size + size.mean()
        elif isinstance(size, Tensor):
            size = size.detach().to("cpu", double)
            size = size + size.mean()
        gap = (got - want).abs() / (size + 1e-12)
        self._add(float(gap.max()) if gap.numel() else 0.0, at)

    def along(self, got: Tensor, want: Tensor, at: object = "") -> None:
        """Compares two tensors as wholes: the distance as a share of the length."""
        got, want = got.detach().cpu().double(), want.detach().cpu().double()
        self._add(float((got - want).norm() / (want.norm() + 1e-12)), at)

    def same(self, got: Tensor, want: Tensor, at: object = "") -> None:
        """Compares bit for bit."""
        if torch.equal(got, want):
            self._add(0.0, at)
        else:
            self._add(max(float((got.float() - want.float()).abs().max()), 1e-45), at)

    def _add(self, value: float, at: object) -> None:
        self.seen += 1
        if value > self.value or value != value:  # NaN is worst of all, and stays
            self.value, self.at = value, str(at)

    def fail(self, why: str) -> None:
        """Something is wrong that no number measures."""
        self.seen += 1
        self.broken = self.broken or why


@dataclass(frozen=True)
class Probe:
    """The metric of a check: one token's logit minus another's, at the last read position."""

    first: Tensor
    second: Tensor
    name: str = "probe"
    unit: str = "logit"

    def tokens(self, pairs: Pairs) -> Tensor:
        """Both tokens of every example, each once."""
        return torch.cat([self.first, self.second]).unique()

    def __call__(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Logit difference (example,)."""
        table = self.tokens(pairs)
        right = torch.tensor([a[0] for a in pairs.answers])
        wrong = torch.tensor([w[0] for w in pairs.wrong])
        at = [torch.searchsorted(table, t).to(logits.device) for t in (right, wrong)]
        rows = torch.arange(len(right), device=logits.device)
        return logits[rows, -1, at[0]] - logits[rows, -1, at[1]]


def draw(model: Model, n: int, length: int, seed: int, texts: Sequence[str] | None) -> Bench:
    """Two sets of prompts that share their first half, and a metric.

    Raises:
        VesaliusError: if there is too little to run on.
    """
    config, generator = model.hf.config, torch.Generator().manual_seed(seed)
    specials = set(getattr(model.tokenizer, "all_special_ids", ()) or ())
    for name in ("pad", "bos", "eos", "unk", "cls", "sep", "mask", "decoder_start"):
        value = getattr(config, f"{name}_token_id", None)
        specials |= set(value) if isinstance(value, (list, tuple)) else {value}
    size = int(model.hf.get_input_embeddings().weight.shape[0])
    if model.tokenizer is not None:
        size = min(size, len(model.tokenizer))
    usual = torch.tensor([i for i in range(size) if i not in specials])

    def some(*shape: int) -> Tensor:
        return usual[torch.randint(len(usual), shape, generator=generator)]

    if texts is not None:
        if model.tokenizer is None:
            raise VesaliusError(f"{model.name} was opened without a tokenizer; check it without texts")
        rows = [model.tokenizer(t)["input_ids"] for t in texts]
        n, length = len(rows), min([length, *map(len, rows)])
        base = torch.tensor([r[:length] for r in rows])
    else:
        base = some(n, length) if n > 0 else torch.empty(0, length)
    if n < 1 or length < 6:
        raise VesaliusError(f"{n} prompts of {length} tokens are too little to check on; give at least 1 of 6 tokens")
    other = torch.cat([base[:, : length // 2], some(n, length - length // 2)], dim=1)
    decoder = None
    if model.kind == "encoder-decoder":
        start = getattr(config, "decoder_start_token_id", None)
        start = config.pad_token_id if start is None else start
        decoder = torch.cat([torch.full((n, 1), start or 0), some(n, 3)], dim=1)
    last = (length if decoder is None else decoder.shape[1]) - 1
    tokens = some(n, 2)
    tokens[:, 1] = torch.where(tokens[:, 0] == tokens[:, 1], usual[(tokens[:, 0] == usual[0]).long()], tokens[:, 1])
    pairs = Pairs(
        clean=base,
        corrupted=other,
        mask=torch.ones_like(base),
        reads=torch.tensor([[last - 1, last]] * n),
        read_mask=torch.ones(n, 2, dtype=torch.bool),
        row_example=torch.arange(n),
        row_right=torch.ones(n, dtype=torch.bool),
        answers=[[int(t)] for t in tokens[:, 0]],
        wrong=[[int(t)] for t in tokens[:, 1]],
        metric=Probe(tokens[:, 0], tokens[:, 1]),
        decoder=decoder,
    )
    return Bench(model, pairs, generator)


class Bench:
    """A model, its prompts, and what several identities need, made when first asked for.

    Args:
        model: the model. pairs: prompts; `clean` is the run that is changed, `corrupted` where values come from.
        generator: for directions and for which head is moved.
    """

    def __init__(self, model: Model, pairs: Pairs, generator: torch.Generator) -> None:
        self.model, self.pairs, self.generator = model, pairs, generator
        self.n, self.ids, self.decoder = pairs.n_rows, pairs.clean, pairs.decoder
        self.a = model.anatomy
        self.hooks_before = self.hooks()
        self._references: dict[Part, Tensor] = {}

    @property
    def mid(self) -> str:
        """Which site the MLP reads from."""
        return "resid_pre" if self.a.parallel else "resid_mid"

    def hooks(self) -> tuple[int, tuple[str, ...]]:
        """How many hooks the model carries, and by which functions it attends."""
        modules = list(self.model.hf.modules())
        count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
        configs = {id(m.config): m.config for m in modules if hasattr(getattr(m, "config", None), "model_type")}
        return count, tuple(str(getattr(c, "_attn_implementation", "")) for c in configs.values())

    def blocks(self, some: bool = False) -> Iterator[tuple[str, int, Block]]:
        """(stack, layer, block) of every block, or of the first, middle and last of each stack."""
        for prefix, stack in self.a.stacks.items():
            last = len(stack.blocks) - 1
            for layer, block in enumerate(stack.blocks):
                if not some or layer in (0, last // 2, last):
                    yield prefix, layer, block

    # -- running -------------------------------------------------------------------------------------------------

    def plain(self, ids: Tensor, mask: Tensor | None = None, decoder: Tensor | None = None) -> Tensor:
        """Logits (row, pos, vocabulary) of transformers, or the last hidden state (row, pos, d) without a head."""
        with torch.no_grad():
            return self._answer(self.model.hf(**self.model.inputs(ids, mask, decoder)))

    @staticmethod
    def _answer(out: Any) -> Tensor:
        logits = getattr(out, "logits", None)
        return out.last_hidden_state if logits is None else logits

    def tapped(self, taps: Mapping[Site, Sequence[Tap]] | None = None, capture: Sequence[Site] = ()) -> Tensor:
        """What `plain` gives, from the bench's own run with taps or recording."""
        end = Site("resid_post", self.model.n_layers - 1, self.a.main.prefix)
        last = [] if self.a.main.head else [end]
        run = self.model.run(self.ids, capture=[*capture, *last], taps=taps, decoder=self.decoder)
        return self.readout(run.sites[end]) if run.logits is None else run.logits

    def readout(self, hidden: Tensor) -> Tensor:
        """What `plain` gives, from the residual stream after the last block."""
        if self.a.main.head:
            return self.model.readout(hidden)
        return hidden if self.a.main.final_norm is None else self.a.main.final_norm.module(hidden)

    def at_reads(self, x: Tensor) -> Tensor:
        """(row, pos, d) at the read positions, (row, read, d)."""
        return x[:, self.pairs.reads[0].to(x.device)]

    @cached_property
    def base(self) -> Tensor:
        """Transformers' own answer, called as a user would."""
        kwargs = {} if self.decoder is None else {"decoder_input_ids": self.decoder.to(self.model.device)}
        with torch.no_grad():
            return self._answer(self.model.hf(input_ids=self.ids.to(self.model.device), **kwargs))

    @cached_property
    def size(self) -> float:
        """The size of an answer: the mean absolute value, and what differences of two are measured by."""
        return float(self.base.float().abs().mean())

    # -- recording -----------------------------------------------------------------------------------------------

    def sites(self, attention: bool) -> list[Site]:
        """Every site; only those read without our own attention function unless `attention`."""
        mine = {"pattern", "cross_pattern"} if self.a.attention == "interface" else set()
        if mine and self.a.group > 1:
            mine |= {"k", "v"}
        names = ["resid_pre", "resid_post", "attn_out", "mlp_out", *SIDES, "z", "pattern", "mlp_in", "neurons"]
        names += [] if self.a.parallel else ["resid_mid"]
        found = []
        for prefix, layer, block in self.blocks():
            cross = [] if block.cross is None else [f"cross_{n}" for n in (*SIDES, "z", "pattern", "out")]
            found += [Site(n, layer, prefix) for n in [*names, *cross] if attention or n not in mine]
        return found

    @cached_property
    def recorded(self) -> Capture:
        """Every site of the prompts."""
        return self.model.run(self.ids, capture=self.sites(attention=True), decoder=self.decoder)

    def site(self, stack: str, layer: int, name: str) -> Tensor:
        """One recorded site of the prompts."""
        return self.recorded[name, layer, stack]

    @cached_property
    def source(self) -> Capture:
        """What patches put in: parts of the other prompts."""
        sites = sites_of([p for parts in self.sample.values() for p in parts])
        return self.model.run(self.pairs.corrupted, capture=sites, decoder=self.decoder)

    # -- patches -------------------------------------------------------------------------------------------------

    @cached_property
    def sample(self) -> dict[str, list[Part]]:
        """A few parts of every kind: of the middle block, and heads of the last one too."""
        found: dict[str, list[Part]] = {}
        h = self.a.n_heads
        for prefix, stack in self.a.stacks.items():
            last, mid = len(stack.blocks) - 1, (len(stack.blocks) - 1) // 2
            heads = [Part("head", mid, h - 1, stack=prefix), Part("head", last, h // 2, stack=prefix)]
            found.setdefault("head", []).extend(heads)
            for side in SIDES:
                found.setdefault(side, []).append(Part("head", mid, h // 2, side, prefix))
            for kind in ("mlp", "attn", "resid_pre", "resid_mid", "resid_post"):
                if not (kind == "resid_mid" and self.a.parallel):
                    found.setdefault(kind.split("_")[0], []).append(Part(kind, mid, stack=prefix))
            found.setdefault("neuron", []).append(Part("neuron", mid, self.a.d_mlp // 2, stack=prefix))
            found.setdefault("embed", []).append(Part("embed", stack=prefix))
            if stack.blocks[mid].cross is not None:
                found["xhead"] = [Part("xhead", mid, h // 2, side, prefix) for side in (None, *SIDES)]
        return found

    def group(self, part: Part) -> list[Part]:
        """The query heads that share the part's keys or values: what one plain hook can change."""
        if part.side not in ("k", "v"):
            return [part]
        first = (part.index or 0) // self.a.group * self.a.group
        return [Part(part.kind, part.layer, first + i, part.side, part.stack) for i in range(self.a.group)]

    def columns(self, block: Block, part: Part) -> Tensor:
        """Where a head's query, key or value is in its projection's output, (d_head,)."""
        side: Side = part.side  # type: ignore[assignment]
        head = (part.index or 0) if side == "q" else (part.index or 0) // self.a.group
        every = torch.arange(matrix(block.projections[side]).shape[1])
        if block.projections["q"] is block.projections["k"]:
            return self.a.split_qkv(every, side)[head]
        return every.unflatten(-1, (-1, self.a.d_head))[head]

    def patch(self, part: Part, positions: Tensor | None = None) -> list[Intervention]:
        """The other prompts' value of a part, and of what must move with it."""
        return [Intervention(p, value=self.source.part(p), positions=positions) for p in self.group(part)]

    def reference(self, part: Part) -> Tensor:
        """The answer at the reads with that part patched: one plain hook, one full pass."""
        if part not in self._references:
            self._references[part] = self.at_reads(self.hooked(part, self.source.part(part)))
        return self._references[part]

    def hooked(self, part: Part, value: Tensor, position: int | None = None) -> Tensor:
        """The answer with one plain hook that sets a part to a value (at one position)."""
        block = self.a.block(part.layer or 0, part.stack)
        own = block.cross if part.kind == "xhead" and block.cross is not None else block
        d, index = self.a.d_head, part.index or 0
        after_attention = block.norm_attn_out.module if block.norm_attn_out else block.o
        columns: Any = slice(None)
        before = False
        if part.side:
            module, columns = own.projections[part.side], self.columns(own, part)  # type: ignore[index]
        elif part.kind in ("head", "xhead"):
            module, columns, before = own.o, slice(index * d, (index + 1) * d), True
        elif part.kind == "neuron":
            module, columns, before = block.down, slice(index, index + 1), True
        elif part.kind == "mlp":
            module = block.norm_mlp_out.module if block.norm_mlp_out else block.down
        elif part.kind == "attn":
            module = after_attention
        elif part.kind in ("resid_pre", "embed"):
            module, before = block.module, True
        elif part.kind == "resid_mid" and self.a.post_norm:
            module = block.norm_in.module
        elif part.kind == "resid_mid":  # a sum that no module outputs: attention's write makes up the difference
            module = after_attention if block.cross is None else block.cross.o
            value = value - self.recorded["resid_pre", block.layer, block.stack]
            if block.cross is not None:
                value = value - self.recorded["attn_out", block.layer, block.stack]
        else:
            module = block.module

        def change(x: Tensor) -> Tensor:
            new = x.clone()
            new[..., columns] = value.reshape(new[..., columns].shape).to(x)
            if position is None:
                return new
            keep = (torch.arange(x.shape[1], device=x.device) == position).view(1, -1, 1)
            return torch.where(keep, new, x)

        with plain_hook(module, change, before):
            return self.plain(self.ids, decoder=self.decoder)

    # -- edges ---------------------------------------------------------------------------------------------------

    @cached_property
    def graph(self) -> Universe:
        """The model's graph."""
        try:
            return universe_of(self.model)
        except ModelError as error:
            raise NotApplicable(str(error).removeprefix(f"{self.model.name} ")) from error

    @cached_property
    def edge_pairs(self) -> Pairs:
        """At most two of the prompts: edge runs hold every sender's write."""
        return self.pairs.take(range(min(2, self.n)))

    @cached_property
    def edge_run(self) -> EdgeRun:
        """The prompts with edges from the other prompts."""
        pairs = self.edge_pairs
        acts = trunk(self.model, pairs.corrupted, pairs, write_sites(self.model)).sites
        return EdgeRun(self.model, pairs, "clean", writes(self.model, acts))

    def metric(self, answer: Tensor, pairs: Pairs) -> Tensor:
        """The metric (example,) of logits at the reads (row, read, vocabulary)."""
        return pairs.value(answer[..., pairs.metric.tokens(pairs).to(answer.device)].float().cpu())  # type: ignore[union-attr]

    def need_metric(self) -> None:
        """Refuses models without logits."""
        if not self.a.main.head:
            raise NotApplicable("an encoder without a head has no logits, so there is no metric to score or derive")


def block_name(stack: str, layer: int) -> str:
    """A block's address: L3, enc.L3."""
    return f"{stack}.L{layer}" if stack else f"L{layer}"


@contextmanager
def plain_hook(module: nn.Module, change: Callable[[Tensor], Tensor | None], before: bool) -> Iterator[None]:
    """One plain hook on a module's first input or output, for the duration."""

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = change(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def leave(_: nn.Module, __: Any, out: Any) -> Any:
        new = change(out[0] if isinstance(out, tuple) else out)
        return None if new is None else (new, *out[1:]) if isinstance(out, tuple) else new

    handle = (
        module.register_forward_pre_hook(enter, with_kwargs=True) if before else module.register_forward_hook(leave)
    )
    try:
        yield
    finally:
        handle.remove()
