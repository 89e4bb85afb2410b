"""Qwen 2 and 2.5 (arXiv 2407.10671): Llama with biases on q, k and v."""

from tpu_lm.models.transformer import Config

PRESET = Config(qkv_bias=True, rope_theta=1e6)
