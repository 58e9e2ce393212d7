"""Writing under rules and steering by a guide: what holds, what it costs, against what one would do without.

    python studies/writing.py            writes docs/results/change-writing.md
    python studies/writing.py --quick    a rehearsal

SmolLM2-135M writes without the letter e, beside itself merely asked to and beside a uniform choice among the same legal
tokens; five composed sets of rules; two syllables a word in word mode and in token mode. GeDi steers a small model of a
planted corpus with two styles and many topics, whose words say exactly which style and topic a text has.
"""

from __future__ import annotations

import json
import re
import time
import unicodedata
from typing import Any

import _gedi
import numpy as np
import torch
from _page import RUNS, changed, table, write
from _planted import held, say
from _runs import is_quick, trained

import vesalius
from vesalius.apply.writing import drawing, writer, written
from vesalius.apply.writing.sounds import phones, syllables
from vesalius.corpus import documents
from vesalius.model.stack import Stack
from vesalius.records import write_atomic
from vesalius.train.recipe import read_recipe

OPENINGS = (
    "The old sailor looked at the sea", "In the morning, my sister", "The king of the land", "Music is",
    "A dog ran through the town", "Last winter our school", "The doctor told him that", "On the road to the city",
    "She found a small box",
    "The history of the war",
)  # fmt: skip
SETS = (
    ["no letter e", "fewer than 7 letters"],
    ["no letters e, o", "8 syllables"],
    ["isograms", "more than 2 letters"],
    ["any of a, o", "not all of a, t", "5 words"],
    ["iambic tetrameter", "line rhymes with day", "no letter x"],
)
WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")


def plain(text: str) -> str:
    """Lower case, without accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))


def words_of(text: str) -> list[str]:
    """The words of a text."""
    return [w.replace("\u2019", "'") for w in WORD.findall(plain(text))]


def breaks(rules: list[str], text: str) -> bool:
    """Whether a text breaks a set of rules; written apart from the filters."""
    words, lines = words_of(text), [words_of(line) for line in text.strip("\n").split("\n")]
    if rules == SETS[0]:
        return "e" in plain(text) or any(len(w) > 6 for w in words)
    if rules == SETS[1]:
        return bool(set("eo") & set(plain(text))) or any(sum(syllables(w)[0] for w in x) != 8 for x in lines)
    if rules == SETS[2]:
        return any(len(set(w)) < len(w) or len(w) < 3 for w in words)
    if rules == SETS[3]:
        lone = any(not set("ao") & set(w) or {"a", "t"} <= set(w) for w in words)
        return lone or any(len(x) != 5 for x in lines)
    ends = {re.sub(r".*(?=[A-Z]{2}[12])", "", p) for x in lines for p in phones(x[-1])}
    count = any(sum(syllables(w)[0] for w in x) != 8 for x in lines)
    return "x" in plain(text) or count or "EY1" not in {e.split()[0] for e in ends if e}


def legal_uniform(ids, scores):
    """Every token that is left, alike."""
    return torch.where(torch.isfinite(scores), torch.zeros_like(scores), scores)


def clauses() -> list[str]:
    """Clauses of real texts in which no e stands, four words or more."""
    found: dict[str, None] = {}
    for name in ("bible-web", "bible-kjv", "foldoc"):
        for one in documents(name):
            for clause in re.split(r"(?<=[.,;:!?])\s+", " ".join(one.text.split())):
                if "e" not in plain(clause) and len(words_of(clause)) > 3 and clause.isascii():
                    found[clause] = None
    return list(found)


def tuned(_, quick: bool) -> dict:
    """The model trained on clauses without e, and nothing else done."""
    say("trained on clauses without e")
    folder = RUNS / "writing-corpus"
    folder.mkdir(parents=True, exist_ok=True)
    lines = clauses()
    order = np.random.default_rng(0).permutation(len(lines))
    texts = [" ".join(lines[i] for i in order[at : at + 30]) for at in range(0, len(order), 30)]
    write_atomic(folder / "no-e.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts).encode())
    steps = 2 if quick else 60
    recipe = {
        "name": "no-e", "about": "clauses without the letter e", "model": {"source": "smollm2-135m"},
        "data": {"corpus": str(folder / "no-e.jsonl"), "tokenizer": None, "length": 64, "rows": 8, "held_out": 0.05},
        "optimizer": {"name": "adamw", "lr": 5e-5}, "schedule": {"name": "cosine", "warmup": 0.1, "final": 0.1},
        "steps": steps, "checkpoints": {"log": False, "every": steps, "keep_state": "last"},
        "evaluate": {"every": steps, "batches": 2}, "seed": 0,
    }  # fmt: skip
    model = vesalius.open(f"{trained(read_recipe(recipe), 'writing')}@last")
    n, tokens = (4, 12) if quick else (100, 60)
    found = written(writer(model, []), [OPENINGS[i % len(OPENINGS)] for i in range(n)], tokens, drawing(0.8, 0, 1.0, 0))
    return {"clauses": len(lines), "tokens": steps * 8 * 64, "n": n, "with_e": sum("e" in plain(t.text) for t in found),
            "letters": float(np.mean([c == "e" for t in found for c in plain(t.text) if c.isalpha()])),
            "sample": found[0].prompt + found[0].text}  # fmt: skip


def perplexity(texts) -> float:
    """Of all tokens together, under the model alone."""
    return float(np.exp(-np.mean([x for t in texts for x in t.line.log_probs])))


def lipogram(model, quick: bool) -> dict:
    """No letter e: ruled, asked, and with a uniform choice."""
    n, tokens = (4, 12) if quick else (100, 60)
    prompts = [OPENINGS[i % len(OPENINGS)] for i in range(n)]
    say("no letter e")
    free, ruled = writer(model, []), writer(model, ["no letter e"])
    under = written(ruled, prompts, tokens, drawing(0.8, 0, 1.0, 0))
    say("asked not to")
    asked = written(free, [f"The following text does not contain the letter e. {p}" for p in prompts], tokens,
                    drawing(0.8, 0, 1.0, 0))  # fmt: skip
    say("uniform choice")
    some = prompts[: max(2, n // 4)]
    uniform = written(ruled, some, tokens, drawing(1.0, 0, 1.0, 0), more=[legal_uniform])
    return {
        "n": n, "tokens": tokens, "violations": sum("e" in plain(t.text) for t in under),
        "asked": sum("e" in plain(t.text) for t in asked), "perplexity": perplexity(under),
        "uniform": perplexity(uniform), "free": perplexity(asked), "sample": under[0].prompt + under[0].text,
    }  # fmt: skip


def composed(model, quick: bool) -> list[list]:
    """Texts under sets of rules, judged apart."""
    rows = []
    n, tokens = (2, 14) if quick else (20, 40)
    for rules in SETS:
        say(" + ".join(rules))
        ruled = writer(model, rules, lines=2 if any("syllables" in r or "words" in r for r in rules) else 1)
        lined = bool(ruled.rules.lines)
        texts = written(ruled, [OPENINGS[i % 10] for i in range(n)], tokens, drawing(0.8, 0, 1.0, 0))
        judged = [t for t in texts if t.line.stop == "whole" or not lined]
        broken = sum(breaks(rules, t.text) for t in judged)
        dead = sum(t.line.stop == "dead end" for t in texts)
        shown = next((t.text for t in judged if t.text.strip()), "-").strip().replace("\n", " / ")
        rows.append([", ".join(rules), f"{broken} of {len(judged)}", dead, int(np.median(
            [a for t in texts for a in t.line.allowed])), shown[:110]])  # fmt: skip
    return rows


def two_syllables(model, quick: bool) -> dict[str, tuple[int, int, int, int]]:
    """Mode -> words with another count, words, texts with such a word, texts."""
    found = {}
    n, tokens = (2, 12) if quick else (25, 40)
    for mode in ("word", "token"):
        say(f"two syllables, {mode} mode")
        ruled = writer(model, ["2 syllables a word"], mode=mode)
        texts = written(ruled, [OPENINGS[i % 10] for i in range(n)], tokens, drawing(0.8, 0, 0.95, 0))
        wrong = [sum(syllables(w) != (2,) for w in words_of(t.text)) for t in texts]
        found[mode] = (sum(wrong), sum(len(words_of(t.text)) for t in texts), sum(map(bool, wrong)), n)
    return found


def overhead(model) -> tuple[float, float]:
    """Milliseconds of processor time of one token's forward pass, and of the mask put on its scores (medians)."""
    from vesalius.model.decode import Reader

    ruled = writer(model, ["no letter e"], mode="token")
    stack, ids = Stack([ruled.rule]), ruled.encode(OPENINGS[0])
    stack.begin([ids])
    reader = Reader(model)
    logits = reader.read(torch.tensor([ids]))
    passes, masks = [], []
    for _ in range(25):
        began = time.process_time()
        logits = reader.read(torch.tensor([[5]]))
        passes.append(time.process_time() - began)
        began = time.process_time()
        for _ in range(20):
            stack.apply([ids], reader.ids, logits)
        masks.append((time.process_time() - began) / 20)
    return 1e3 * float(np.median(passes)), 1e3 * float(np.median(masks))


def kept(name: str, quick: bool = False) -> Any:
    """A part of the study, measured now or before."""
    file = RUNS / f"writing-{name}.json"
    if file.exists() and not quick:
        return json.loads(file.read_text())
    model = vesalius.open("smollm2-135m")
    ask = {
        "no-e": lipogram,
        "tuned": tuned,
        "sets": composed,
        "two": two_syllables,
        "cost": lambda m, _: overhead(m),
    }
    found = ask[name](model, quick)
    if not quick:
        RUNS.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(found).encode())
    return found


def rule_claims(found: dict[str, Any]) -> list[list[Any]]:
    """What is asked of writing under rules."""
    no_e, tuned_, sets, two, cost = (found[name] for name in ("no-e", "tuned", "sets", "two", "cost"))
    dead = sum(row[2] for row in sets)
    broken = [row[1].split(" of ") for row in sets]
    share = cost[1] / cost[0]
    return [
        [f"no letter e in {no_e['n']} texts of {no_e['tokens']} tokens: no violation",
         f"{no_e['violations']}; asked for in the prompt {no_e['asked']} of {no_e['n']}; trained on "
         f"{tuned_['tokens']:,} tokens without e {tuned_['with_e']} of {tuned_['n']}",
         held(no_e["violations"] == 0)],
        ["five composed sets of rules: no violation",
         f"{sum(int(b) for b, _ in broken)} of {sum(int(n) for _, n in broken)} texts, {dead} dead ends",
         held(all(b == "0" for b, _ in broken))],
        ["perplexity under the model alone at most half of that of a uniform choice of legal tokens",
         f"{no_e['perplexity']:.1f} against {no_e['uniform']:.3g} (asked and unruled {no_e['free']:.1f})",
         held(no_e["perplexity"] <= no_e["uniform"] / 2)],
        ["two syllables in every word, word mode: all words", f"{two['word'][1] - two['word'][0]} of {two['word'][1]}; "
         f"token mode fails on {two['token'][0]} of {two['token'][1]}, in {two['token'][2]} of {two['token'][3]} texts",
         held(two["word"][0] == 0 < two["token"][0])],
        ["a stateless mask costs at most 5 % of a token's time", f"{share:.2%} ({cost[1]:.3f} ms of {cost[0]:.1f})",
         held(share <= 0.05)],
    ]  # fmt: skip


def main() -> None:
    """Measures, and writes the page."""
    quick = is_quick(__doc__)
    gedi, topical = _gedi.kept("gedi", quick), _gedi.kept("topics", quick)
    found = {name: kept(name, quick) for name in ("no-e", "tuned", "sets", "two", "cost")}
    ruled, guided = rule_claims(found), _gedi.claims(gedi["seeds"], topical["rows"])
    body = [
        table(["asked", "came out", ""], [*ruled, *guided]),
        "## Rules\n\nSmolLM2-135M, temperature 0.8.\n",
        "A text without e: *" + " ".join(found["no-e"]["sample"].split())[:300] + "*\n",
        f"Trained on clauses without e ({found['tuned']['clauses']:,} of two Bibles and a dictionary of computing), no "
        f"rule: {found['tuned']['letters']:.1%} of the letters are e. *"
        + " ".join(found["tuned"]["sample"].split())[:200] + "*\n",
        "Five composed sets, judged by a checker written apart from the filters (a line that ran out of tokens is not "
        "judged):\n",
        table(["rules", "texts that break one", "dead ends", "tokens allowed (median)", "a text"], found["sets"]),
        *_gedi.body(gedi, topical),
    ]  # fmt: skip
    if quick:
        print("\n".join(body))
        return
    command, page = "python studies/writing.py", "change-writing"
    write(page, "Change: writing under rules, and steering by a guide", command, *body, seeds="seeds 0, 1, 2 of guides")
    changed("Constrained Text Generation Studio", ruled, command, page)
    changed("GeDi", guided, command, page)


if __name__ == "__main__":
    main()
