"""Tokenizers trained on a corpus, as ordinary fast tokenizers of transformers, and numbers by which to compare them.

Four kinds: byte-level BPE (any text comes back exactly), Unigram with a byte fallback (also exact), cased WordPiece
(BERT's; whitespace is not kept), and plain bytes (id = byte). The same corpus gives the same tokenizer: what the
library leaves to the order of its hash tables (numbers of WordPiece's "##" characters, Unigram's scores) is settled
here, and training runs on one thread.

Papers: Sennrich 2016 (BPE), Kudo 2018 (Unigram), Schuster 2012 (WordPiece), BLOOM 2211.05100, PaLM 2204.02311.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from vesalius.corpus.documents import CorpusError, Document
from vesalius.errors import UnknownName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Kind = Literal["bpe", "unigram", "wordpiece", "bytes"]
# What is learnt lies within one match. Words take the space before them; runs of spaces leave one to the next word.
WORDS = r" ?[\p{L}\p{M}]+(?:['’][\p{L}\p{M}]+)*| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?= )|\s+"
# Every sign of punctuation of every script alone, so that no script's commas are glued to its words or each other.
SCRIPTS = r" ?[^\s\p{P}\p{S}]+(?:['’][^\s\p{P}\p{S}]+)*| ?\p{P}| ?\p{S}+|\s+(?= )|\s+"
END = "<|endoftext|>"
EM_ROUNDS = 4  # chosen by hand; from equal scores it gives the fertility of the library's own scores (1.718, 1.720)


@dataclass(frozen=True)
class TokenizerRecipe:
    """How a tokenizer is made.

    Attributes:
        kind: bpe, unigram, wordpiece or bytes.
        vocab_size: entries before padding, special ones counted; for bytes it is 256 and the special ones.
        special: special tokens; the first is the end-of-text token unless `roles` says otherwise.
        roles: transformers' names of special tokens (eos_token, pad_token, mask_token, ...).
        pattern: regular expression of what a token may not cross (bpe, unigram).
        digits: each digit is a token of its own.
        multiple: reserved special tokens fill the vocabulary to a multiple of this.
        min_frequency: of a pair to be merged (bpe, wordpiece).
        alphabet: most characters kept in a WordPiece vocabulary; rarer ones become [UNK].
    """

    kind: Kind = "bpe"
    vocab_size: int = 16_384
    special: tuple[str, ...] = (END,)
    roles: Mapping[str, str] | None = None
    pattern: str = WORDS
    digits: bool = False
    multiple: int = 1
    min_frequency: int = 2
    alphabet: int = 10_000


_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ROLES = {f"{r}_token": f"[{r.upper()}]" for r in ("pad", "unk", "cls", "sep", "mask")}
RECIPES: dict[str, TokenizerRecipe] = {
    "gpt": TokenizerRecipe("bpe"),
    "bloom": TokenizerRecipe("bpe", 250_680, ("<unk>", "<s>", "</s>", "<pad>"), {"unk_token": "<unk>",
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}, SCRIPTS, multiple=128),
    "palm": TokenizerRecipe("unigram", 256_000, (END,), digits=True),
    "bioformer": TokenizerRecipe("wordpiece", 32_768, _BERT, _ROLES),
    "bytes": TokenizerRecipe("bytes"),
}  # fmt: skip


def train_tokenizer(
    documents: Iterable[Document | str], kind: str = "bpe", vocab_size: int | None = None, **options: Any
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on texts.

    Args:
        documents: texts or documents.
        kind: "bpe", "unigram", "wordpiece", "bytes", or a name of `RECIPES`.
        vocab_size: entries of the vocabulary, special ones counted, before padding to `multiple`.
        options: fields of `TokenizerRecipe`.

    Raises:
        CorpusError: no text, or a vocabulary smaller than its alphabet.

    Example:
        >>> tokenizer = train_tokenizer(["low lower lowest"] * 9, "bpe", 270)
        >>> tokenizer.decode(tokenizer("lowest ☕")["input_ids"])
        'lowest ☕'
    """
    recipe = make_recipe(kind, vocab_size, **options)
    build = {"bpe": _bpe, "unigram": _unigram, "wordpiece": _wordpiece, "bytes": _bytes}[recipe.kind]
    stream = _Texts(documents)
    with _one_thread():
        tokenizer = build(stream, recipe)
    if recipe.kind != "bytes" and not stream.bytes:
        raise CorpusError("a tokenizer cannot be trained on no text; give documents that are not empty")
    roles = dict(recipe.roles or {})
    if not roles and recipe.special:
        roles = {"eos_token": recipe.special[0]}
    return _wrap(tokenizer, recipe, roles)


def make_recipe(kind: str, vocab_size: int | None = None, **options: Any) -> TokenizerRecipe:
    """A recipe by the name of a kind or of `RECIPES`, changed by the options; unknown names are refused."""
    kinds: dict[str, TokenizerRecipe] = {
        "bpe": RECIPES["gpt"],
        "unigram": TokenizerRecipe("unigram"),
        "wordpiece": RECIPES["bioformer"],
        **RECIPES,
    }
    if kind not in kinds:
        raise UnknownName("tokenizer", kind, kinds)
    known = {k: v for k, v in asdict(kinds[kind]).items() if k != "kind"}
    for name in options:
        if name not in known:
            raise UnknownName("tokenizer option", name, known)
    if vocab_size is not None:
        options["vocab_size"] = vocab_size
    recipe = TokenizerRecipe(kinds[kind].kind, **{**known, **options})
    least = {"bytes": 0, "bpe": 256}.get(recipe.kind, 1) + len(recipe.special)
    if recipe.vocab_size < least:
        raise CorpusError(f"a vocabulary of {recipe.vocab_size} is too small for {recipe.kind}: at least {least}")
    return recipe


class _Texts:
    """Texts of documents, counted as they pass."""

    def __init__(self, documents: Iterable[Document | str]) -> None:
        self.documents = documents
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        for document in self.documents:
            text = document if isinstance(document, str) else document.text
            self.bytes += len(text)
            yield text


@contextmanager
def _one_thread() -> Iterator[None]:
    name, old = "TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ[name] = "false"
    try:
        yield
    finally:
        if old is None:
            del os.environ[name]
        else:
            os.environ[name] = old


def _cut(recipe: TokenizerRecipe) -> list[Any]:
    from tokenizers import Regex, pre_tokenizers

    cuts = [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")] if recipe.digits else []
    return [*cuts, pre_tokenizers.Split(Regex(recipe.pattern), "isolated")]


def _bpe(texts: Iterable[str], recipe: TokenizerRecipe) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*_cut(recipe), level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        min_frequency=recipe.min_frequency,
        special_tokens=list(recipe.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _unigram(texts: Iterable[str], recipe: TokenizerRecipe) -> Any:
    """Pieces hold their spaces as they are; a character without a piece is spelt in bytes, which all have entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    ascii_signs = [chr(c) for c in range(32, 127)] + ["\n", "\t"]
    room = recipe.vocab_size - 256
    if room < len(recipe.special) + len(ascii_signs) + 1:
        least = 256 + len(recipe.special) + len(ascii_signs) + 1
        raise CorpusError(f"a vocabulary of {recipe.vocab_size} is too small for unigram: at least {least}")
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_cut(recipe))
    trainer = trainers.UnigramTrainer(
        vocab_size=room,
        special_tokens=[*recipe.special, "<unk>"] if "<unk>" not in recipe.special else list(recipe.special),
        unk_token="<unk>",
        initial_alphabet=ascii_signs,
        show_progress=False,
    )
    kept = list(texts)
    tokenizer.train_from_iterator(kept, trainer)
    state = json.loads(tokenizer.to_str())
    model = state["model"]
    named = [*recipe.special, "<unk>"] if "<unk>" not in recipe.special else list(recipe.special)
    pieces = _settled(sorted({piece for piece, _ in model["vocab"]} - set(named)), _words(tokenizer, kept))
    # Bytes lie far below any piece: the text "<0x41>" must never be read as the byte of that name.
    model["vocab"] = [[n, 0.0] for n in named] + pieces + [[f"<0x{b:02X}>", -1e6] for b in range(256)]
    model["unk_id"] = named.index("<unk>")
    model["byte_fallback"] = True
    for entry in state["added_tokens"]:
        entry["id"] = named.index(entry["content"])
    state["added_tokens"].sort(key=lambda entry: int(entry["id"]))
    state["decoder"] = json.loads(decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]).__getstate__())
    return Tokenizer.from_str(json.dumps(state))


def _words(tokenizer: Any, texts: Iterable[str]) -> list[tuple[str, int]]:
    """How often each stretch occurs that a token may not leave, in a fixed order."""
    counts: Counter[str] = Counter()
    for text in texts:
        plain = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer is not None else text
        counts.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(plain))
    return sorted(counts.items())


def _settled(pieces: list[str], words: list[tuple[str, int]]) -> list[list[Any]]:
    """Log-probabilities of the pieces by counting best segmentations, from equal ones on, the commonest piece first.

    The library's own depend in their third digit on the order of a hash table, which differs between processes.
    """
    from tokenizers import models

    scores = dict.fromkeys(pieces, -1.0)
    for _ in range(EM_ROUNDS):
        model = models.Unigram([("<unk>", -100.0), *scores.items()], 0, False)
        counts: Counter[str] = Counter()
        for word, count in words:
            for token in model.tokenize(word):
                counts[token.value] += count
        total = math.log(sum(counts[p] + 0.5 for p in pieces))
        scores = {p: round(math.log(counts[p] + 0.5) - total, 6) for p in pieces}
    return [[p, s] for p, s in sorted(scores.items(), key=lambda entry: (-entry[1], entry[0]))]


def _wordpiece(texts: Iterable[str], recipe: TokenizerRecipe) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    kept = list(texts)
    signs: Counter[str] = Counter()
    for word, count in _words(tokenizer, kept):
        signs.update({sign: count * word.count(sign) for sign in set(word)})
    alphabet = sorted(sorted(signs, key=lambda sign: (-signs[sign], sign))[: recipe.alphabet])
    # Ties between merges go to the lower id, and the library numbers "##x" in the order of a hash table: naming them
    # as special tokens settles it. They are ordinary entries again below.
    pieces = [f"##{sign}" for sign in alphabet]  # a sign may stand within a word that was never seen
    least = len(recipe.special) + len(alphabet) + len(pieces)
    if recipe.vocab_size < least:
        raise CorpusError(f"{least} entries are needed for the characters alone; ask for more or lower `alphabet`")
    trainer = trainers.WordPieceTrainer(
        vocab_size=recipe.vocab_size,
        min_frequency=recipe.min_frequency,
        special_tokens=[*recipe.special, *pieces],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix="##",
        show_progress=False,
    )
    tokenizer.train_from_iterator(kept, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [entry for entry in state["added_tokens"] if entry["content"] in recipe.special]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    ends = [(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    if all(number is not None for _, number in ends):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
        )
    return tokenizer


def _bytes(texts: Iterable[str], recipe: TokenizerRecipe) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    signs = byte_signs()
    tokenizer = Tokenizer(models.BPE(vocab={sign: byte for byte, sign in enumerate(signs)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(recipe.special))
    return tokenizer


def byte_signs() -> list[str]:
    """The printable sign by which byte-level tokenizers write each of the 256 bytes."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b) if b in own else chr(next(rest)) for b in range(256)]


def _wrap(tokenizer: Any, recipe: TokenizerRecipe, roles: Mapping[str, str]) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    short = -tokenizer.get_vocab_size(with_added_tokens=True) % recipe.multiple
    tokenizer.add_special_tokens([f"<|reserved_{i}|>" for i in range(short)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles)
    wrapped.model_input_names = ["input_ids", "attention_mask"]
    return wrapped


def import_sentencepiece(path: str | Path) -> PreTrainedTokenizerFast:
    """A SentencePiece Unigram or BPE model file (.model) as a fast tokenizer; needs the package `sentencepiece`."""
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        raise CorpusError("reading a .model file needs sentencepiece; run: pip install sentencepiece") from None
    if not Path(path).is_file():
        raise CorpusError(f"there is no file '{path}'; check the path")
    from tokenizers import SentencePieceUnigramTokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = SentencePieceUnigramTokenizer.from_spm(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CorpusError(f"{path} is not a SentencePiece Unigram model that can be read ({error})") from None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, unk_token="<unk>", eos_token="</s>", bos_token="<s>"
    )


class Sampled(NamedTuple):
    """Documents drawn from several languages, and the realised mix: a row a language."""

    documents: list[Document]
    mix: pd.DataFrame


def sample(
    documents: Mapping[str, Sequence[Document]], alpha: float = 0.3, seed: int = 0, size_bytes: int | None = None
) -> Sampled:
    """Draws documents so that a language of n bytes has a share proportional to n ** alpha (Conneau 2020).

    Args:
        documents: by language.
        alpha: 1 keeps the proportions, 0 makes all languages equal.
        seed: of the order in which documents are taken.
        size_bytes: UTF-8 bytes to draw, to within a document a language; all there is by default. A language that has
            less than its share is taken round again: `mix` tells how often (`repeats`).
    """
    from vesalius.corpus.shuffle import Permutation

    sizes = {k: sum(len(d.text.encode()) for d in v) for k, v in sorted(documents.items())}
    empty = [k for k, n in sizes.items() if not n]
    if empty or not sizes:
        raise CorpusError(f"there is no text for {', '.join(empty) or 'any language'}; leave it out or add some")
    total = sum(sizes.values()) if size_bytes is None else size_bytes
    weights = {k: (n / sum(sizes.values())) ** alpha for k, n in sizes.items()}
    chosen: list[Document] = []
    rows = []
    for language, size in sizes.items():
        share = weights[language] / sum(weights.values())
        pool, taken, count = documents[language], 0, 0
        while taken < share * total:
            place = Permutation(len(pool), seed, count // len(pool), language)(np.array([count % len(pool)]))[0]
            chosen.append(pool[int(place)])
            taken += len(pool[int(place)].text.encode())
            count += 1
        rows.append((language, size, size / sum(sizes.values()), share, taken, count, taken / size))
    columns = ["language", "bytes", "share_before", "share_wanted", "bytes_drawn", "documents_drawn", "repeats"]
    mix = pd.DataFrame(rows, columns=columns)
    mix["share"] = mix["bytes_drawn"] / mix["bytes_drawn"].sum()
    return Sampled(chosen, mix)
