"""Tiny random models of every family, made from transformers' own classes; no download."""

from __future__ import annotations

import torch
import transformers as tf
from transformers import PreTrainedModel

from vesalius.model import Model

VOCAB, LAYERS, HEADS, D, MLP = 97, 3, 4, 32, 48
_COMMON = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = _COMMON | {
    "hidden_size": D,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT = _COMMON | {"n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "n_inner": MLP}
_BERT = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
_GEMMA = _LLAMA | {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 8}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": D,
    "d_kv": 8,
    "d_ff": MLP,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}


def _config(name: str) -> tuple[type, object]:
    make = {
        "gpt2": lambda: (tf.GPT2LMHeadModel, tf.GPT2Config(**_GPT)),
        "gpt-neox": lambda: (
            tf.GPTNeoXForCausalLM,
            tf.GPTNeoXConfig(**{k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}, rotary_pct=0.5),
        ),
        "gpt-neox-serial": lambda: (
            tf.GPTNeoXForCausalLM,
            tf.GPTNeoXConfig(
                **{k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}, use_parallel_residual=False
            ),
        ),
        "gptj": lambda: (tf.GPTJForCausalLM, tf.GPTJConfig(**_GPT, rotary_dim=4)),
        "opt": lambda: (
            tf.OPTForCausalLM,
            tf.OPTConfig(**_BERT | {"ffn_dim": MLP, "word_embed_proj_dim": D}),
        ),
        "opt-350m": lambda: (
            tf.OPTForCausalLM,
            tf.OPTConfig(**_BERT | {"ffn_dim": MLP, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
        ),
        "bloom": lambda: (tf.BloomForCausalLM, tf.BloomConfig(**_COMMON, hidden_size=D, n_layer=LAYERS, n_head=HEADS)),
        "llama": lambda: (tf.LlamaForCausalLM, tf.LlamaConfig(**_LLAMA)),
        "llama-bias": lambda: (tf.LlamaForCausalLM, tf.LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True)),
        "mistral": lambda: (tf.MistralForCausalLM, tf.MistralConfig(**_LLAMA, sliding_window=6)),
        "qwen2": lambda: (tf.Qwen2ForCausalLM, tf.Qwen2Config(**_LLAMA)),
        "qwen3": lambda: (tf.Qwen3ForCausalLM, tf.Qwen3Config(**_LLAMA, head_dim=12)),
        "phi": lambda: (tf.PhiForCausalLM, tf.PhiConfig(**_LLAMA, partial_rotary_factor=0.5)),
        "phi3": lambda: (tf.Phi3ForCausalLM, tf.Phi3Config(**_LLAMA)),
        "gemma": lambda: (tf.GemmaForCausalLM, tf.GemmaConfig(**_LLAMA | {"head_dim": 12})),
        "gemma2": lambda: (tf.Gemma2ForCausalLM, tf.Gemma2Config(**_GEMMA)),
        "gemma3": lambda: (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**_GEMMA)),
        "bert": lambda: (tf.BertForMaskedLM, tf.BertConfig(**_BERT)),
        "roberta": lambda: (tf.RobertaForMaskedLM, tf.RobertaConfig(**_BERT | {"max_position_embeddings": 70})),
        "distilbert": lambda: (
            tf.DistilBertForMaskedLM,
            tf.DistilBertConfig(
                vocab_size=VOCAB, dim=D, hidden_dim=MLP, n_layers=LAYERS, n_heads=HEADS, pad_token_id=0
            ),
        ),
        "t5": lambda: (tf.T5ForConditionalGeneration, tf.T5Config(**_T5)),
        "t5-gated": lambda: (
            tf.T5ForConditionalGeneration,
            tf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        ),
    }
    return make[name]()


CAUSAL = [
    "gpt2", "gpt-neox", "gpt-neox-serial", "gptj", "opt", "opt-350m", "bloom", "llama", "llama-bias", "mistral",
    "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "gemma3",
]  # fmt: skip
PRE_NORM = [f for f in CAUSAL if f != "opt-350m"]
MASKED = ["bert", "roberta", "distilbert"]
SEQ2SEQ = ["t5", "t5-gated"]
ALL = CAUSAL + MASKED + SEQ2SEQ


def tiny_hf(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random transformers model, with weights large enough that every part matters."""
    torch.manual_seed(seed)
    cls, config = _config(name)
    hf = cls(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.08 if p.dim() > 1 else 0.2))
    hf.tie_weights()
    return hf


def tiny(name: str, seed: int = 0) -> Model:
    return Model.wrap(tiny_hf(name, seed), name=name)


def some_ids(rows: int = 3, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
