"""The studio: a page on which a person writes, and a model shows which words may come next under the rules.

The page is one file without outside resources. For the text so far it shows the next words that the rules allow, with
the model's probability of each among what is allowed, and the likeliest words that are barred, with the reason. The
writer picks a word or types; what was typed is read letter by letter, and the first letter that breaks a rule is told.

A next word is grown from a likely first token by taking the likeliest allowed token until the word ends; its
probability is the product over its tokens, each renormalised inside its mask.
"""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from vesalius.apply.writing.write import Mode, Writer, writer
from vesalius.errors import VesaliusError
from vesalius.model.decode import Reader
from vesalius.model.stack import Stack
from vesalius.rows import is_text

Make = Callable[[Sequence[str], Mode], Writer]

PAGE = Path(__file__).parent / "studio.html"
SHOWN, GROWN = 12, 5  # words shown; tokens a word may be grown by
HELD = 8  # sets of rules kept ready
LONGEST = 100_000  # letters of a text that the page may send


@dataclass(frozen=True)
class Choice:
    """A next word: its text with the space before it, its probability, and the tokens it is made of."""

    text: str
    share: float
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Bar:
    """A likely token that may not come, with the model's own probability of it."""

    text: str
    share: float
    reason: str


@dataclass(frozen=True)
class Offer:
    """What may come after a text.

    Attributes:
        choices: allowed next words. barred: likely tokens that are not. allowed, vocabulary: numbers of tokens.
        share: of the model's probability that the allowed tokens have. ended: whether all lines are written.
        may_end: whether the text may stop here. broken: where what was typed breaks a rule, and why, or None.
    """

    choices: tuple[Choice, ...]
    barred: tuple[Bar, ...]
    allowed: int
    vocabulary: int
    share: float
    ended: bool = False
    may_end: bool = True
    broken: tuple[str, str] | None = None


def offer(made: Writer, prompt: str, text: str, shown: int = SHOWN) -> Offer:
    """What may come after a text that was written under a writer's rules.

    Args:
        made: model and rules. prompt: what was given, which is not judged. text: written since.

    Raises:
        VesaliusError: for a text that is none, or leaves no room for a word.
    """
    if not is_text(text):
        raise VesaliusError("the text holds half a character; write it whole")
    stack = made.stack
    before = made.encode(prompt)
    ids = _continued(made, before, prompt, text)
    room = made.model.n_positions
    count = len(before) + len(ids)
    if room and count + GROWN > room:
        raise VesaliusError(f"the text has {count} tokens and {made.model.name} reads {room}: go on in a new text")
    row = list(before)
    stack.begin([row])
    vocabulary = made.vocabulary
    for token in ids:
        reasons = stack.why(row, token)
        if reasons:
            typed = (vocabulary.texts[token] or "").strip()
            return Offer((), (), 0, len(vocabulary), 0.0, broken=(typed, reasons[0].reason))
        row.append(token)
        stack.states(row)
    if stack.ended(row):
        return Offer((), (), 0, len(vocabulary), 0.0, ended=True)
    reader = Reader(made.model)
    logits = reader.read(torch.tensor([row]))
    scores = stack.apply([row], reader.ids, logits)
    own, kept = logits[0].softmax(-1), torch.isfinite(scores[0])
    barred: list[Bar] = []
    for token in own.masked_fill(kept, 0).topk(4 * shown).indices.tolist():
        piece = vocabulary.texts[token]
        if piece and piece.strip() and len(barred) < shown and not bool(kept[token]):
            barred.append(Bar(piece, float(own[token]), stack.why(row, token)[0].reason))
    ends = [e for e in vocabulary.ends if bool(kept[e])]
    choices = _grown(made, stack, reader, row, scores, shown) if bool(kept.any()) else []
    return Offer(
        tuple(choices), tuple(barred), int(kept.sum()), len(vocabulary), float(own[kept].sum()), may_end=bool(ends)
    )


def _continued(made: Writer, before: list[int], prompt: str, text: str) -> list[int]:
    """Tokens of what was written, as the tokenizer would go on from the prompt."""
    if not text:
        return []
    tokenizer: Any = made.model.tokenizer
    whole = [int(i) for i in tokenizer(prompt + text)["input_ids"]]
    if prompt and whole[: len(before)] == before:
        return [t for t in whole[len(before) :] if t not in made.vocabulary.special]
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _grown(
    made: Writer, stack: Stack, reader: Reader, row: list[int], scores: torch.Tensor, shown: int
) -> list[Choice]:
    """The likeliest first tokens, each grown to the end of its word, all together."""
    texts, ends = made.vocabulary.texts, made.vocabulary.ends
    share = scores[0].softmax(-1)
    count = int(min(2 * shown, int((share > 0).sum())))
    top = [t for t in share.topk(count).indices.tolist() if t not in ends]
    if not top:
        return []
    words = [[t] for t in top]
    logs = [math.log(max(float(share[t]), 1e-30)) for t in top]
    done = [not (texts[t] or "").strip() for t in top]
    reader.select([0] * len(top))
    new = torch.tensor(top)[:, None]
    for _ in range(GROWN):
        if all(done):
            break
        logits = reader.read(new)
        rows = [row + w for w in words]
        masked = stack.apply(rows, reader.ids, logits)
        chances = masked.softmax(-1)
        after = chances.argmax(-1).tolist()
        for i, token in enumerate(after):
            piece = texts[token]
            if done[i] or not math.isfinite(float(masked[i, token])):
                done[i] = True
                continue
            if piece is None or not (piece[0].isalnum() or piece[0] in "'\u2019"):
                done[i] = True
                continue
            words[i].append(token)
            logs[i] += math.log(max(float(chances[i, token]), 1e-30))
        new = torch.tensor([[w[-1]] for w in words])
    found: dict[str, Choice] = {}
    for word, log in zip(words, logs, strict=True):
        text = made.vocabulary.text(word)
        if text not in found:
            found[text] = Choice(text, math.exp(log), tuple(word))
    return sorted(found.values(), key=lambda c: -c.share)[:shown]


def application(made: Writer, prompt: str, sentences: Sequence[str], make: Make | None = None) -> Any:
    """The studio as an ASGI application.

    Args:
        made: what the page begins with. prompt, sentences: of it.
        make: the writer of other rules, when they are changed on the page; by default with no further options.

    Raises:
        VesaliusError: without fastapi.
    """
    try:
        from fastapi import Body, FastAPI
        from fastapi.responses import HTMLResponse, JSONResponse
    except ImportError:
        raise VesaliusError("the studio needs fastapi; install it with: pip install 'vesalius[studio]'") from None
    from vesalius.apply.writing.language import known_rules

    app = FastAPI(title="Vesalius studio", docs_url=None, redoc_url=None, openapi_url=None)
    again: Make = make or (lambda rules, mode: writer(made.model, rules, mode=mode))
    lock = threading.Lock()

    @lru_cache(maxsize=HELD)
    def under(rules: tuple[str, ...], mode: Mode) -> Writer:
        return made if (rules, mode) == (tuple(sentences), made.mode) else again(rules, mode)

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return PAGE.read_text("utf-8")

    @app.get("/start")
    def start() -> dict[str, Any]:
        """What the page begins with."""
        table = known_rules()
        known = table[["rule", "about", "what"]].to_dict("records")
        return {"model": made.model.name, "prompt": prompt, "rules": list(sentences), "mode": made.mode, "known": known}

    @app.post("/next")
    def following(asked: dict[str, Any] = Body(...)) -> Any:  # noqa: B008  # the way fastapi declares a body
        """What may come after a text under rules."""
        with lock:
            try:
                rules, mode, given, text = _read(asked, made.mode)
                found = offer(under(rules, mode), given, text)
            except VesaliusError as error:
                return JSONResponse({"error": str(error)}, status_code=400)
        return {
            "choices": [{"text": c.text, "share": c.share} for c in found.choices],
            "barred": [{"text": b.text, "share": b.share, "reason": b.reason} for b in found.barred],
            "allowed": found.allowed, "vocabulary": found.vocabulary, "share": found.share, "ended": found.ended,
            "may_end": found.may_end, "broken": found.broken,
        }  # fmt: skip

    return app


def _read(asked: dict[str, Any], mode: str) -> tuple[tuple[str, ...], Mode, str, str]:
    """What a page sent: rules, mode, prompt, text."""
    rules, mode = asked.get("rules", []), asked.get("mode", mode)
    prompt, text = asked.get("prompt", ""), asked.get("text", "")
    if not isinstance(rules, list) or not all(isinstance(x, str) for x in (*rules, mode, prompt, text)):
        raise VesaliusError("rules are a list of sentences; mode, prompt and text are texts")
    if len(prompt) + len(text) > LONGEST or sum(map(len, rules)) > LONGEST:
        raise VesaliusError(f"more than {LONGEST:,} letters were sent; go on in a new text")
    return tuple(r.strip() for r in rules if r.strip()), mode, prompt, text  # type: ignore[return-value]


def free(port: int) -> None:
    """Makes sure that a page can be served there.

    Raises:
        VesaliusError: if it cannot.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise VesaliusError(f"port {port} cannot be used ({error.strerror}); choose another with --port") from None


def serve(made: Writer, prompt: str, sentences: Sequence[str], port: int, make: Make | None = None) -> None:
    """Serves the studio on this machine until it is interrupted.

    Raises:
        VesaliusError: without fastapi and uvicorn.
    """
    app = application(made, prompt, sentences, make)
    try:
        import uvicorn
    except ImportError:
        raise VesaliusError("the studio needs uvicorn; install it with: pip install 'vesalius[studio]'") from None
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
