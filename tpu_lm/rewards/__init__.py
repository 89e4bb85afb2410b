"""Rewards, one a file: what an answer is worth. See `tpu_lm.scoring`."""
