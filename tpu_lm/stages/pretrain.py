"""Next-token prediction: the mean of -log p(token | earlier tokens).

Columns: tokens, loss_mask, segment_ids, positions, all [B, L+1]. The first L
are read, the last L predicted. A target counts where `loss_mask` says so and
the token before it belongs to the same segment, so that no document is
predicted from another; segment 0 is padding.

With `z_loss` the log-partition is pulled towards 0 (PaLM, arXiv 2204.02311,
section 5): z_loss * logsumexp(logits)^2 is added for each target.
"""

from tpu_lm import cross_entropy
from tpu_lm.models import transformer
from tpu_lm.stage import Mean, Stage, hidden_states, target_weights

ROWS = ('text',)


def make(model, start, *, z_loss: float = 0.0) -> Stage:
  del start  # nothing is compared with where it started

  def loss(params, batch, key):
    del key  # no dropout
    hidden_BLD = hidden_states(model, params, batch)
    total, weight = cross_entropy.mean(
      *transformer.read_by_head(params, hidden_BLD),
      batch['tokens'][:, 1:],
      target_weights(batch),
      soft_cap=model.config.logit_soft_cap,
      z_loss=z_loss,
      chunk=model.config.loss_chunk,
    )
    return Mean(total, weight), {}

  return Stage(loss)
