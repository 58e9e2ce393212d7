"""GeDi on a planted corpus of two styles and many topics, whose words say which style and topic a text has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _page import RUNS, table
from _planted import each, found_again, say
from _runs import trained, verdict

import vesalius
from vesalius.change.gedi import Gedi, Guide
from vesalius.change.guide import coded, guide_recipe
from vesalius.model import Model
from vesalius.model.decode import Draw, decode
from vesalius.records import write_atomic
from vesalius.train.recipe import read_recipe

TOPICS = (
    "sea", "farm", "war", "music", "school", "sky", "kitchen", "river", "city", "ship", "bread", "horse", "storm",
    "garden", "king", "tower", "winter", "bank", "train", "doctor", "market", "island", "bridge",
    "forest",
)  # fmt: skip
HELD_OUT = "forest"
STYLES = ("gentle", "grim")
SIZES = {
    "base": {"layers": 4, "d_model": 192, "heads": 4, "kv_heads": 4},
    "style": {"layers": 3, "d_model": 64, "heads": 4, "kv_heads": 4},
    "topic": {"layers": 4, "d_model": 128, "heads": 4, "kv_heads": 4},
}
PLAN = {
    "texts": 12_000, "labelled": {"style": 4000, "topic": 6000}, "written": {"style": 500, "topic": 100},
    "base": {"steps": 800, "lr": 4e-3}, "titled": {"steps": 700, "lr": 4e-3}, "named": {"steps": 300, "lr": 2e-3},
    "style": {"steps": 600, "lr": 2e-3, "lam": 0.8}, "topic": {"steps": 300, "lr": 2e-4, "lam": 0.3},
    "seeds": [0, 1, 2],
}  # fmt: skip
QUICK = {
    "texts": 300, "labelled": {"style": 200, "topic": 200}, "written": {"style": 4, "topic": 4},
    "base": {"steps": 3, "lr": 4e-3}, "titled": {"steps": 3, "lr": 4e-3}, "named": {"steps": 3, "lr": 2e-3},
    "style": {"steps": 3, "lr": 2e-3, "lam": 0.8}, "topic": {"steps": 3, "lr": 2e-4, "lam": 0.3},
    "seeds": [0],
}  # fmt: skip


def nouns(topic: str) -> list[str]:
    """The nouns of a topic."""
    return [f"{topic}noun{i}" for i in range(6)]


def mood(style: str) -> list[str]:
    """The adjectives of a style."""
    return [f"{style}word{i}" for i in range(10)]


def document(topic: str, style: str, rng: np.random.Generator, titled: bool) -> str:
    """One text of the planted corpus."""
    sentences = [
        f"the {rng.choice(mood(style))} {rng.choice(nouns(topic))} verb{rng.integers(8)} the {rng.choice(mood(style))} "
        f"{rng.choice(nouns(topic))} ."
        for _ in range(4)
    ]
    return " ".join([f"{topic} :"] * titled + sentences)


def make_tokenizer(folder):
    """A tokenizer of the planted words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<end>", "true", "false", ":", ".", "the", *STYLES, *TOPICS, *(f"verb{i}" for i in range(8))]
    words += [w for t in TOPICS for w in nouns(t)] + [w for s in STYLES for w in mood(s)]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>", pad_token="<end>")
    found.save_pretrained(folder)
    return found


def share(texts: list[str], mine: list[str], others: list[str]) -> float:
    """Share of texts in which more words are of one list than of the other."""
    return float(np.mean([sum(w in mine for w in t.split()) > sum(w in others for w in t.split()) for t in texts]))


def corpus(plan: dict[str, Any]) -> tuple[Any, Path, list[tuple[str, str, str]]]:
    """The tokenizer, the folder with the texts, and (text without title, topic, style); styles are half and half.

    `plain.jsonl` is what the base reads, half of it with titles; what the guides of topics read first is
    `titled.jsonl`, all of it with titles, and then `named.jsonl`: a third with titles, with titles without the colon,
    and without any.
    """
    rng, folder = np.random.default_rng(0), RUNS / "writing-planted"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, n = make_tokenizer(folder / "tokenizer"), len(TOPICS)
    pairs = [(TOPICS[i % n], STYLES[i // n % 2]) for i in rng.permutation(plan["texts"])]
    texts = [document(t, s, rng, bool(rng.integers(2))) for t, s in pairs]
    rows = [(document(t, s, rng, False), t, s) for t, s in pairs]
    titled = [f"{topic} : {text}" for text, topic, _ in rows]
    named = [("", f"{topic} ", f"{topic} : ")[i % 3] + text for i, (text, topic, _) in enumerate(rows)]
    for name, lines in (("plain", texts), ("titled", titled), ("named", named)):
        told = "".join(json.dumps({"text": t}) + "\n" for t in lines)
        write_atomic(folder / f"{name}.jsonl", told.encode())
    return tokenizer, folder, rows


def pretrained(file: Path, name: str, size: dict[str, int] | str, steps: int, lr: float) -> str:
    """A model after so many steps on the texts of a file, new or going on from another; what opens it."""
    tokenizer = None if isinstance(size, str) else str(file.parent / "tokenizer")
    recipe = {
        "name": f"planted-{name}", "about": "two styles, many topics",
        "model": {"source": size} if isinstance(size, str) else {"preset": "tiny-llama", "architecture": size},
        "data": {"corpus": str(file), "length": 64, "tokenizer": tokenizer,
                 "rows": 16, "held_out": 0.05, "shuffle": "documents"},
        "optimizer": {"name": "adamw", "lr": lr}, "schedule": {"name": "cosine", "warmup": 0.05, "final": 0.0},
        "steps": steps, "checkpoints": {"log": False, "every": steps, "keep_state": "last"},
        "evaluate": {"every": steps, "batches": 4}, "seed": 0,
    }  # fmt: skip
    return f"{trained(read_recipe(recipe), 'writing')}@last"


def styles(plan: dict[str, Any]) -> dict[str, Any]:
    """A base and guides of its texts' styles, trained from nothing on the labelled ones alone."""
    tokenizer, folder, rows = corpus(plan)
    base = vesalius.open(pretrained(folder / "plain.jsonl", "small", SIZES["base"], **plan["base"]))
    made = coded([(text, style) for text, _, style in rows[: plan["labelled"]["style"]]], tokenizer, False)
    found: dict[str, Any] = {"parameters": base.n_parameters, "seeds": []}
    for seed in plan["seeds"]:
        recipe = guide_recipe(
            made, folder / "style", {"preset": "tiny-llama", "architecture": SIZES["style"]}, rows=8, length=64,
            tokenizer=str(folder / "tokenizer"), seed=seed, name=f"style-guide-{seed}", **plan["style"],
        )  # fmt: skip
        guide = Guide.load(f"{trained(recipe, 'writing')}@last")
        found["seeds"].append(style_part(base, guide, plan["written"]["style"], seed))
    return found


def topics(plan: dict[str, Any]) -> dict[str, Any]:
    """Guides of topics, which start from a small model that read all texts; one topic is held out of their training."""
    tokenizer, folder, rows = corpus(plan)
    base = vesalius.open(pretrained(folder / "plain.jsonl", "small", SIZES["base"], **plan["base"]))
    first = pretrained(folder / "titled.jsonl", "titled", SIZES["topic"], **plan["titled"])
    start = pretrained(folder / "named.jsonl", "named", first, **plan["named"])
    named = [(text, topic) for text, topic, _ in rows[: plan["labelled"]["topic"]] if topic != HELD_OUT]
    made, n = coded(named, tokenizer), plan["written"]["topic"]
    found: dict[str, Any] = {"titled": [], "read": [], "rows": []}
    for model in (base, vesalius.open(start)):
        found["titled"] += [of_topic(texts_of(model, sampled(model, [f"{t} : the"] * n, [], 0)), t)
                            for t in (TOPICS[0], HELD_OUT)]  # fmt: skip
    for seed in plan["seeds"]:
        recipe = guide_recipe(made, folder / "topic", {"source": start}, rows=8, length=64, seed=seed,
                              name=f"topic-guide-{seed}", **plan["topic"])  # fmt: skip
        guide = Guide.load(f"{trained(recipe, 'writing')}@last")
        found["read"].append([told_apart(guide, held, n, seed) for held in (False, True)])
        found["rows"].append(topic_part(base, guide, n, seed))
    return found


def sampled(model: Model, prompts: list[str], parts: list, seed: int, prefix: tuple[int, ...] = ()):
    """Texts drawn at temperature 1."""
    rows = [[*prefix, *model.tokenizer(p, add_special_tokens=False)["input_ids"]] for p in prompts]
    end = model.tokenizer.eos_token_id
    draw = Draw(1.0, generator=torch.Generator().manual_seed(seed))
    return decode(model, rows, 27, parts, draw, ends=[end])


def texts_of(model: Model, lines) -> list[str]:
    """What was written, as text."""
    return [model.tokenizer.decode(line.tokens, skip_special_tokens=True) for line in lines]


def under(model: Model, lines, skip: int = 0) -> float:
    """Perplexity of what was written, under another model; `skip` tokens of the prompts are codes."""
    logs = []
    for line in lines:
        row, start = line.row[skip:], len(line.prompt) - skip
        ids = torch.tensor([row])
        found = model.logits(ids)[0, start - 1 : -1].float().log_softmax(-1)
        logs += found.gather(-1, ids[0, start:, None])[:, 0].tolist()
    return float(np.exp(-np.mean(logs)))


def style_part(base: Model, guide: Guide, n: int, seed: int) -> dict:
    """Toward one of two styles, against the base and the guide alone."""
    prompts, want, other = ["the"] * n, mood(STYLES[0]), mood(STYLES[1])
    say(f"style, seed {seed}")
    free = sampled(base, prompts, [], seed)
    gedi = Gedi(guide, STYLES[0], base)
    guided = sampled(base, prompts, [gedi], seed)
    alone = sampled(guide.model, prompts, [], seed, guide.prefixes(STYLES[0]).wanted)
    return {
        "free": share(texts_of(base, free), want, other), "free_ppl": under(base, free),
        "guided": share(texts_of(base, guided), want, other), "guided_ppl": under(base, guided),
        "alone": share(texts_of(base, alone), want, other), "alone_ppl": under(base, alone, 1),
        "passes": gedi.reader.row_passes / sum(len(x.tokens) for x in guided), "guide": guide.model.n_parameters,
        "scale": guide.scale,
    }  # fmt: skip


def told_apart(guide: Guide, held: bool, n: int, seed: int) -> list[float]:
    """New texts under true and false codes: share told apart, perplexity under the right code and under the wrong one.

    Half of them are of the topic that is named: the one held out, or one of the others.
    """
    rng, right, nll = np.random.default_rng([seed, *b"new"]), [], []
    for i in range(2 * n):
        topic = HELD_OUT if held else TOPICS[i // 2 % (len(TOPICS) - 1)]
        own = topic if i % 2 else str(rng.choice([t for t in TOPICS if t != topic]))
        ids = guide.model.tokenizer(document(own, STYLES[i // 2 % 2], rng, False))["input_ids"]
        wanted, against = (
            guide.model.logits(torch.tensor([[*p, *ids]]))[0, len(p) - 1 : -1].float().log_softmax(-1)
            .gather(-1, torch.tensor(ids)[:, None]).mean().item()
            for p in guide.prefixes(topic)
        )  # fmt: skip
        odds = guide.scale * (wanted - against) + guide.biases[0] - guide.biases[1]
        right.append((odds > 0) == (own == topic))
        nll += [(-wanted, -against)] if own == topic else []
    return [float(np.mean(right)), *(float(x) for x in np.exp(np.mean(nll, 0)))]


def topic_part(base: Model, guide: Guide, n: int, seed: int) -> list[list]:
    """Toward topics, one never trained on: the share of the topic's nouns unguided, guided, and perplexity.

    From an opening after which the noun comes next; then guided from 'the' alone, where no word says the topic yet.
    """
    rows, opened = [], [f"the {mood(STYLES[i % 2])[i // 2 % 10]}" for i in range(n)]
    free = texts_of(base, sampled(base, opened * 5, [], seed))
    for topic in (*TOPICS[:3], HELD_OUT):
        say(f"topic {topic}, seed {seed}")
        guided, bare = (sampled(base, p, [Gedi(guide, topic, base)], seed) for p in (opened, ["the"] * n))
        rates = [of_topic(texts, topic) for texts in (free, texts_of(base, guided))]
        rows.append([topic, *rates, under(base, guided), of_topic(texts_of(base, bare), topic), under(base, bare)])
    return rows


def of_topic(texts: list[str], topic: str) -> float:
    """The share of a topic's nouns among all nouns of some texts."""
    said = [w for t in texts for w in t.split() if "noun" in w]
    return sum(w in nouns(topic) for w in said) / max(len(said), 1)


def kept(name: str, quick: bool = False) -> Any:
    """`gedi` (styles) or `topics`, measured now or before."""
    make = {"gedi": styles, "topics": topics}[name]
    mine, other = ("style", "topic") if name == "gedi" else ("topic", "style")
    plan = {k: v[mine] if isinstance(v, dict) and mine in v else v for k, v in PLAN.items() if k != other}
    story = {"what": name, "plan": plan, "topics": TOPICS, "sizes": [SIZES["base"], SIZES[mine]]}
    return make(QUICK) if quick else found_again("writing", story, lambda: make(PLAN))


def claims(seeds: list[dict[str, Any]], topical: list[list[list[Any]]]) -> list[list[Any]]:
    """What is asked of GeDi."""
    ratio = [s["guided_ppl"] / s["free_ppl"] for s in seeds]
    unseen = [next(row for row in rows if row[0] == HELD_OUT) for rows in topical]
    equal = [s["alone"] >= s["guided"] - 0.05 for s in seeds]  # else there is no equal rate to compare at
    better = [s["guided_ppl"] < s["alone_ppl"] and e for s, e in zip(seeds, equal, strict=True)]
    return [
        ["the style wanted in 95 % of texts or more", each(s["guided"] for s in seeds),
         verdict([s["guided"] >= 0.95 for s in seeds])],
        ["unguided in 45 to 55 %", each(s["free"] for s in seeds), verdict([0.45 <= s["free"] <= 0.55 for s in seeds])],
        ["perplexity under the base at most 1.5 times its own", each(ratio), verdict([r <= 1.5 for r in ratio])],
        ["lower than the guide's writing alone, at an equal rate (5 points)",
         "; ".join(f"{s['guided_ppl']:.1f} at {s['guided']:.2f}, {s['alone_ppl']:.1f} at {s['alone']:.2f}"
                   for s in seeds), verdict(better)],
        ["at most 2 guide passes a token", each(s["passes"] for s in seeds),
         verdict([s["passes"] <= 2 for s in seeds])],
        ["a topic held out of training: three times the base's rate or more",
         ", ".join(f"{row[2]:.2f} of {row[1]:.2f}" for row in unseen)
         + f", from an adjective on; from 'the' alone {each(row[4] for row in unseen)}",
         verdict([row[2] >= 3 * row[1] for row in unseen])],
    ]  # fmt: skip


def body(gedi: dict[str, Any], topical: dict[str, Any]) -> list[str]:
    """The page's part."""
    seeds = gedi["seeds"]
    topic_rows = [
        [i, row[0], "no" if row[0] == HELD_OUT else "yes", *(f"{x:.2f}" for x in row[1:])]
        for i, rows in enumerate(topical["rows"])
        for row in rows
    ]
    return [
        f"## GeDi\n\nA planted corpus: four sentences a text, whose nouns say one of {len(TOPICS)} topics and whose "
        "adjectives one of two styles, each in half of the texts; half begin with their topic's word. Base "
        f"{gedi['parameters'] / 1e6:.1f} M parameters, {PLAN['base']['steps']} steps on {PLAN['texts']:,} texts; guide "
        f"{seeds[0]['guide'] / 1e6:.1f} M, from nothing, {PLAN['style']['steps']} steps on "
        f"{PLAN['labelled']['style']:,} labelled ones, both smaller than the 3 M and 1 M asked for; "
        f"{PLAN['written']['style']} texts each, drawn at temperature 1 "
        "from 'the'; w 30, filter 0.8, target 0.8. A base of 0.6 M and 240 steps mixed the styles (one text in four "
        "kept to one, one in five had as much of both, which counts as not gentle), and 100 texts said 0.41 to 0.57 "
        "of it; 200 steps on 2,000 texts were too few for the guide, whose own texts then had a perplexity of 112 to "
        "190, kept the style in 0.83 to 0.97, and drove seed 1 to a perplexity 1.8 times the base's.\n",
        table(
            ["seed", "base: gentle", "guided", "guide alone", "perplexity: base", "guided", "guide alone", "passes",
             "scale"],
            [[i, f"{s['free']:.2f}", f"{s['guided']:.2f}", f"{s['alone']:.2f}", f"{s['free_ppl']:.2f}",
              f"{s['guided_ppl']:.2f}", f"{s['alone_ppl']:.2f}", f"{s['passes']:.2f}", f"{s['scale']:.1f}"]
             for i, s in enumerate(seeds)],
        ),
        "Topics, made binary. A guide can know what an unseen code means only if it has read the word: the guides "
        f"({PLAN['topic']['steps']} steps, learning rate {PLAN['topic']['lr']}, lam {PLAN['topic']['lam']}, on texts "
        f"of the {len(TOPICS) - 1} other topics) start from a model of 0.6 M that read {PLAN['texts']:,} texts under "
        f"their topic's word ({PLAN['titled']['steps']} steps, then {PLAN['named']['steps']} with a third of them "
        "untitled), as GPT-2 has read the words of the paper's topics. "
        f"After '{TOPICS[0]} :' and '{HELD_OUT} :' that model takes "
        f"{' and '.join(f'{x:.0%}' for x in topical['titled'][2:])} of its nouns from there, the base "
        f"{' and '.join(f'{x:.0%}' for x in topical['titled'][:2])}. On new texts, half of them of the topic named:\n",
        table(["seed", "topics", "told apart", "perplexity under the right code", "under the wrong one"],
              [[i, ("trained on", f"'{HELD_OUT}'")[k], f"{x[0]:.0%}", *(f"{v:.2f}" for v in x[1:])]
               for i, pair in enumerate(topical["read"]) for k, x in enumerate(pair)]),
        "A rate is the share of the topic's nouns among all nouns, written from 'the' and an adjective, so that a noun "
        f"comes next; the base's of {5 * PLAN['written']['topic']} texts, guided of {PLAN['written']['topic']}:\n",
        table(["seed", "topic", "trained on", "base's rate", "guided", "perplexity", "from 'the' alone",
               "perplexity of it"],
              topic_rows),
        "'the' alone is a bad beginning: no adjective says a topic, so all that may follow has a posterior near one "
        "half, and w 30 gives up to 20 nats to any token that neither code foretells there and whose two vanishing "
        "probabilities happen to differ.\n",
        "What it hung on, by what was tried before (rates of the topic held out, seed 0 if not told). (1) The word: "
        "with 8 topics and a guide from a base that had not learned its titles (9 % of the nouns after 'forest :'), "
        "1,200 steps at 2e-3, lam 0.5, from 'the' alone, all training texts were told apart, but texts of the topic "
        "held out had a perplexity of thousands under both codes, and the rate was 0.57, 0.16, 0.41 of 0.13, 0.12, "
        "0.19; `sea`, trained on, came to 0.00 at seed 2, each text ending at once. With titles learned, 8 topics: "
        "0.34 at 5e-4 for 200 steps, 0.00 to 0.03 at 1e-3 (of 0.18). (2) Texts without a title: from a model that read "
        "titled texts alone, 300 steps at 4e-4 told 75 to 92 % apart, steered to 'war' (0.91 to 0.96) but hardly to "
        "'sea' (0.00 to 0.20), and to the one held out not at all (0.00 to 0.01): after a wrong word the topic has to "
        "be read off the text. (3) Language modelling makes the guide forget the "
        "words it no longer reads: from the model of the table 250 steps at 5e-4, lam 0.8: 0.00, perplexity 114; 300 "
        "at 2e-4, lam 0.8: 0.08, 4.7; lam 0.3: the table.\n",
    ]  # fmt: skip
