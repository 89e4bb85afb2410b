"""Gemma 2 (arXiv 2408.00118): soft caps, and every other layer slides."""

from tpu_lm.models.transformer import Config

PRESET = Config(
  activation='gelu',
  norm_plus_one=True,
  post_norms=True,
  scale_embedding=True,
  attention_soft_cap=50.0,
  logit_soft_cap=30.0,
  window=4096,
  window_pattern=(1, 0),
)
