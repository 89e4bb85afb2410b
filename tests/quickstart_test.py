"""The first command that a newcomer runs, on fewer steps."""

import json

from tpu_lm import cli, metrics


def test_quickstart_trains_shows_and_sums_up(tmp_path, capsys):
  status = cli.main([
    'quickstart',
    f'--workdir={tmp_path}',
    '--config.steps=24',
    '--config.batch_size=8',
    '--config.eval_every=12',
    '--config.eval_rows=64',
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
  shown = capsys.readouterr().out
  assert f'{figures["bits_per_byte"]:.4f}' in shown
  assert 'true entropy' in shown
  assert 'What it writes' in shown
