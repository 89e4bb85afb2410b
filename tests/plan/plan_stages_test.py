import made_plans
import pytest
from columns_test import staged

from tpu_lm.plan import chips, stages

EIGHT = chips.find('v5e-8')
FLOPS = 2 * (2 * (32 * 4 * 8 * 2 + 32 * 2 * 8 * 2 + 3 * 32 * 48) + 64 * 32)


def others(name, **options):
  made = staged(name, **options)
  return stages.others(made, EIGHT, made_plans.devices())


def test_a_stage_that_only_learns_runs_nothing_else():
  assert others('pretrain') == []
  assert others('sft') == []


def test_a_reference_scores_rows():
  (found,) = others('dpo')
  assert found['program'] == 'scoring'
  assert found['fits']
  # Rows of one half of the pairs.
  tokens = found['tokens_per_second'] * found['seconds']
  assert tokens == pytest.approx(8 * 16)
  assert found['compiled'] > 0


def test_one_that_samples_reads_prompts_and_decodes():
  found = {one['program']: one for one in others('grpo', group=4)}
  assert list(found) == ['scoring', 'prefill', 'decode']
  tokens = {
    name: one['tokens_per_second'] * one['seconds']
    for name, one in found.items()
  }
  assert tokens == pytest.approx(
    {'scoring': 32 * 32, 'prefill': 8 * 16, 'decode': 8 * 4}
  )
  assert 'cache' not in found['prefill']
  decode = found['decode']
  assert 0 < decode['cache'] < decode['compiled']
  assert 0 < decode['parameters'] < decode['compiled']
  # A token a slot, over eight devices.
  assert found['decode']['model_flops'] == FLOPS * 32 / 8
  assert all(one['fits'] for one in found.values())
