"""`vesalius observe`: a question asked of the logits, pulled back to directions of earlier layers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import typer

from vesalius.cli import groups as g
from vesalius.cli import options as o
from vesalius.cli.console import Screen, conclude, drawn, typed
from vesalius.errors import VesaliusError
from vesalius.runs import Run

if TYPE_CHECKING:
    from vesalius.lens import Observable
    from vesalius.model import Model
    from vesalius.parts import Part

ROWS = 6  # rows of text drawn token by token
WORDS = 15
FLAT = 1e-5  # of the largest score: scores that differ by less are rounding


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("observe")(g.expanded(observe))


def observe(
    observable: Annotated[
        str, typer.Argument(help="Words less other words: 'she - he', 'she, her - he, him'; #17 is a token's number.")
    ],
    model: o.ModelName = o.MODEL_DEFAULT,
    through: Annotated[
        str | None, typer.Option("--through", help="Heads and MLPs of a path, in order: L9.H6,L12.MLP. Default: none.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option("--at", help="Where the feature is read, such as L9.resid_pre; by default before the path."),
    ] = None,
    against: Annotated[
        str | None, typer.Option("--with", help="Another observable: are the two features coupled?")
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option("--corpus", help="Text to score: a corpus by name, a file or a folder (`vesalius corpora`)."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=8, help="How many tokens of it are read.")] = 2000,
    between: Annotated[
        str | None,
        typer.Option(
            "--between", help="For MLPs on the path: 'PROMPT | PROMPT', one for each side; else the mean of --corpus."
        ),
    ] = None,
    *,
    where: g.UndrawnRunOptions,
    machine: g.Opening,
) -> None:
    """Ask what moves a difference of logits: which heads, by which direction of their input, and where in a text it is.

    Works from weights alone. With --corpus heads of different layers are comparable, every token is scored, and with
    --with the coupling of two observables is predicted and measured.
    """
    from vesalius.lens import Observable
    from vesalius.lens.places import check_path, stage_of

    screen = machine.screen(where.as_json)
    opened = machine.opened(screen, model)
    asked = Observable.parse(observable, opened)
    other = None if against is None else Observable.parse(against, opened)
    path = check_path(opened, [t for t in (through or "").split(",") if t.strip()])
    if at is not None:
        stage_of(opened, at)
    if texts is None and between is None and any(p.kind == "mlp" for p in path):
        raise VesaliusError(
            f"{next(p for p in path if p.kind == 'mlp')} is not linear: take its tangent between two prompts "
            "(--between 'The nurse said | The king said') or at the mean of a text (--corpus foldoc)"
        )
    prompts = None
    if between is not None:
        sides = [s.strip() for s in between.split("|")]
        if len(sides) != 2 or not all(sides):
            raise VesaliusError(
                f"--between {between!r} is not two prompts; write them as 'The nurse said | The king said'"
            )
        prompts = (sides[0], sides[1])
    read = list(_read(texts, tokens)) if texts is not None else None
    request = {
        "command": "observe",
        "model": opened.name,
        "model_fingerprint": opened.fingerprint,
        "task": asked.text,
        "weights": {str(k): v for k, v in asked.weights.items()},
        "with": other.text if other else None,
        "through": [str(p) for p in path],
        "at": at,
        "texts": texts,
        "text_digest": None if read is None else hashlib.sha256("\0".join(read).encode()).hexdigest()[:16],
        "tokens": tokens if read is not None else None,
        "between": list(prompts) if prompts else None,
        "dtype": machine.dtype,
    }
    command = typed()
    with Run.start(request, where.out, where.fresh, command) as run:
        if not run.done:
            _study(screen, run, _Asked(opened, asked, other, path, at, read, tokens, prompts), command)
    drawn(screen, run)
    _show(screen, run)


class _Asked(NamedTuple):
    """A request, read."""

    model: Model
    first: Observable
    second: Observable | None
    path: tuple[Part, ...]
    at: str | None
    texts: list[str] | None
    tokens: int
    prompts: tuple[str, str] | None


def _read(what: str, tokens: int) -> Iterator[str]:
    """Texts of a file or corpus; more than the tokens asked for are not read."""
    from vesalius.corpus import documents

    seen = 0
    for document in documents(what):
        yield document.text[: 12 * tokens]
        seen += len(document.text)
        if seen > 12 * tokens:  # characters; no tokenizer of words needs twelve a token
            return


def _study(screen: Screen, run: Run, it: _Asked, command: str) -> None:
    from vesalius.lens import (
        between_prompts,
        coupling,
        head_features,
        mean_states,
        moments,
        norm_scales,
        pull_back,
        token_rows,
    )
    from vesalius.lens.texts import states

    model, path = it.model, it.path
    notes = [*it.first.notes, *(it.second.notes if it.second else ())]
    rows = None if it.texts is None else token_rows(model, it.texts, it.tokens)
    with run.stage("weights", 1), screen.step("pulling back"):
        given: dict[str, Any] = {"scales": None if rows is None else norm_scales(model, rows)}
        if it.prompts is not None:
            given["points"] = between_prompts(model, *it.prompts)
        elif rows is not None:
            given["points"] = mean_states(model, rows)
        feature = pull_back(model, it.first, path, at=it.at, **given)
        other = None if it.second is None else pull_back(model, it.second, path, at=it.at, **given)
        before = not path or path[0].layer != 0 or path[0].kind != "head"
        ranking = head_features(model, it.first, path, **given)[0] if before else None
    if ranking is not None:
        run.save_scores("scores", ranking)
    run.save_array("feature", vector=feature.vector.numpy())
    if model.tokenizer is not None:
        run.save_table("words", _words(model, feature.vector))
    summary: dict[str, Any] = {
        "model": model.name,
        "task": it.first.text,
        "with": it.second.text if it.second else None,
        "path": " → ".join(map(str, path)),
        "at": str(feature.at),
        "length": feature.norm,
        "scaled": rows is not None,
        "unit": "logits a unit of state" if rows is not None else "direction's length",
    }
    if model.anatomy.softcap is not None:
        notes.append("this model caps its logits softly: the observable is read before the cap")
    if other is not None:
        plain = coupling(feature, other)
        summary["coupling"] = {"coefficient": plain.coefficient, "cosine": plain.r}
    if rows is not None:
        with run.stage("texts", len(rows)), screen.step("scoring the text"):
            found = states(model, rows, feature.at)
            scores = feature.scores(found).numpy()
            run.save_table("tokens", _tokens(model, rows, scores))
            summary["tokens"] = len(scores)
            if other is not None:
                second, half = other.scores(found).numpy(), len(rows) // 2
                seen = sum(r.shape[1] - 1 for r in rows[:half])  # tokens whose covariance foretells the others' slope
                x, y = scores[seen:], second[seen:]
                measured = _line(x, y)
                if measured:
                    run.save_table("pairs", pd.DataFrame({"first": x, "second": y}))
                else:
                    notes.append("one observable's score is the same for all tokens of this text: no slope is measured")
                if half and measured:
                    weighted = coupling(feature, other, moments(model, rows[:half], feature.at))
                    measured |= {"weighted": weighted.coefficient, "r": weighted.r}
                summary["coupling"] |= measured
    run.save_json("summary", summary | {"lead": lead(summary, ranking), "notes": notes, "command": command})


def _line(x: Any, y: Any) -> dict[str, float]:
    """Slope and correlation of two scores over tokens; nothing where one is the same for all."""
    if len(x) < 2 or min(np.ptp(v) / max(float(np.abs(v).max()), 1e-30) for v in (x, y)) < FLAT:
        return {}
    return {"slope": float(np.polyfit(x, y, 1)[0]), "measured_r": float(np.corrcoef(x, y)[0, 1])}


def _words(model: Any, vector: Any) -> pd.DataFrame:
    """Tokens whose embeddings lie furthest along a direction and furthest against it, by cosine."""
    from torch.nn.functional import cosine_similarity

    table = model.hf.get_input_embeddings().weight.detach().float()
    cosine = cosine_similarity(table, vector.to(table.device)[None], dim=-1).cpu()
    high, low = cosine.topk(WORDS), (-cosine).topk(WORDS)
    said = [[str(model.tokenizer.decode([int(i)])) for i in found.indices] for found in (high, low)]
    return pd.DataFrame(
        {"raised": said[0], "cosine": high.values.tolist(), "lowered": said[1], "cosine ": (-low.values).tolist()}
    )


def _tokens(model: Any, rows: list[Any], scores: Any) -> pd.DataFrame:
    """Scores of the first rows token by token, and of the most extreme tokens of all with what stands before them."""
    places = [(i, j) for i, row in enumerate(rows) for j in range(1, row.shape[1])]
    order = set(np.argsort(-np.abs(scores))[:24].tolist())
    kept = []
    for n, (i, j) in enumerate(places):
        if i < ROWS or n in order:
            ids = rows[i][0]
            before = " ".join(str(model.tokenizer.decode(ids[max(0, j - 8) : j].tolist())).split())
            said = str(model.tokenizer.decode([int(ids[j])]))
            kept.append({"row": i, "place": j, "token": said, "score": float(scores[n]), "context": before})
    return pd.DataFrame(kept)


def lead(summary: dict[str, Any], ranking: Any) -> str:
    """The finding in a sentence or two."""
    path = f"through {summary['path']}" if summary["path"] else "on the direct path"
    text = f"The feature of '{summary['task']}' {path} is read at {summary['at']}"
    if ranking is not None:
        first = ranking.top(3)
        named = ", ".join(f"{p} ({v:.3g})" for p, v in zip(first.parts, first.values, strict=True))
        text += f"; the heads before it that could move it most are {named}"
    text += "."
    if "coupling" in summary:
        c = summary["coupling"]
        text += f" With '{summary['with']}' its cosine is {c['cosine']:.2f}, C {c['coefficient']:.2f}"
        if "weighted" in c:
            text += f", by the covariance of half the text {c['weighted']:.2f}; on the other half the slope is "
            text += f"{c['slope']:.2f}"
        text += "."
    return text


def _show(screen: Screen, run: Run) -> None:
    lines: list[Any] = []
    found: dict[str, Any] = {}
    if run.has("scores.parquet"):
        table = run.scores("scores").top(10).to_frame()[["part", "score"]].rename(columns={"score": "length"})
        lines += [table, ""]
        found["heads"] = table.to_dict("records")
    if run.has("words.parquet"):
        table = run.table("words").head(8)
        lines += [table, ""]
        found["words"] = table.to_dict("records")
    if run.has("tokens.parquet"):
        table = run.table("tokens")
        table = table.loc[table["score"].abs().sort_values(ascending=False).index].head(8)
        lines += [table[["token", "score", "context"]], ""]
        found["tokens"] = table.to_dict("records")
    conclude(screen, run, *lines[:-1], **found)
