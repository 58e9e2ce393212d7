"""The checks of observables pulled back: exactness, the angle of norms, couplings, and occupations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from vesalius.corpus import documents
from vesalius.features.directions import logistic, mean_difference
from vesalius.find import find
from vesalius.lens import (
    Observable,
    coupling,
    head_features,
    moments,
    path_value,
    pull_back,
    subtraction,
    token_rows,
)
from vesalius.lens.paths import norm_angle_bound
from vesalius.lens.texts import states
from vesalius.model import Intervention, Model
from vesalius.model.intervene import taps
from vesalius.model.norms import NormView
from vesalius.parts import Part
from vesalius.tasks.encode import Encoder, Example, encode

OCCUPATIONS = [
    "librarian", "nurse", "teacher", "secretary", "housekeeper", "receptionist", "nanny", "maid", "dancer", "model",
    "hairdresser", "waitress", "cashier", "designer", "writer", "artist", "student", "cook", "baker", "singer",
    "actor", "poet", "lawyer", "doctor", "judge", "scientist", "professor", "manager", "president", "engineer",
    "farmer", "soldier", "pilot", "driver", "guard", "carpenter", "mechanic", "plumber", "captain", "king", "sheriff",
    "wizard", "prince", "butcher", "builder", "coach", "miner", "fisherman", "policeman", "boxer",
]  # fmt: skip
LABELLED = ("nurse", "librarian", "plumber", "sheriff")  # for the data baselines: two of each kind, named beforehand


# -- 6.1 to 6.3: exactness, norms, couplings -------------------------------------------------------------------------


def exact() -> dict[str, Any]:
    """All paths of heads through small attention-only Llamas add up to n . logits, without norms and with them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    gaps = {}
    for name in ("without norms", "norms held"):
        worst = 0.0
        for seed in range(3):
            torch.manual_seed(seed)
            config = LlamaConfig(
                vocab_size=50, hidden_size=32, intermediate_size=8, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, initializer_range=0.25, pad_token_id=0,
            )  # fmt: skip
            hf = LlamaForCausalLM(config).eval().requires_grad_(False)
            for block in hf.model.layers:
                block.mlp.down_proj.weight.zero_()
                if name == "without norms":
                    block.input_layernorm = block.post_attention_layernorm = nn.Identity()
            if name == "without norms":
                hf.model.norm = nn.Identity()  # type: ignore[assignment]
            model = Model.wrap(hf, name=name)
            ids, reads = torch.randint(1, 50, (2, 8)), torch.tensor([7, 5])
            asked = Observable.parse("#3, #4 - #9", model)
            wanted = asked.value(model.logits(ids))[torch.arange(2), reads]
            total = path_value(model, ids, None, reads, asked)
            for layers in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
                for heads in itertools.product(range(4), repeat=len(layers)):
                    path = [Part("head", layer, h) for layer, h in zip(layers, heads, strict=True)]
                    total = total + path_value(model, ids, None, reads, asked, path)
            worst = max(worst, float(((total - wanted).abs() / wanted.abs().max()).max()))
        gaps[name] = worst
    return {"gaps": gaps, "paths": 1 + 12 + 48 + 64}


def angles(samples: int) -> dict[str, Any]:
    """The mean angle between y and the gradient of y . norm(x), against the bound."""
    rows = []
    for d in (128, 576, 2048):
        for kind in ("layer", "rms"):
            g = torch.Generator().manual_seed(d)
            norm = NormView(nn.LayerNorm(d, elementwise_affine=False), kind)  # type: ignore[arg-type]
            x, y = torch.randn(samples, d, generator=g), torch.randn(samples, d, generator=g)
            grad = norm.vjp(y, x * (0.1 + 10 * torch.rand(samples, 1, generator=g)))
            cosine = nn.functional.cosine_similarity(grad.double(), y.double(), dim=-1).clamp(max=1.0)
            mean = float(torch.acos(cosine).mean())
            rows.append(
                {"d": d, "kind": kind, "angle": mean, "bound": norm_angle_bound(d), "times": mean * math.sqrt(d)}
            )
    return {"rows": rows}


def couplings(model: Model, covariance: int, tokens: int) -> dict[str, Any]:
    """C and its covariance-weighted version against measured slopes, isotropic states and SmolLM2's own."""
    g = torch.Generator().manual_seed(0)
    off = []
    for _ in range(20):
        y1 = torch.randn(576, generator=g)
        y2 = 0.7 * y1 + torch.randn(576, generator=g)
        x = torch.randn(40_000, 576, generator=g)
        x = x / x.norm(dim=1, keepdim=True)
        slope = np.polyfit((x @ y1).double().numpy(), (x @ y2).double().numpy(), 1)[0]
        off.append(abs(slope / coupling(y1, y2).coefficient - 1))
    ranking, _ = head_features(model, "she - he")
    top = ranking.top(1).parts[0]
    assert isinstance(top, Part)
    fit, fresh = (list(itertools.islice(_texts(name), 600)) for name in ("foldoc", "anarchism"))
    rows = []
    rng = np.random.default_rng(0)
    for path in ([], [str(top)]):
        pair = [pull_back(model, o, path) for o in ("she - he", "her - him")]
        at = pair[0].at
        known = moments(model, token_rows(model, fit, covariance), at)
        x = states(model, token_rows(model, fresh, tokens), at)[:tokens]
        a, b = (f.scores(x).double().numpy() for f in pair)
        slope, r = float(np.polyfit(a, b, 1)[0]), float(np.corrcoef(a, b)[0, 1])
        plain, weighted = coupling(*pair), coupling(*pair, known)
        unrelated = []
        for _ in range(20):
            chosen = rng.integers(1000, 40_000, size=4).tolist()
            two = [
                pull_back(model, Observable(f"#{i} - #{j}", {i: 1.0, j: -1.0}), path)
                for i, j in (chosen[:2], chosen[2:])
            ]
            unrelated.append(
                (
                    float(np.corrcoef(two[0].scores(x), two[1].scores(x))[0, 1]),
                    coupling(*two, known).r,
                    coupling(*two).r,
                )
            )
        each = np.abs(np.array(unrelated))
        rows.append(
            {
                "path": " -> ".join(path) or "direct",
                "at": str(at),
                "slope": slope,
                "r": r,
                "plain": plain.coefficient,
                "cosine": plain.r,
                "weighted": weighted.coefficient,
                "weighted_r": weighted.r,
                "random_r": float(each[:, 0].mean()),
                "random_most": float(each[:, 0].max()),
                "random_over": float((each[:, 0] > 0.2).mean()),
                "foretold": float(np.corrcoef(np.array(unrelated)[:, 0], np.array(unrelated)[:, 1])[0, 1]),
                "foretold_plain": float(np.corrcoef(np.array(unrelated)[:, 0], np.array(unrelated)[:, 2])[0, 1]),
            }
        )
    return {"isotropic": float(np.max(off)), "rows": rows, "tokens": covariance, "judged": tokens}


def _texts(name: str) -> Iterator[str]:
    return (d.text for d in documents(name))


# -- 6.4: occupations ------------------------------------------------------------------------------------------------


def gender(model: Model, words: Sequence[str], draws: int) -> dict[str, Any]:
    """Occupations: does the feature from weights alone order them as the model does, and does the answer need it?"""
    tokenizer: Any = model.tokenizer
    asked = Observable.parse("she - he", model)
    ranking, features = head_features(model, asked)
    order = np.argsort(-ranking.values)
    heads = [h for h in ranking.parts if isinstance(h, Part)]
    layers = list(range(model.n_layers))
    answer, at_word, attention = [], [], []
    for word in words:
        ids = torch.tensor([tokenizer(f"The {word} said that")["input_ids"]])
        place = len(tokenizer(f"The {word}")["input_ids"]) - 1
        run = model.run(ids, capture=[(n, layer) for layer in layers for n in ("resid_pre", "pattern")])
        assert run.logits is not None
        answer.append(float(asked.value(run.logits[0, -1])))
        at_word.append(torch.stack([run["resid_pre", layer][0, place] for layer in layers]))
        attention.append(torch.stack([run["pattern", layer][0, :, -1, place] for layer in layers]))
    ld, x, looks = np.array(answer), torch.stack(at_word), torch.stack(attention)  # (word,), (word, layer, d), ...
    scores = {i: (x[:, heads[i].layer] @ features[i]).double().numpy() for i in order[:40]}
    rows = []
    for i in order[:10]:
        looked = float(looks[:, heads[i].layer, heads[i].index].mean())
        told = {"head": str(heads[i]), "length": float(ranking.values[i]), "attention": looked}
        rows.append(told | _rho(scores[i], ld))
    weighted = sum(looks[:, heads[i].layer, heads[i].index].double().numpy() * s for i, s in scores.items())
    named = [words.index(w) for w in LABELLED]
    rest = [i for i in range(len(words)) if i not in named]
    states_ = x.double().numpy()
    first, labels = int(heads[order[0]].layer or 0), np.array([1, 1, -1, -1])
    baselines = []
    for way in (mean_difference, logistic):
        each = [_rho(states_[rest, n] @ way(states_[named, n], labels).vector, ld[rest]) for n in layers]
        best = int(np.argmax([e["rho"] for e in each]))
        baselines.append({"way": way.__name__, **each[first], "best_layer": best, "best": each[best]["rho"]})
    more = []
    for n in (4, 8, 16, 24):
        got: list[float] = []
        for draw in range(draws):
            some = np.random.default_rng([n, draw]).permutation(len(words))[:n]
            label = np.where(ld[some] > np.median(ld), 1, -1)
            left = np.setdiff1d(np.arange(len(words)), some)
            if len(set(label.tolist())) == 2 and len(left) > 3:
                direction = mean_difference(states_[some, first], label).vector
                got.append(float(spearmanr(states_[left, first] @ direction, ld[left]).statistic))
        more.append({"n": n, "draws": len(got), "rho": float(np.mean(got)), "sd": float(np.std(got))})
    return {
        "rows": rows,
        "n": len(words),
        "weighted": _rho(weighted, ld),
        "mine": _rho(scores[order[0]][rest], ld[rest]),
        "baselines": baselines,
        "more": more,
        "ld": dict(zip(words, ld.round(2).tolist(), strict=True)),
        **_without(model, asked, [heads[i] for i in order[:10]], words, draws),
        "ranks": _agreement(model, ranking.values.tolist(), [str(p) for p in heads]),
    }


def _rho(a: Any, b: Any) -> dict[str, float]:
    """Spearman's correlation with a 95 % interval over examples."""
    rng = np.random.default_rng(0)
    drawn = [spearmanr(a[i], b[i]).statistic for i in rng.integers(len(a), size=(1000, len(a)))]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {"rho": float(spearmanr(a, b).statistic), "low": float(low), "high": float(high)}


def _without(
    model: Model, asked: Observable, heads: Sequence[Part], words: Sequence[str], draws: int
) -> dict[str, Any]:
    """|n . logits| with the feature taken out of what heads read, against random directions of the same heads."""
    tokenizer: Any = model.tokenizer
    rows = [tokenizer(f"The {w} said that")["input_ids"] for w in words]
    ids = torch.tensor([r for r in rows if len(r) == 4])

    def value(changes: Sequence[Intervention]) -> Any:
        logits = model.run(ids, taps=taps([list(changes)], len(ids)) if changes else None).logits
        assert logits is not None
        return asked.value(logits[:, -1]).double().numpy()

    base = value([])
    size = float(np.abs(base).mean())
    found = []
    for k in (1, 3, 10):
        out = value([c for h in heads[:k] for c in subtraction(model, asked, [h])])
        random = []
        for seed in range(draws):
            g = torch.Generator().manual_seed(seed)
            lines = [torch.randn(model.d_model, generator=g) for _ in heads[:k]]
            changes = [subtraction(model, asked, [h], direction=y) for h, y in zip(heads, lines, strict=False)]
            random.append(1 - np.abs(value([c for some in changes for c in some])).mean() / size)
        told = {"lowers": 1 - np.abs(out).mean() / size, "spread": 1 - out.std() / base.std()}
        told |= {"random": np.mean(random), "random_most": np.abs(random).max()}
        found.append({"heads": k} | {name: float(v) for name, v in told.items()})
    return {"without": found, "size": size, "single": len(ids)}


def _agreement(model: Model, lengths: Sequence[float], parts: Sequence[str]) -> dict[str, float]:
    """Lengths of features against what path patching to the logits gives on one pair of prompts."""
    example = Example("The nurse said that", "The king said that", (" she",), (" he",))
    pairs = encode(Encoder(model.tokenizer), [example], model, "logit-diff", "single", ["pair"])
    patched = find("path-patching", model, pairs)
    known = {str(p): abs(float(v)) for p, v in zip(patched.parts, patched.values, strict=True)}
    a, b = np.array([(length, known[p]) for p, length in zip(parts, lengths, strict=True) if p in known]).T
    top = set(np.argsort(-a)[:20].tolist()) & set(np.argsort(-b)[:20].tolist())
    return {"spearman": float(spearmanr(a, b).statistic), "top20": len(top), "heads": len(a)}
