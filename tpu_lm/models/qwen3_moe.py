"""Qwen 3 with experts (arXiv 2505.09388): eight of many small ones a token.

The published ones have 128 experts, of a hidden_dim of their own, and none
that is shared; norm_topk_prob is `renormalise`.
"""

from tpu_lm.models.transformer import Config

PRESET = Config(
  tied=False,
  qk_norm=True,
  rope_theta=1e6,
  num_experts=128,
  experts_per_token=8,
  balance_loss=0.001,
)
