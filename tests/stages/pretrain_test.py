import jax
import numpy as np
import tiny

from tpu_lm import stage
from tpu_lm.models import transformer
from tpu_lm.stages import pretrain


def test_which_targets_count_by_hand():
  batch = {
    'segment_ids': np.array([[1, 1, 1, 2, 2, 0, 0]]),
    'loss_mask': np.array([[True, True, False, True, True, True, True]]),
  }
  # Targets are slots 1 to 6: 1 counts, 2 is masked, 3 opens a document,
  # 4 counts, 5 and 6 are padding, though their mask says otherwise.
  found = pretrain.target_weights(batch)
  np.testing.assert_array_equal(found, [[1, 0, 0, 1, 0, 0]])


def test_loss_is_the_mean_of_minus_log_p():
  for name, z_loss in (('qwen3', 0.0), ('gemma2', 0.0), ('llama', 0.1)):
    model = tiny.model(name)
    params, batch = tiny.params(model), tiny.batch(4)
    made = stage.make('pretrain', model, params, {'z_loss': z_loss})
    mean, _ = tiny.jit(made.loss)(params, batch, jax.random.key(0))
    x = tiny.jit(model.apply)(
      {'params': params},
      *(batch[k][:, :-1] for k in ('tokens', 'positions', 'segment_ids')),
    )
    logits = transformer.logits(model.config, params, x)
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    targets = batch['tokens'][:, 1:]
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    each = log_z - chosen + z_loss * log_z**2
    weights = np.asarray(pretrain.target_weights(batch))
    np.testing.assert_allclose(mean.weight, weights.sum())
    np.testing.assert_allclose(mean.total, (each * weights).sum(), rtol=1e-5)
