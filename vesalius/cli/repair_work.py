"""What `vesalius repair` does: a fault in its blocks, or loops; each beside its control, measured and kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from vesalius.cli import changing as c
from vesalius.cli.console import Screen
from vesalius.runs import Run

PROMPT, WRITTEN = 32, 128  # tokens of greedy continuations
SENTENCES = 50


class Work:
    """What both repairs share: text, the card, the end."""

    def __init__(
        self, screen: Screen, run: Run, model: Any, plan: Any, card: c.Card, request: dict[str, Any], command: str
    ) -> None:
        from vesalius.corpus import plain_text

        self.screen, self.run, self.model, self.plan, self.card = screen, run, model, plan, card
        self.request, self.command, self.notes = request, command, list[str]()
        self.text = plain_text(model, request["keep"], request["keep_rows"], c.row_length(model, 64))
        self.base = model.copied()

    def fault(self, faults: list[Any]) -> None:
        """IRepair, beside the whole model trained on the same examples."""
        from dataclasses import replace

        from vesalius.change.faults import likelihood
        from vesalius.change.repair import repair as work

        order = np.random.default_rng([self.request["seed"], *b"held out"]).permutation(len(faults))
        out = max(1, len(faults) // 4)
        held, train = [faults[i] for i in order[:out]], [faults[i] for i in order[out:]]
        rows = []

        def judged(name: str, model: Any) -> None:
            for side in ("good", "bad"):
                found = likelihood(model, held, side)
                if len(found):
                    rows.append({"model": name, "side": side, "held_out": len(found), "said": found[:, 1].mean(),
                                 "log_p": found[:, 0].mean()})  # fmt: skip

        judged("before", self.model)
        controls = {}
        with self.run.stage("train all", 1), self.screen.step("training all blocks") as tell:
            everything = work(self.model, train, self.text, replace(self.plan, how="all"), tell)
        judged("all blocks", self.model)
        controls["all blocks"] = self.model.copied()
        everything.edit.undo(self.model)
        with self.run.stage("repair", 1), self.screen.step("repairing") as tell:
            done = work(self.model, train, self.text, self.plan, tell)
        judged("repaired", self.model)
        self.run.save_table("faults", pd.DataFrame(rows))
        self.run.save_table("blocks", done.by_block())
        self.run.save_table("choices", done.choices)
        self.run.save_table("log", done.log)
        if done.left_out:
            self.notes.append(f"{done.left_out} examples lack what the loss {self.plan.loss} needs, and were left out")
        card = self.keep(done.edit, controls)
        by = {(r["model"], r["side"]): r for r in rows}
        said = []
        for side, word in (("good", "what should follow"), ("bad", "what should not follow")):
            if ("before", side) in by:
                was, now, other = (by[m, side] for m in ("before", "repaired", "all blocks"))
                each = [f"{r['log_p']:.2f}" for r in (was, now, other)]
                share = [f"{r['said']:.0%}" for r in (was, now, other)]
                said.append(
                    f"{word} has log p {each[0]} a token before, {each[1]} after, {each[2]} with all blocks trained, "
                    f"and is said in {share[0]}, {share[1]} and {share[2]}"
                )
        first = done.by_block().sort_values("chosen", ascending=False)
        named = ", ".join(
            f"L{int(i)} ({int(n)})" for i, n in zip(first["layer"], first["chosen"], strict=True) if n > 0
        )
        text = (
            f"On {len(held)} held-out examples: {'; '.join(said)}. Blocks chosen, with the number of steps: {named}. "
            f"Divergence on plain text {c.value(card, 'repaired', 'divergence'):.4f} nats a token, all blocks "
            f"{c.value(card, 'all blocks', 'divergence'):.4f}."
        )
        self.tell(
            card, "repaired", text, "a fault",
            [("faults", "The fault, on held-out examples",
              "said: share whose continuation greedy decoding says; log p: of a token of it, the mean, in nats."),
             ("blocks", "Which blocks were chosen", "sensitivity: of the repair loss; share: of all blocks'.")],
        )  # fmt: skip

    def loops(self) -> None:
        """DITTO, beside as much plain language modelling."""
        import torch

        from vesalius.change.repetition import break_loops, loops, reinforcement, sentences
        from vesalius.corpus import plain_text
        from vesalius.train.learning import TextRows, learn
        from vesalius.train.objectives import make_objective
        from vesalius.train.objectives.special import needs_for
        from vesalius.train.select import choose

        model, skip = self.model, self.request["keep_rows"]
        more = plain_text(model, self.request["keep"], SENTENCES, c.row_length(model, 64), skip)
        asked = sentences(model, torch.cat([self.text, more]), min(SENTENCES, len(more)))
        prompts = more[:, :PROMPT]
        rows, curves = [], []

        def judged(name: str) -> None:
            with self.screen.step("looking for loops") as tell:
                found = loops(
                    model, prompts, min(PROMPT, prompts.shape[1]), _room(model),
                    lambda done, of: tell(f"looking for loops, {done} of {of}", done / of),
                )  # fmt: skip
            rows.append({"model": name, "loops": found.rate, "distinct_4": found.distinct, "n": len(found.texts)})
            curves.append(reinforcement(model, asked).assign(model=name))

        with self.run.stage("before", 1):
            judged("before")
        with self.run.stage("train text", 1):
            state = {k: v.clone() for k, v in model.hf.state_dict().items()}
            choose(model.hf)
            plain = make_objective("causal-lm", needs_for(model.hf, model.tokenizer))
            source = TextRows(self.text, self.plan.rows, self.plan.seed, int(model.hf.config.vocab_size))
            with self.screen.step("training on plain text") as tell:
                learn(model, source, plain, self.plan.steps, self.plan.lr, self.plan.seed, tell=tell)
            judged("plain text")
            control = model.copied()
            model.hf.load_state_dict(state)
        with self.run.stage("repair", 1), self.screen.step("training against loops") as tell:
            edit, log = break_loops(model, self.text, self.plan, tell)
        with self.run.stage("after", 1):
            judged("repaired")
        self.run.save_table("loops", pd.DataFrame(rows))
        self.run.save_table("curves", pd.concat(curves, ignore_index=True))
        self.run.save_table("log", log)
        card = self.keep(edit, {"plain text": control})
        by = {r["model"]: r for r in rows}
        tp = {n: t["TP"].to_numpy() for n, t in zip(("before", "text", "repaired"), curves, strict=True)}
        text = (
            f"Of {by['before']['n']} greedy continuations of {_room(model)} tokens, {by['before']['loops']:.0%} held a "
            f"sentence that follows on itself before, {by['repaired']['loops']:.0%} after (plain text trained as long: "
            f"{by['plain text']['loops']:.0%}). A repeated sentence's tokens have probability {tp['before'][-1]:.2f} "
            f"at the last repeat before and {tp['repaired'][-1]:.2f} after. Perplexity of plain text x "
            f"{c.value(card, 'repaired', 'perplexity', 'change'):.3f}."
        )
        self.tell(
            card, "repaired", text, "loops",
            [("loops", "Greedy continuations", "loops: share with a sentence that follows on itself."),
             ("curves", "What a repeat does", "TP: mean probability of its tokens; IP: share that rose since the "
              "repeat before; WR: share that is the likeliest token.")],
        )  # fmt: skip

    def keep(self, edit: Any, controls: dict[str, Any]) -> Any:
        """Measures, and saves the model with its undo."""
        from vesalius.change.keeping import keep_change

        yard, notes = self.card.yardstick(self.base)
        self.notes += notes
        makers = c.at_hand({"repaired": self.model, **controls})
        card = c.measured(self.screen, self.run, self.base, makers, yard)
        small = sum(len(x.index) if x.index is not None else x.before.numel() for x in edit.changes)
        undo = edit if small < self.model.n_parameters / 2 else None
        with self.run.stage("save", 1), self.screen.step("saving"):
            folder = c.cleared(self.run.folder / "model")
            keep_change(self.model, self.base, folder, "repair", self.request, card, undo)
        self.run.save_table("tensors", edit.to_frame())
        return card

    def tell(self, card: Any, name: str, lead: str, what: str, tables: list[tuple[str, str, str]]) -> None:
        """The summary."""
        change = c.value(card, name, "perplexity", "change")
        kl = c.value(card, name, "divergence")
        self.run.save_json("summary", {
            "model": self.model.name, "change": "repair", "title": f"{self.model.name} repaired: {what}",
            "lead": lead, "notes": self.notes, "command": self.command,
            "facts": [["perplexity", f"x {change:.3f}", "of plain text"], ["divergence", f"{kl:.4f}", "nats a token"]],
            "tables": [{"name": n, "title": t, "read": r} for n, t, r in tables],
        })  # fmt: skip


def _room(model: Any) -> int:
    """Tokens that may be written after a prompt."""
    return max(4, min(WRITTEN, (model.n_positions or PROMPT + WRITTEN) - PROMPT))
