"""Languages learnt in context: a transformer against an LSTM, with and without hard-wired n-gram heads; three seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from _page import look_inside, run, table, write
from _runs import held_out, interval, is_quick, trained, verdict

from vesalius.train.recipe import read_recipe

SHAPE = "model.architecture."


@dataclass(frozen=True)
class Size:
    """How large the study is: changes of every recipe, seeds, languages asked."""

    changes: dict[str, Any]
    text: dict[str, Any]
    seeds: tuple[int, ...]
    n: int


FULL = Size({}, {}, (1234, 1235, 1236), 128)
TINY = {f"{SHAPE}d_model": 16, f"{SHAPE}heads": 2, f"{SHAPE}d_ff": 32}
QUICK = Size(
    TINY | {"steps": 4, "data.rows": 8, "data.length": 40, "evaluate.batches": 1, "checkpoints.every": 4},
    TINY | {"steps": 4, "data.rows": 4, "data.length": 32, "evaluate.every": 4, "evaluate.batches": 1},
    (1234,),
    4,
)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": ("icll", {}),
    "LSTM": ("icll", {f"{SHAPE}mixers": "lstm"}),
    "LSTM with n-gram heads": ("icll-ngram", {}),
}
TEXT: dict[str, Any] = {
    "preset": "tiny-llama", "name": "icll-text", "steps": 1000, "optimizer": {"name": "adamw", "lr": 2e-3},
    "checkpoints": {"log": False, "every": 1000, "keep_state": "last"}, "evaluate": {"every": 250, "batches": 16},
}  # fmt: skip
TEXT_MODELS = {
    "two quasi-LSTM layers": {f"{SHAPE}layers": 2, f"{SHAPE}mixers": "qlstm"},
    "three quasi-LSTM layers": {f"{SHAPE}layers": 3, f"{SHAPE}mixers": "qlstm"},
    "n-gram heads between two": {f"{SHAPE}layers": 3, f"{SHAPE}mixers": "qlstm,ngram,qlstm"},
}


def slug(name: str) -> str:
    """A name for folders."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).replace("--", "-")


def asked(name: str, size: Size, seed: int) -> dict[str, Any]:
    """One model, trained and asked; readers by name."""
    recipe, changes = MODELS[name]
    folder = trained(
        read_recipe(recipe, {**size.changes, **changes, "seed": seed, "name": f"icll-{slug(name)}"}), "icll"
    )
    found = run(f"icll {folder} --n {size.n}")
    found["by"] = {r["reader"]: r for r in found["readers"]}
    return found


def perplexity(name: str, size: Size, seed: int) -> float:
    """Held-out perplexity of a small language model on real text."""
    recipe = read_recipe(TEXT, {**size.text, **TEXT_MODELS[name], "seed": seed, "name": f"text-{slug(name)}"})
    return float(np.exp(held_out(trained(recipe, "icll"))[1][-1]))


def judged(found: dict[str, list[dict[str, Any]]], text: dict[str, list[float]]) -> list[list[Any]]:
    """The claims of one architecture."""

    def tvd(name: str, reader: str = "model") -> np.ndarray:
        return np.array([f["by"][reader]["tvd"] for f in found[name]])

    def told(values: Any) -> str:
        return ", ".join(f"{v:.2f}" for v in values)

    valid = {name: np.array([f["by"]["model"]["valid"] for f in runs]) for name, runs in found.items()}
    ours, bigram = tvd("transformer"), tvd("transformer", "2-gram")
    better = valid["transformer"] - valid["LSTM"]
    rows: list[list[Any]] = [
        ["transformer: TVD below the prompt's bigram learner", f"{told(ours)} against {told(bigram)}",
         verdict(ours < bigram)],
        ["transformer: validity ≥ 0.85", told(valid["transformer"]), verdict(valid["transformer"] >= 0.85)],
        ["LSTM worse by ≥ 5 points of validity", told(better), verdict(better >= 0.05)],
    ]  # fmt: skip
    tables = [pd.DataFrame(f.get("heads") or []) for f in found["transformer"]]
    if all(len(t) for t in tables):
        best = [float(t["2-gram"].max()) for t in tables]
        rows.append(["a head's 2-gram score ≥ 0.3 above shuffled", told(best), verdict([b >= 0.3 for b in best])])
        rises = [(float(t.loc[t["2-gram"].idxmax(), "rise"]), t) for t in tables]
        ratio = [(r, float(t.drop(t["2-gram"].idxmax())["rise"].mean())) for r, t in rises]
        rows.append(["without it TVD rises ≥ 3 × as much as without another head",
                     ", ".join(f"{a:.3f} against {b:.3f}" for a, b in ratio),
                     verdict([a >= 3 * max(b, 0.0) and a > 0 for a, b in ratio])])  # fmt: skip
    gap = tvd("LSTM") - ours
    share = (tvd("LSTM") - tvd("LSTM with n-gram heads")) / np.where(np.abs(gap) < 1e-9, np.nan, gap)
    rows.append(["n-gram heads close ≥ 30 % of the LSTM's gap to the transformer", told(share),
                 verdict(share >= 0.3)])  # fmt: skip
    for other in ("two quasi-LSTM layers", "three quasi-LSTM layers"):
        fall = 1 - np.array(text["n-gram heads between two"]) / np.array(text[other])
        mean, low, high = interval(fall)
        held = verdict(fall >= 0.02, mean >= 0.02 and low > 0)
        asked = f"real text: perplexity falls ≥ 2 % against {other}, interval excludes 0"
        rows.append([asked, f"{mean:.1%} [{low:.1%}, {high:.1%}]", held])
    return rows


def main() -> None:
    """Runs everything and writes docs/results/look-inside-icll.md."""
    quick = is_quick(__doc__)
    size = QUICK if quick else FULL
    found = {name: [asked(name, size, seed) for seed in size.seeds] for name in MODELS}
    text = {name: [perplexity(name, size, seed) for seed in size.seeds] for name in TEXT_MODELS}
    claims = judged(found, text)
    rows, heads = [], []
    for name, runs in found.items():
        for seed, told in zip(size.seeds, runs, strict=True):
            mine = told["by"]["model"]
            away = [f"{told['by'][f'{n}-gram']['away']:.2f}" for n in (1, 2, 3, 4)]
            rows.append([name, seed, f"{mine['tvd']:.3f}", f"{mine['valid']:.3f}", *away, told["nearest"]])
            for row in (told.get("heads") or [])[:3]:
                scores = [f"{row[k]:.2f}" for k in ("1-gram", "2-gram", "3-gram")]
                heads.append([name, seed, row["part"], *scores, f"{row['rise']:.3f}"])
    readers = [[r, f"{v['tvd']:.3f}", f"{v['valid']:.3f}"] for r, v in found["transformer"][0]["by"].items()
               if r != "model"]  # fmt: skip
    body = [
        table(["what was asked", "what came out", ""], claims),
        "## Languages in context",
        f"{size.n} languages drawn anew, of up to 8 states and 10 symbols. TVD to the true next-symbol distribution; "
        "valid: the likeliest symbol is possible; then the mean TVD between the model's guesses and those of learners "
        "that count n-grams in the same prompt.",
        table(["model", "seed", "TVD", "valid", "to 1-gram", "2-gram", "3-gram", "4-gram", "nearest"], rows),
        "The learners themselves, on the languages of the first seed:",
        table(["reader", "TVD", "valid"], readers),
        "## Heads that read n-grams",
        "Attention on what stood after earlier occurrences of the last n tokens, less chance; the three heads with the "
        "highest 2-gram score of each model, and how much the TVD rises without each.",
        table(["model", "seed", "head", "1-gram", "2-gram", "3-gram", "rise"], heads),
        "## Real text",
        "Held-out perplexity after 1000 steps on a Bible.",
        table(["model", *[str(s) for s in size.seeds]], [[k, *[f"{x:.2f}" for x in v]] for k, v in text.items()]),
    ]
    if quick:
        print("\n".join(body))
        return
    name, command = "look-inside-icll", "python studies/icll.py"
    write(name, "Languages learnt in context", command, *body, seeds="seeds 1234 to 1236")
    look_inside("In-context language learning", claims, command, name)


if __name__ == "__main__":
    main()
