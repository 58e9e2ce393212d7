"""What `vesalius write` and `vesalius steer` share: options of decoding, a recorder of steps, the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from vesalius.cli.console import Screen, conclude, drawn
from vesalius.errors import VesaliusError
from vesalius.runs import Run

DRAW_PANEL = "Drawing"
LIKELY = 20  # tokens a step that are asked why they were barred

Tokens = Annotated[int, typer.Option("--tokens", min=1, help="Tokens to write at most.", rich_help_panel=DRAW_PANEL)]
Number = Annotated[int, typer.Option("--n", min=1, help="Texts after each prompt.", rich_help_panel=DRAW_PANEL)]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0, help="0 takes the likeliest token.", rich_help_panel=DRAW_PANEL)
]
TopK = Annotated[
    int, typer.Option("--top-k", min=0, help="Of so many likeliest; 0 for all.", rich_help_panel=DRAW_PANEL)
]
TopP = Annotated[
    float, typer.Option("--top-p", help="Of the likeliest with this share together.", rich_help_panel=DRAW_PANEL)
]


def causal(model: Any) -> Any:
    """Refuses a model that writes nothing."""
    if model.kind != "causal":
        raise VesaliusError(f"{model.name} is {model.kind} and writes no text; name a causal language model (--model)")
    return model


class Recorder:
    """How much was allowed at each step of each text, and the likeliest barred tokens of the first text."""

    def __init__(self, vocabulary: Any) -> None:
        self.vocabulary = vocabulary
        self.barred: list[dict[str, Any]] = []

    def __call__(self, step: Any) -> None:
        first = step.lines[0]
        if first.stop != "count" or step.rows[0] != first.row or len(step.rows) > len(step.lines):
            return
        at = len(first.tokens)
        if any(r["step"] == at and r["row"] == len(first.prompt) for r in self.barred):
            return
        share = step.logits[0].softmax(-1)
        lost = step.logits[0].isfinite() & ~step.scores[0].isfinite()
        for token in share.topk(min(LIKELY, len(share))).indices.tolist():
            if not bool(lost[token]):
                continue
            for reason in step.stack.why(first.row, token)[:1]:
                after = self.vocabulary.text(first.row[-12:])[-30:]
                text = (self.vocabulary.texts[token] or self.vocabulary.none(token)).replace("\n", "\u21b5")
                self.barred.append(
                    {"step": at, "after": after, "token": text, "share": float(share[token]), "rule": reason.rule,
                     "reason": reason.reason, "row": len(first.prompt)}
                )  # fmt: skip

    def table(self) -> pd.DataFrame:
        """step, after, token, share, rule, reason."""
        names = ["step", "after", "token", "share", "rule", "reason"]
        return pd.DataFrame(self.barred, columns=[*names, "row"])[names].sort_values("share", ascending=False)


def steps_table(texts: Sequence[Any], size: int) -> pd.DataFrame:
    """text, step, allowed, vocabulary."""
    return pd.DataFrame(
        [
            {"text": i, "step": s, "allowed": n, "vocabulary": size}
            for i, text in enumerate(texts)
            for s, n in enumerate(text.line.allowed)
        ],
        columns=["text", "step", "allowed", "vocabulary"],
    )


def middle(values: Sequence[float]) -> float:
    """The median of what is a number; NaN of nothing."""
    found = [v for v in values if np.isfinite(v)]
    return float(np.median(found)) if found else float("nan")


def finish(screen: Screen, run: Run) -> None:
    """Draws the report, prints the texts."""
    drawn(screen, run)
    texts = run.table("texts")
    lines = []
    for row in texts.to_dict("records"):
        if "unsteered" in row:
            lines += [f"unsteered: {row['prompt']}\u2502{row['unsteered']}", "", "steered: "]
        else:
            lines.append("")
        lines[-1] += f"{row['prompt']}\u2502{row['text']}"
        lines.append("")
    conclude(screen, run, *lines, texts=texts.to_dict("records"))
