"""The identities that `check` runs: each compares the bench with transformers' own modules, or with plain arithmetic.

An identity is a function of a `Bench` (a model, two sets of prompts, what was recorded) that shows a `Worst` every pair
of tensors that should agree. `IDENTITIES` lists them with what they say and what rests on them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vesalius.model.anatomy import Block
from vesalius.model.checkbench import SIDES, Bench, NotApplicable, Worst, block_name, plain_hook
from vesalius.model.contributions import contributions
from vesalius.model.gradients import Differences
from vesalius.model.hooks import Site, Tap
from vesalius.model.intervene import first_layer, taps
from vesalius.model.norms import NormView
from vesalius.model.relevance import Rules, relevance
from vesalius.model.replay import Tape
from vesalius.model.weights import bias_of, matrix
from vesalius.parts import Part

PARTS = (
    "head", "head.q", "head.k", "head.v", "pattern", "xhead", "attn", "mlp", "neuron", "resid", "embed", "edge",
)  # fmt: skip
USES = ("direct", "gradient", "replay", "padding")
ALL = (*PARTS, *USES)


@dataclass(frozen=True)
class Identity:
    """One thing to hold: its name, what it says, the parts that rest on it, and the function that tries it."""

    name: str
    says: str
    covers: tuple[str, ...]
    run: Callable[[Bench, Worst], None]
    exact: bool = False
    at_least: float = 0.0  # tolerance where the reference is approximate itself


# -- the model itself, and recording it --------------------------------------------------------------------------------


def _logits(b: Bench, worst: Worst) -> None:
    want = b.base  # before anything else has run
    worst.same(b.tapped() if b.a.main.head else b.plain(b.ids, decoder=b.decoder), want)


def _capture(b: Bench, worst: Worst) -> None:
    worst.same(b.tapped(capture=b.sites(attention=False)), b.base)


def _own_attention(b: Bench, worst: Worst) -> None:
    if b.a.attention != "interface":
        raise NotApplicable("this model's attention shows its pattern by itself")
    worst.see(b.tapped(capture=b.sites(attention=True)), b.base, "logits")


def _left_behind(b: Bench, worst: Worst) -> None:
    if b.hooks() != b.hooks_before:
        worst.fail(f"the model carried {b.hooks_before} (hooks, attention) before the checks and {b.hooks()} after")
    worst.same(b.plain(b.ids, decoder=b.decoder), b.base, "logits after all checks")


# -- recorded sites fit together ---------------------------------------------------------------------------------------


def _residual(b: Bench, worst: Worst) -> None:
    for stack, layer, block in b.blocks():
        get = partial(b.site, stack, layer)
        at = block_name(stack, layer)
        pre, writes = get("resid_pre"), [get("attn_out")]
        if block.cross is not None:
            writes.append(get("cross_out"))
        mid = pre + sum(writes)
        size = pre.abs() + sum(w.abs() for w in writes)
        if b.a.post_norm:
            mid = block.norm_in.module(mid)
            size = mid.abs()
        if not b.a.parallel:
            worst.see(get("resid_mid"), mid, f"{at}.resid_mid", size)
        post = mid + get("mlp_out")
        if b.a.post_norm:
            post = block.norm_mid.module(post)
        worst.see(get("resid_post"), post, f"{at}.resid_post", post.abs() if b.a.post_norm else size + post.abs())
        if layer + 1 < len(b.a.stack(stack).blocks):
            worst.see(
                b.recorded["resid_pre", layer + 1, stack],
                get("resid_post"),
                f"{block_name(stack, layer + 1)}.resid_pre",
            )


def _writes(b: Bench, worst: Worst) -> None:
    for stack, layer, block in b.blocks():
        get = partial(b.site, stack, layer)
        for own, z, out in [(block, "z", "attn_out")] + (
            [(block.cross, "cross_z", "cross_out")] if block.cross else []
        ):
            by_head = torch.einsum("bshe,hed->bshd", get(z), b.a.head_out(own))
            worst.see(get(out), _after(own, by_head.sum(2)), f"{block_name(stack, layer)}.{out}")
        bias, write = bias_of(block.down), get("neurons") @ matrix(block.down)
        write = write if bias is None else write + bias
        write = write if block.norm_mlp_out is None else block.norm_mlp_out.module(write)
        worst.see(get("mlp_out"), write, f"{block_name(stack, layer)}.mlp_out")


def _after(block: Block, write: Tensor) -> Tensor:
    bias = bias_of(block.o)
    write = write if bias is None else write + bias
    return write if block.norm_attn_out is None else block.norm_attn_out.module(write)


def _reads(b: Bench, worst: Worst) -> None:
    for stack, layer, block in b.blocks():
        get = partial(b.site, stack, layer)
        pre, at = get("resid_pre"), block_name(stack, layer)
        mid = pre if b.a.parallel else get("resid_mid")
        for side in SIDES:
            normed = pre if b.a.post_norm else block.norm_in.module(pre)
            worst.see(get(side), _projected(b, block, side, normed), f"{at}.{side}")
        worst.see(get("mlp_in"), mid if b.a.post_norm else block.norm_mid.module(mid), f"{at}.mlp_in")
        if block.cross is None:
            continue
        encoded = b.a.stack("enc")
        memory = b.recorded["resid_post", len(encoded.blocks) - 1, "enc"]
        memory = memory if encoded.final_norm is None else encoded.final_norm.module(memory)
        asking = block.cross.norm_in.module(pre + get("attn_out"))
        for side in SIDES:
            want = _projected(b, block.cross, side, asking if side == "q" else memory)
            worst.see(get(f"cross_{side}"), want, f"{at}.cross_{side}")


def _projected(b: Bench, block: Block, side: str, normed: Tensor) -> Tensor:
    weight, bias = b.a.head_in(block, side)  # type: ignore[arg-type]
    found = torch.einsum("bsd,hde->bshe", normed, weight)
    return found if bias is None else found + bias


def _attending(b: Bench, some: bool = False) -> list[tuple[str, int, Block]]:
    """The blocks whose mixer has an attention pattern."""
    found = [(s, n, block) for s, n, block in b.blocks(some=some) if Site("pattern", n, s) in b.recorded.sites]
    if not found:
        raise NotApplicable("this model's mixers have no attention pattern")
    return found


def _patterns(b: Bench, worst: Worst) -> None:
    for stack, layer, block in _attending(b):
        for prefix in ("", "cross_") if block.cross is not None else ("",):
            pattern = b.site(stack, layer, f"{prefix}pattern")
            at = f"{block_name(stack, layer)}.{prefix}pattern"
            total = pattern.sum(-1)
            worst.see(total, torch.ones_like(total), at, 1.0)
            if bool((pattern < 0).any()):
                worst.fail(f"{at} has negative entries")
            if b.a.stack(stack).causal and not prefix and bool(pattern.triu(1).any()):
                worst.fail(f"{at} attends to later positions")
            # every head's output is its own pattern times its own values
            mixed = torch.einsum("bhqk,bkhe->bqhe", pattern, b.site(stack, layer, f"{prefix}v"))
            worst.see(b.site(stack, layer, f"{prefix}z"), mixed, f"{block_name(stack, layer)}.{prefix}z")


def _sides(b: Bench, worst: Worst) -> None:
    """Moves one head's query, key and value at one position, each in its own copy of a prompt."""
    for stack, layer, block in _attending(b, some=True):
        for prefix in ("", "cross_") if block.cross is not None else ("",):
            _sides_of(b, worst, stack, layer, prefix)


def _sides_of(b: Bench, worst: Worst, stack: str, layer: int, prefix: str) -> None:
    ids, decoder = b.ids[:1].repeat(4, 1), None if b.decoder is None else b.decoder[:1].repeat(4, 1)
    pattern = b.site(stack, layer, f"{prefix}pattern")[0].float()  # (head, query, key)
    p = min(pattern.shape[1:]) // 2
    spread = -(pattern * (pattern + 1e-9).log()).sum(-1)[:, p]  # (head,): the most spread out shows changes best
    h, at = int(spread.argmax()), f"{block_name(stack, layer)}.{prefix}"

    def move(row: int) -> Tap:
        def tap(x: Tensor) -> Tensor:
            direction = torch.randn(x.shape[-1], generator=b.generator).to(x)
            x = x.clone()
            x[row, p, h] += direction * x[row, :, h].pow(2).mean().sqrt()
            return x

        return tap

    moves = {Site(prefix + side, layer, stack): [move(i + 1)] for i, side in enumerate(SIDES)}
    sites = [Site(prefix + name, layer, stack) for name in ("pattern", "z", "v")]
    run = b.model.run(ids, capture=sites, taps=moves, decoder=decoder)
    new, z, v = (run.sites[s] for s in sites)
    still, q, k, fixed = new
    elsewhere = torch.ones_like(still, dtype=torch.bool)
    elsewhere[h, p] = False
    worst.see(q[elsewhere], still[elsewhere], f"{at}q moved at one query, patterns elsewhere")
    elsewhere[h] = False
    worst.see(k[elsewhere], still[elsewhere], f"{at}k moved in one head, patterns of others")
    # a key's weight is taken from, or given to, all other keys alike: their shares of the rest stay
    rest, old_rest = (1 - x[h, :, p : p + 1] for x in (k, still))
    shares, old_shares = k[h] * old_rest, still[h] * rest
    keep = torch.arange(still.shape[-1], device=still.device) != p
    worst.see(shares[:, keep], old_shares[:, keep], f"{at}k moved at one key, shares of other keys")
    worst.see(fixed, still, f"{at}v moved, patterns")
    want = z[0].clone()
    want[:, h] += still[h, :, p : p + 1] * (v[3, p, h] - v[0, p, h])
    worst.see(z[3], want, f"{at}v moved, outputs")
    for name, moved in (("q", q[h, p] - still[h, p]), ("k", k[h] - still[h])):
        if not bool(moved.any()):
            worst.fail(f"{at}{name} moved, and its pattern did not")


def _norms(b: Bench, worst: Worst) -> None:
    for stack, layer, block in b.blocks():
        get = partial(b.site, stack, layer)
        at = block_name(stack, layer)
        mid = get("resid_pre") + get("attn_out")
        pairs = [(block.norm_in, mid if b.a.post_norm else get("resid_pre"), "norm before attention")]
        if block.cross is not None:
            pairs.append((block.cross.norm_in, mid, "norm before cross-attention"))
        if b.a.post_norm:
            pairs[0] = (block.norm_in, mid, "norm after attention")
            pairs.append((block.norm_mid, get("resid_mid") + get("mlp_out"), "norm after the MLP"))
        elif not b.a.parallel:
            pairs.append((block.norm_mid, get("resid_mid"), "norm before the MLP"))
        for norm, write in ((block.norm_attn_out, "attn_out"), (block.norm_mlp_out, "mlp_out")):
            if norm is not None:
                pairs.append((norm, get(write), f"norm of {write}"))
        for view, x, what in pairs:
            _norm(view, x, f"{at} {what}", worst)
    for stack, one in b.a.stacks.items():
        if one.final_norm is not None:
            last = b.recorded["resid_post", len(one.blocks) - 1, stack]
            _norm(one.final_norm, last, f"{stack} final norm".strip(), worst)


def _norm(view: NormView, x: Tensor, at: str, worst: Worst) -> None:
    want = view.module(x)
    bias = view.bias
    worst.see(view.linear(x.float(), view.scale(x)) + (0 if bias is None else bias), want.float(), at)


def _contributions(b: Bench, worst: Worst) -> None:
    found = contributions(b.model, b.ids, b.pairs.mask, b.pairs.reads, b.decoder)
    values = found.values.double()
    worst.see(values.sum(1) + found.bias, found.final.double(), "", found.final.double().abs() + values.abs().amax(1))


# -- patches, replay, padding ------------------------------------------------------------------------------------------


def _patch(kind: str, b: Bench, worst: Worst) -> None:
    if kind not in b.sample:  # every other kind is in every model
        raise NotApplicable("this model has no cross-attention")
    for part in b.sample[kind]:
        got = b.tapped(taps([b.patch(part)], rows=b.n))
        worst.see(b.at_reads(got), b.reference(part), part)
    if kind == "head":  # at one position only
        part = b.sample[kind][0]
        position = b.source.part(part).shape[1] - 2
        got = b.tapped(taps([b.patch(part, torch.full((b.n,), position))], rows=b.n))
        want = b.hooked(part, b.source.part(part), position)
        worst.see(b.at_reads(got), b.at_reads(want), f"{part} at position {position}")


def _replay(suffix: bool, b: Bench, worst: Worst) -> None:
    causal = b.model.kind == "causal"
    if suffix and not causal:
        raise NotApplicable("every position sees every other, so all of them are computed again")
    start = b.pairs.first_difference if suffix else 0
    tape = Tape(b.model, b.ids, b.pairs.mask, b.pairs.reads, start=start, decoder=b.decoder)
    with torch.no_grad():
        worst.see(b.readout(tape.final), b.at_reads(b.base), "the recorded run")
    main = b.a.main.prefix
    parts = [p for kind in ("head", "mlp", "attn", "resid") for p in b.sample.get(kind, []) if p.stack == main]
    middle = min(p.layer or 0 for p in parts)
    variants = [b.patch(p) for p in parts]
    with torch.no_grad():
        batch = b.readout(tape.replay(middle, len(parts), taps(variants, tape.rows, tape.start)))
        for part, got in zip(parts, batch.unflatten(0, (len(parts), b.n)), strict=True):
            worst.see(got, b.reference(part), f"{part} in a batch of {len(parts)} variants")
        for part, change in zip(parts[:2], variants[:2], strict=True):
            alone = tape.replay(first_layer(change), 1, taps([change], tape.rows, tape.start))
            worst.see(b.readout(alone), b.reference(part), f"{part} alone")
    if not tape.replayable:
        worst.note = "encoder-decoder models are run again from the start for every batch of variants"


def _padding(left: bool, b: Bench, worst: Worst) -> None:
    width = b.pairs.length
    pad = getattr(b.model.hf.config, "pad_token_id", None) or 0
    lengths = [max(2, width * (3 - i) // 3) for i in range(3)]
    ids, mask = torch.full((3, width), pad), torch.zeros(3, width, dtype=torch.long)
    decoder = None if b.decoder is None else b.decoder[:1].repeat(3, 1)
    places = [slice(width - m, width) if left else slice(0, m) for m in lengths]
    for row, place in enumerate(places):
        source = b.ids[row % b.n, : lengths[row]]
        ids[row, place], mask[row, place] = source, 1
    site = Site("z", b.model.n_layers - 1, b.a.main.prefix)
    together = b.model.run(ids, mask, capture=[site], decoder=decoder)
    batch = b.plain(ids, mask, decoder)
    for row, place in enumerate(places):
        one = ids[row : row + 1, place]
        here = slice(None) if decoder is not None else place
        mine = None if decoder is None else decoder[:1]
        at = f"prompt of {lengths[row]} tokens padded to {width}"
        if bool(batch[row, here].isnan().any()):
            worst.fail(f"{at}: transformers itself answers NaN")
        worst.see(batch[row, here], b.plain(one, decoder=mine)[0], at)
        alone = b.model.run(one, capture=[site], decoder=mine)
        worst.see(together.sites[site][row, here], alone.sites[site][0], f"{at}, heads of the last block")


# -- gradients ---------------------------------------------------------------------------------------------------------


def _gradients(b: Bench, worst: Worst) -> None:
    b.need_metric()
    found: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            found[site] = x if x.requires_grad else x.detach().requires_grad_()
            return found[site]

        return change

    with ExitStack() as exits, torch.enable_grad():
        for stack, layer, block in b.blocks(some=True):
            end = block.norm_mlp_out.module if block.norm_mlp_out else block.down
            exits.enter_context(plain_hook(block.o, keep(Site("z", layer, stack)), before=True))
            exits.enter_context(plain_hook(end, keep(Site("mlp_out", layer, stack)), before=False))
        out = b.model.hf(**b.model.inputs(b.ids, None, b.decoder)).logits
        value = b.metric(b.at_reads(out), b.pairs).sum()
    sites = list(found)
    wanted = dict(zip(sites, torch.autograd.grad(value, [found[s] for s in sites]), strict=True))
    diff = Differences(b.model, b.pairs, sites)
    run = diff.gradients("clean")
    for site, got in run.grads.items():
        whole = diff.start if site.stack != "enc" else 0
        want = wanted[site].reshape(b.n, -1, wanted[site].shape[-1])[:, whole:]
        worst.along(got.flatten(2), want, f"gradient at {block_name(site.stack, site.layer)}.{site.name}")


def _slopes(b: Bench, worst: Worst) -> None:
    b.need_metric()
    if b.model.dtype not in (torch.float32, torch.float64):
        raise NotApplicable(
            f"{str(b.model.dtype).removeprefix('torch.')} is too coarse for differences; open in float32"
        )
    main = b.a.main.prefix
    middle = (b.model.n_layers - 1) // 2
    sites = [Site(name, middle, main) for name in ("z", "neurons", "resid_post")]
    diff = Differences(b.model, b.pairs, sites)
    for site, gradient in diff.gradients("clean").grads.items():
        length = gradient.norm()
        step = 0.02 * b.size / length  # moves the metric by a fiftieth of a logit's size, if the gradient is right
        ends = []
        for sign in (1.0, -1.0):

            def move(x: Tensor, change: Tensor = sign * step * gradient / length) -> Tensor:
                x = x.clone()
                x[:, diff.start :] += change
                return x

            with torch.no_grad():
                ends.append(b.metric(b.at_reads(b.tapped({site: [move]})), b.pairs).double().sum())
        slope = (ends[0] - ends[1]) / (2 * step)
        worst.see(
            slope, length.double(), f"slope along {block_name(site.stack, site.layer)}.{site.name}", float(length)
        )


def _relevance(b: Bench, worst: Worst) -> None:
    b.need_metric()
    with relevance(b.model, Rules()):
        worst.same(b.plain(b.ids, decoder=b.decoder), b.base, "logits")
    diff = Differences(b.model, b.pairs, [Site("resid_pre", 0, b.a.main.prefix)])
    worst.same(diff.gradients("clean", Rules()).values, diff.gradients("clean").values, "the metric")


# -- edges -------------------------------------------------------------------------------------------------------------


def _edge_ends(b: Bench, worst: Worst) -> None:
    b.need_metric()
    graph, pairs = b.graph, b.edge_pairs
    for ids, cut, at in [
        (pairs.clean, torch.zeros(graph.exists.shape, dtype=torch.bool), "nothing cut"),
        (pairs.corrupted, torch.from_numpy(graph.exists), "everything cut"),
    ]:
        want = b.metric(b.at_reads(b.plain(ids)), pairs)
        worst.see(b.edge_run.values(cut), want, at, b.size)


def _patch_edge(b: Bench, worst: Worst) -> None:
    b.need_metric()
    graph, pairs, last = b.graph, b.edge_pairs, b.model.n_layers - 1
    mine, theirs = (
        b.model.run(ids, capture=[Site("mlp_out", 0), *(Site(n, last) for n in ("resid_pre", "resid_post", b.mid))])
        for ids in (pairs.clean, pairs.corrupted)
    )
    moved = theirs["mlp_out", 0] - mine["mlp_out", 0]
    block = b.a.block(last)
    query = Part("head", last, b.a.n_heads // 2, "q")
    columns, weight, bias = b.columns(block, query), matrix(block.projections["q"]), bias_of(block.projections["q"])
    queries = block.norm_in.module(mine["resid_pre", last] + moved) @ weight
    queries = queries if bias is None else queries + bias

    def new_query(out: Tensor) -> Tensor:
        out = out.clone()
        out[..., columns] = queries[..., columns]
        return out

    def new_input(x: Tensor) -> Tensor:
        return block.norm_mid.module(mine[b.mid, last] + moved).view(x.shape)

    wanted = {}
    if last > 0:
        with plain_hook(block.projections["q"], new_query, before=False):
            wanted[query] = b.at_reads(b.plain(pairs.clean))
        with plain_hook(block.mlp_in, new_input, before=True):
            wanted[Part("mlp", last)] = b.at_reads(b.plain(pairs.clean))
    wanted[Part("unembed")] = b.at_reads(b.readout(mine["resid_post", last] + moved))
    for receiver, answer in wanted.items():
        cut = torch.zeros(graph.exists.shape, dtype=torch.bool)
        cut[graph.sender_index(Part("mlp", 0)), graph.receiver_index(receiver)] = True
        worst.see(b.edge_run.values(cut), b.metric(answer, pairs), f"L0.MLP->{receiver}", b.size)


# -- all of them -------------------------------------------------------------------------------------------------------


IDENTITIES: tuple[Identity, ...] = (
    Identity("logits", "nothing hooked: the answers of transformers, bit for bit", ALL, _logits, exact=True),
    Identity("capture", "recording changes nothing, bit for bit", PARTS, _capture, exact=True),
    Identity(
        "own attention",
        "attention written out, where patterns or shared keys are wanted, gives the same answers",
        ("pattern", "head.k", "head.v", "replay", "gradient"),
        _own_attention,
    ),
    Identity(
        "residual", "the residual stream is the sum of what is written to it", ("resid", "attn", "mlp"), _residual
    ),
    Identity(
        "writes",
        "heads through W_O sum to attention's write, neurons through W_down to the MLP's",
        ("head", "xhead", "attn", "mlp", "neuron", "direct", "edge"),
        _writes,
    ),
    Identity(
        "reads",
        "queries, keys, values and the MLP's input are made from the normed residual stream",
        ("head.q", "head.k", "head.v", "xhead", "mlp", "edge"),
        _reads,
    ),
    Identity(
        "patterns",
        "patterns sum to one, look back only where they should, and times the values give a head's output",
        ("pattern", "head", "head.v", "xhead"),
        _patterns,
    ),
    Identity(
        "sides",
        "one head's query moves one row of its pattern, its key one column, its value no pattern",
        ("head.q", "head.k", "head.v", "pattern", "xhead", "edge"),
        _sides,
    ),
    Identity("norms", "the formula of every norm is that of its module", ("direct", "edge", "gradient"), _norms),
    Identity(
        "contributions", "direct contributions of all parts sum to the final residual", ("direct",), _contributions
    ),
    Identity(
        "patch head",
        "one head patched (everywhere, at one position) = one plain hook",
        ("head",),
        partial(_patch, "head"),
    ),
    *(
        Identity(f"patch {s}", f"one head's {n} patched = one plain hook", (f"head.{s}",), partial(_patch, s))
        for s, n in (("q", "query"), ("k", "key"), ("v", "value"))
    ),
    Identity("patch xhead", "one cross-attention head patched = one plain hook", ("xhead",), partial(_patch, "xhead")),
    Identity("patch attn", "attention's write patched = one plain hook", ("attn",), partial(_patch, "attn")),
    Identity("patch mlp", "the MLP's write patched = one plain hook", ("mlp",), partial(_patch, "mlp")),
    Identity("patch neuron", "one neuron patched = one plain hook", ("neuron",), partial(_patch, "neuron")),
    Identity("patch resid", "the residual stream patched = one plain hook", ("resid",), partial(_patch, "resid")),
    Identity("patch embed", "the embedding patched = one plain hook", ("embed",), partial(_patch, "embed")),
    Identity(
        "replay",
        "variants taken up at a middle block, in one batch = full passes",
        ("replay",),
        partial(_replay, False),
    ),
    Identity("suffix", "variants from the first differing position = full passes", ("replay",), partial(_replay, True)),
    Identity("left padding", "padded on the left = one prompt at a time", ("padding",), partial(_padding, True)),
    Identity("right padding", "padded on the right = one prompt at a time", ("padding",), partial(_padding, False)),
    Identity("gradients", "gradients at parts are those of a plain backward pass", ("gradient",), _gradients),
    Identity("slopes", "gradients predict the effect of small changes", ("gradient",), _slopes, at_least=0.02),
    Identity("relevance", "propagation rules change no answer, bit for bit", ("gradient",), _relevance, exact=True),
    Identity("edge ends", "no edge cut = the run, all cut = the other run", ("edge",), _edge_ends),
    Identity("patch edge", "one edge patched = its receiver's input changed by hand", ("edge",), _patch_edge),
    Identity("left behind", "no hook and no setting remains; the answers are as before", ALL, _left_behind, exact=True),
)
