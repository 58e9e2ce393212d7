"""Bigram subnetworks: a model in which the answer is known, and SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from _page import look_inside, run, table, write
from _runs import is_quick, trained

import vesalius
from vesalius.features.sparsify import WeightMask
from vesalius.train.assembly import data_of
from vesalius.train.recipe import read_recipe

NAMES = ("model", "subnetwork", "no matrices", "random", "without it", "without random")


class Size(NamedTuple):
    """How large the study is."""

    train: int  # steps of the planted model
    masks: int
    smollm2: int


STRENGTHS = (0.1, 0.3, 1.0, 3.0)
FULL = Size(5000, 500, 400)
QUICK = Size(30, 20, 0)


def variants(found: dict[str, Any]) -> pd.DataFrame:
    """Means over controls of what `vesalius subnetwork` measured."""
    return pd.DataFrame(found["variants"]).groupby("variant")[["kept", "r", "kl", "nll"]].mean().reindex(list(NAMES))


def rows_of(means: pd.DataFrame) -> list[list[Any]]:
    """As a table's rows."""
    return [
        [name, f"{int(r['kept']):,}", f"{r['r']:.3f}", f"{r['kl']:.3f}", f"{r['nll']:.3f}"]
        for name, r in means.iterrows()
    ]


def chosen_strength(tried: dict[float, dict[str, Any]]) -> float:
    """The largest price at which r with the table is .95 or more; if none is, the best r within a fifth of them."""

    def r(strength: float) -> float:
        return float(variants(tried[strength])["r"]["subnetwork"])

    good = [s for s in tried if r(s) >= 0.95]
    small = [s for s in tried if float(tried[s]["share"]) <= 0.2]
    return max(good) if good else max(small or tried, key=r)


HEADS = ["variant", "weights", "r with the table", "KL from the table", "nats a token"]


def planted(size: Size) -> tuple[list[str], list[list[Any]]]:
    """The chain with copied spans."""
    recipe = read_recipe("markov", {"steps": size.train, "deterministic": False})
    root = trained(recipe, "bigram")
    options = f"--model {root}@last --steps {size.masks} --rows 32"
    tried = {s: run(f"subnetwork {options} --strength {s:g}") for s in STRENGTHS}
    strength = chosen_strength(tried)
    found = tried[strength]
    means, share = variants(found), float(found["share"])
    text = run(f"subnetwork {options} --target text --strength {3 * strength:g} --controls 1")
    model, folder = vesalius.open(f"{root}@last"), Path(found["run"])
    mask = WeightMask.load(folder, model)
    shared = mask.overlap(WeightMask.load(Path(text["run"]), model))
    source: Any = data_of(recipe).held_out
    ids = np.concatenate([source.batch(i).ids for i in range(8)])
    copied, chain = source.copied(ids)[:, 1:], source.in_chain(ids)[:, 1:]
    read = torch.from_numpy(ids[:, :-1].copy())
    true = -np.log(source.transitions[ids[:, :-1][chain], ids[:, 1:][chain]])
    spans, r = {}, {}
    for name, chosen in (("model", None), ("subnetwork", mask), ("random", mask.like(0))):
        if chosen is None:
            logits = model.logits(read)
        else:
            with chosen.applied(model):
                logits = model.logits(read)
        spans[name] = float((logits.argmax(-1).numpy() == ids[:, 1:])[copied].mean())
        ours = -logits.log_softmax(-1).gather(-1, torch.from_numpy(ids[:, 1:, None].copy()))[..., 0].numpy()[chain]
        r[name] = float(np.corrcoef(ours, true)[0, 1])
    level = 1 / source.symbols
    cost = means["nll"] - means.loc["model", "nll"]
    claims = [
        [
            "planted: at most 20 % of the weights, r 0.95 or more with the true transitions",
            f"{share:.1%}, r = {r['subnetwork']:.3f}",
            _verdict(share <= 0.2 and r["subnetwork"] >= 0.95),
        ],
        [
            "planted: random weights in these numbers, r below 0.3",
            f"r = {r['random']:.2f} with the transitions, {means.loc['random', 'r']:.2f} with the table",
            _verdict(r["random"] < 0.3),
        ],
        [
            "planted: copying falls to the bigram level",
            f"accuracy in spans {spans['model']:.0%} to {spans['subnetwork']:.1%} (bigram level {level:.1%})",
            _verdict(spans["model"] > 0.5 and spans["subnetwork"] < 2 * level),
        ],
        [
            "planted: without it the model loses 5 times what it loses without as many random weights",
            f"{cost['without it']:+.3f} nats against {cost['without random']:+.3f}",
            _verdict(cost["without it"] >= 5 * max(cost["without random"], 0)),
        ],
        [
            "planted: overlap with a mask for the text itself is above chance",
            f"{shared['ratio']:.1f} times chance (masks of {share:.1%} and {float(text['share']):.1%})",
            _verdict(shared["ratio"] > 1.5),
        ],
        [
            "the mask, saved and loaded, gives the same logits as an ordinary checkpoint",
            (same := _same(model, mask, folder, read)),
            _verdict(same == "equal to the bit"),
        ],
    ]
    body = [
        "## A model whose bigrams are known",
        f"`vesalius train --preset markov` ({size.train} steps): two layers, tied embeddings; nine tenths of the text "
        "are a Markov chain of 48 symbols, the rest spans of 8 symbols written twice. "
        f"`vesalius subnetwork {options.replace(str(root), 'RUN')} --strength {strength:g}`: of the strengths tried "
        "the largest at which r with the table is .95 or more, or the best r within a fifth of the weights.",
        table(
            ["strength", "weights", "r with the table"],
            [[f"{s:g}", f"{t['share']:.1%}", f"{variants(t)['r']['subnetwork']:.3f}"] for s, t in tried.items()],
        ),
        table(HEADS, rows_of(means)),
        table(
            ["part", "weights kept"],
            [[k, f"{v:.1%}"] for k, v in _by_part(found).items()],
        ),
    ]
    return body, claims


def _same(model: Any, mask: WeightMask, folder: Path, ids: torch.Tensor) -> str:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    with mask.applied(model), torch.no_grad():
        far = float((model.logits(ids) - plain(ids).logits).abs().max())
    return "equal to the bit" if far == 0 else f"largest difference {far:.1e}"


def _by_part(found: dict[str, Any]) -> pd.Series:
    grouped = pd.DataFrame(found["density"]).groupby("part", sort=False)[["kept", "weights"]].sum()
    return grouped["kept"] / grouped["weights"]


def smollm2(size: Size) -> tuple[list[str], list[list[Any]]]:
    """The default model, as many steps as a laptop makes in twenty minutes."""
    options = f"--corpus bible-kjv --steps {size.smollm2} --rows 2 --length 64 --strength 100 --lr 0.02 --check 4"
    found = run(f"subnetwork {options} --controls 1")
    means, parts = variants(found), _by_part(found)
    share, dense = float(found["share"]), float(found["first_mlp"])
    r = {str(name): float(value) for name, value in means["r"].items()}
    claims = [
        [
            f"SmolLM2-135M-Instruct, {size.smollm2} steps of 128 tokens: r 0.7 or more with less than 10 % of weights",
            f"r = {r['subnetwork']:.2f} with {share:.1%} (without any matrix {r['no matrices']:.2f}, random "
            f"{r['random']:.2f})",
            _verdict(r["subnetwork"] >= 0.7 and share < 0.1),
        ],
        [
            "its first MLP keeps twice the mean density or more",
            f"{dense:.1%}, {dense / share:.1f} times",
            _verdict(dense >= 2 * share),
        ],
    ]
    body = [
        "## SmolLM2",
        f"`vesalius subnetwork {options}`: {found['seconds'] / 60:.0f} minutes of steps. The paper takes 15,000 steps "
        "of 4,096 tokens on a GPU.",
        table(HEADS, rows_of(means)),
        table(["part", "weights kept"], [[k, f"{v:.2%}"] for k, v in parts.nlargest(8).items()]),
    ]
    return body, claims


def _verdict(held: bool) -> str:
    return "holds" if held else "does not hold"


def measured(size: Size) -> tuple[list[str], list[list[Any]]]:
    """The page's body and its claims."""
    body, claims = planted(size)
    if size.smollm2:
        more, last = smollm2(size)
        body, claims = [*body, *more], [*claims, *last]
    return [table(["what was asked", "what came out", ""], claims), *body], claims


def publish(body: list[str], claims: list[list[Any]]) -> None:
    """Writes the page and its rows among the others."""
    page, command = "look-inside-bigram", "python studies/bigram.py"
    about = (
        "Chang and Bergen 2025, arXiv 2504.15471; continuous sparsification: Savarese et al. 2020, arXiv 1912.04427."
    )
    write(page, "Look inside: bigram subnetworks", command, about, *body)
    look_inside("Bigram subnetworks", claims, command, page)


def main() -> None:
    """Measures all of it (about half an hour on one core) and writes the page."""
    quick = is_quick(__doc__)
    body, claims = measured(QUICK if quick else FULL)
    if quick:
        print("\n".join(body))
    else:
        publish(body, claims)


if __name__ == "__main__":
    main()
