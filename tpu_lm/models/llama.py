"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783): the plain switches."""

from tpu_lm.models.transformer import Config

PRESET = Config(tied=False, norm_eps=1e-5)
