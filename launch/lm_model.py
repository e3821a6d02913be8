"""The model of the language-model jobs: a Llama with bytes as tokens."""

from __future__ import annotations

import transformers
from lm_data import VOCABULARY_SIZE


def byte_llama(
    *, hidden_size: int, intermediate_size: int, layers: int, heads: int, seq_len: int, special_tokens: int = 0
) -> transformers.LlamaForCausalLM:
    """Fresh weights, from transformers' own definition; nothing is downloaded.

    Args:
        hidden_size: width.
        intermediate_size: width of the feed-forward layers.
        layers: how many.
        heads: of attention.
        seq_len: bytes of the longest window.
        special_tokens: beside the 256 bytes.
    """
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY_SIZE + special_tokens,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=seq_len,
        tie_word_embeddings=False,
        use_cache=False,
        # Every byte is text: none of the 256 is set aside as a mark.
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)
