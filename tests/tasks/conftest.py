"""Small real tokenizers of the kinds that matter, trained on the word lists themselves; tiny models that fit them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from task_helpers import bpe, opened, text
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)


@pytest.fixture(scope="session")
def splitting() -> Any:
    """Digits one by one, the space before a number apart, nothing added around a text (as SmolLM2)."""
    return PreTrainedTokenizerFast(tokenizer_object=bpe(r"\d", ["<eos>"]), eos_token="<eos>")


@pytest.fixture(scope="session")
def beginning() -> Any:
    """As `splitting`, with <bos> put before and <eos> after every text."""
    tok = bpe(r"\d", ["<bos>", "<eos>", "<pad>"])
    ends = [(t, tok.token_to_id(t)) for t in ("<bos>", "<eos>")]
    tok.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def twos() -> Any:
    """Numbers in tokens of two digits, the first with its space (as GPT-2 for most years)."""
    return PreTrainedTokenizerFast(tokenizer_object=bpe(r" ?\d{1,2}", ["<eos>"]), eos_token="<eos>")


@pytest.fixture(scope="session")
def wordpiece() -> Any:
    """A lower-casing WordPiece with [CLS], [SEP] and [MASK] (as BERT)."""
    tok = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tok.train_from_iterator(
        text(), trainers.WordPieceTrainer(vocab_size=6000, special_tokens=specials, show_progress=False)
    )
    ends = [(t, tok.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    tok.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        mask_token="[MASK]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


@pytest.fixture(scope="session")
def sentinels() -> Any:
    """A metaspace BPE with </s> at the end and the sentinel <extra_id_0> (as T5)."""
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<pad>", "</s>", "<unk>", AddedToken("<extra_id_0>", lstrip=True, rstrip=True, special=True)]
    trainer = trainers.BpeTrainer(vocab_size=6000, min_frequency=2, special_tokens=specials, show_progress=False)
    tok.train_from_iterator(text(), trainer)
    tok.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tok.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(params=["splitting", "beginning", "twos"])
def causal_tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def gpt2(splitting: Any) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(splitting), n_positions=128, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3
    )
    return opened(splitting, "causal", GPT2LMHeadModel(config).eval())


@pytest.fixture(scope="session")
def bert(wordpiece: Any) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(wordpiece),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.3,
    )
    return opened(wordpiece, "masked", BertForMaskedLM(config).eval())


@pytest.fixture(scope="session")
def t5(sentinels: Any) -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(sentinels), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return opened(sentinels, "encoder-decoder", T5ForConditionalGeneration(config).eval())
