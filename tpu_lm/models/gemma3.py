"""Gemma 3, text (arXiv 2503.19786): five sliding layers to a global one."""

from tpu_lm.models.transformer import Config

PRESET = Config(
  activation='gelu',
  norm_plus_one=True,
  post_norms=True,
  qk_norm=True,
  scale_embedding=True,
  window=512,
  window_pattern=(1, 1, 1, 1, 1, 0),
  rope_theta=1e6,
  rope_local_theta=1e4,
)
