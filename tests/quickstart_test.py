"""The first command that a newcomer runs, on fewer steps."""

import json

import pytest

from tpu_lm import cli, metrics

FIGURES = {
  'pretrain': 'accuracy sums_accuracy',
  'sft': 'well_formed accuracy sums_accuracy',
  'reward': 'pair_accuracy',
  'dpo': 'win_rate kl',
  'ppo': 'true_reward_before true_reward_after kl',
  'grpo': 'exact_before exact_after pass8_before pass8_after',
  'gamed': 'reward_before reward_after true_reward_before true_reward_after',
  'lora': 'relative_score trained_share',
  'qlora': 'relative_score trained_share',
  'distill': 'student_bits_per_byte baseline_bits_per_byte',
}


@pytest.mark.slow
def test_quickstart_trains_shows_and_sums_up(tmp_path, capsys):
  status = cli.main([
    'quickstart',
    f'--workdir={tmp_path}',
    '--config.steps=12',
    '--config.batch_size=8',
    '--config.eval_every=6',
    '--config.eval_rows=16',
    '--config.log_every=4',
    '--config.optimizer.warmup=4',
  ])  # fmt: skip
  assert status == 0
  summary = json.loads((tmp_path / 'summary.json').read_text())
  figures = summary['pretrain']
  heldout = [
    line['bits_per_byte']
    for line in metrics.read(tmp_path / 'pretrain' / 'metrics.jsonl')
    if line['split'] == 'heldout'
  ]
  assert figures['bits_per_byte'] == heldout[-1] < heldout[0]
  assert 0.3 < figures['true_bits_per_byte'] < figures['bits_per_byte']
  assert figures['seconds'] > 0
  assert figures['tokens_per_second'] > 0
  for stage, names in FIGURES.items():
    for name in names.split():
      assert isinstance(summary[stage][name], float), (stage, name)
  assert summary['lora']['trained_share'] <= 0.03
  assert summary['qlora']['base_bytes_per_parameter'] <= 0.6
  answers = json.loads((tmp_path / 'answers.json').read_text())
  told = {'untrained', *FIGURES} - {'reward'}
  assert set(answers['stages']) == told
  assert 'bits per byte' in (tmp_path / 'report.html').read_text()
  shown = capsys.readouterr().out
  assert f'{figures["bits_per_byte"]:.4f}' in shown
  assert 'true entropy' in shown
  assert 'What it writes' in shown
