"""A planted model whose circuit is long where the answer is read: 48 heads, seven planted, six at the last token.

    L0 duplicate (at the repeated name) -> L1 inhibition -> L2, L3, L4 relays -> L5 mover -> L6 relay -> the answer

"when mary and john went to the store , mary gave a ring to" -> "john"; with three names nothing tells who receives.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

from vesalius.build.blueprint import Base, Blueprint
from vesalius.build.planted import AVOID, LOGIT, REST, TARGET, _words
from vesalius.model import Model
from vesalius.parts import Part

LAYERS, HEADS = 8, 6


class Relay(NamedTuple):
    """The model, and what each planted head does."""

    model: Model
    roles: dict[Part, str]


def relay(base: Base, seed: int) -> Relay:
    """Builds it."""
    words = _words()
    names, openings = words["names"], words["openings"]
    spaces = dict.fromkeys(("excluded", "i0", "i1", "i2", "i3", "o0", "o1"), len(names))
    vocabulary = [*openings, *names, *words["frame"], *words["places"], *words["objects"]]
    plan = Blueprint(base, LAYERS, HEADS, vocabulary, openings, spaces, seed)
    token = [plan.token(n) for n in names]
    at = {space: [plan.feature(space, i) for i in range(len(names))] for space in spaces}
    roles: dict[Part, str] = {}

    duplicate = plan.head(0)
    for name in token:
        duplicate.score(TARGET * name, name)
    duplicate.avoid_self(AVOID)
    duplicate.rest(REST * plan.one)
    duplicate.copy(token, at["excluded"])
    roles[duplicate.part] = "duplicate"

    inhibition = plan.head(1)
    inhibition.score(8.0 * plan.one, plan.all_of("excluded"))
    inhibition.rest(4.0 * plan.one)
    inhibition.copy(at["excluded"], at["i0"])
    roles[inhibition.part] = "inhibition"

    mover = plan.head(5)
    mover.score(6.0 * plan.one, plan.any_token(names))
    for out, name in zip(at["i3"], token, strict=True):
        mover.score(-3.9 * out, name)
    mover.copy(token, at["o0"])
    roles[mover.part] = "mover"

    for layer, reads, writes in ((2, "i0", "i1"), (3, "i1", "i2"), (4, "i2", "i3"), (6, "o0", "o1")):
        head = plan.head(layer)
        head.seek(0, TARGET)
        head.rest(REST * plan.one)
        head.copy(at[reads], at[writes])
        roles[head.part] = "relay"
    plan.logits(names, [LOGIT * o for o in at["o1"]])
    return Relay(Model.wrap(plan.build(), plan.tokenizer(), name=f"relay-{base}-{seed}"), roles)


def prompts(path: Path, n: int, seed: int) -> Path:
    """Writes n prompts that can be solved, each with one that names three people."""
    words, drawn, rows = _words(), random.Random(seed), []
    for _ in range(n):
        giver, receiver, *three = drawn.sample(words["names"], 5)
        start, place, thing = (drawn.choice(words[k]) for k in ("openings", "places", "objects"))
        pair = drawn.sample([giver, receiver], 2)
        form = f"{start} {{}} and {{}} went to the {place} , {{}} gave a {thing} to"
        clean, corrupted = form.format(*pair, giver), form.format(*three)
        rows.append({"clean": clean, "corrupted": corrupted, "answer": f" {receiver}", "wrong": f" {giver}"})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
