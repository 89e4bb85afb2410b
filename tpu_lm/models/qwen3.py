"""Qwen 3 (arXiv 2505.09388): Llama with a norm on each query and key head.

Also the house model: the smallest departure from Llama that trains stably at
high learning rates, and the one that exports most simply.
"""

from tpu_lm.models.transformer import Config

PRESET = Config(qk_norm=True)
