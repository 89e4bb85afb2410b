"""Mixtral (arXiv 2401.04088): Llama with two of eight experts a token."""

from tpu_lm.models.transformer import Config

PRESET = Config(
  tied=False,
  norm_eps=1e-5,
  rope_theta=1e6,
  num_experts=8,
  experts_per_token=2,
  balance_loss=0.02,
)
