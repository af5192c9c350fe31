"""The model of the benchmarks of one process: about 10 M random parameters, the shape of benchmarks/throughput."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from fedloom.models.load import hardware_dtype
from fedloom.ops.attention import use_fast_attention

VOCABULARY = 4096


def make_model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=288,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(hardware_dtype("cpu")[0])
    use_fast_attention(model)
    return model
