import io
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from tpu_lm import metrics
from tpu_lm.errors import UserError
from tpu_lm.progress import Progress, duration


def make_writer(workdir, resume_step=0, **changes):
  settings = {
    'total_steps': 100,
    'tokens_per_step': 64,
    'flops_per_step': 0,
    'stage': 'pretrain',
    'out': io.StringIO(),
  } | changes
  return metrics.Writer(workdir, resume_step, **settings)


def write_run(workdir, steps, resume_step=0):
  with make_writer(workdir, resume_step) as writer:
    for step in steps:
      writer.update(step, 'train', {'loss': np.float32(1) / np.float32(step)})
      if step % 20 == 0:
        writer.update(step, 'heldout', {'loss': 1 / step, 'tokens': 12})


def test_lines_hold_full_precision_and_the_stated_keys(tmp_path):
  with make_writer(tmp_path, flops_per_step=1e6) as writer:
    values = {'loss': np.float32(0.1), 'learning_rate': 1e-3, 'skipped': 2}
    writer.update(10, 'train', values)
    writer.update(10, 'heldout', {'loss': 0.1, 'bytes': np.int64(2**40)})
  train, heldout = metrics.read(tmp_path / 'metrics.jsonl')
  assert train['loss'] == float(np.float32(0.1))
  assert np.float32(train['loss']) == np.float32(0.1)
  assert (train['step'], train['stage'], train['split']) == (
    10,
    'pretrain',
    'train',
  )
  assert train['skipped'] == 2
  assert train['tokens'] == 640
  assert train.keys() >= metrics.TIMING_KEYS - {'steps_per_second'}
  assert train['utilisation'] > 0
  assert heldout['bytes'] == 2**40
  assert metrics.comparable(heldout) == {
    'step': 10,
    'stage': 'pretrain',
    'split': 'heldout',
    'loss': 0.1,
    'bytes': 2**40,
  }


def test_nonfinite_values_stay_valid_json(tmp_path):
  def refuse(name):
    raise AssertionError(name)

  with make_writer(tmp_path) as writer:
    writer.update(1, 'train', {'loss': float('nan'), 'x': np.float32('-inf')})
  text = (tmp_path / 'metrics.jsonl').read_text()
  line = json.loads(text, parse_constant=refuse)
  assert line['loss'] is None
  assert line['x'] is None
  assert line['nonfinite'] == ['loss', 'x']


def test_a_resumed_run_writes_the_same_lines_as_one_go(tmp_path):
  write_run(tmp_path / 'whole', range(10, 101, 10))
  write_run(tmp_path / 'parts', range(10, 71, 10))
  path = tmp_path / 'parts/metrics.jsonl'
  with path.open('ab') as file:  # kill -9 in the middle of a line
    file.write(b'{"step": 80, "sta')
  write_run(tmp_path / 'parts', range(50, 101, 10), resume_step=40)
  whole = metrics.read(tmp_path / 'whole/metrics.jsonl')
  parts = metrics.read(path)
  assert list(map(metrics.comparable, parts)) == list(
    map(metrics.comparable, whole)
  )
  seconds = [line['seconds'] for line in parts]
  assert seconds == sorted(seconds)


def test_has_tells_what_is_written_and_a_line_is_written_once(tmp_path):
  write_run(tmp_path, [10, 20])
  with make_writer(tmp_path, 20) as writer:
    assert writer.has(20, 'heldout')
    assert not writer.has(10, 'heldout')
    writer.update(20, 'heldout', {'loss': 9.0})
  lines = metrics.read(tmp_path / 'metrics.jsonl')
  assert [line['loss'] for line in lines if line['split'] == 'heldout'] == [
    1 / 20
  ]


def test_other_processes_read_but_do_not_write(tmp_path):
  write_run(tmp_path, [10, 20])
  before = (tmp_path / 'metrics.jsonl').read_bytes()
  out = io.StringIO()
  with make_writer(tmp_path, 10, process_index=1, out=out) as writer:
    assert writer.has(10, 'train')
    assert not writer.has(20, 'train')
    writer.update(30, 'train', {'loss': 1.0})
    writer.note('hello')
  assert (tmp_path / 'metrics.jsonl').read_bytes() == before
  assert out.getvalue() == ''


def test_a_damaged_line_is_named(tmp_path):
  write_run(tmp_path, [10, 20, 30])
  path = tmp_path / 'metrics.jsonl'
  lines = path.read_bytes().split(b'\n')
  path.write_bytes(b'\n'.join([lines[0], b'{"x": 1}', *lines[2:]]))
  with pytest.raises(UserError, match=r'metrics.jsonl:2: .*delete the line'):
    make_writer(tmp_path, 30)


def test_excluded_time_does_not_count_as_training(tmp_path):
  with make_writer(tmp_path) as writer:
    writer.exclude(-1000.0)  # as if the step had taken 1000 s more
    writer.update(10, 'train', {})
    writer.update(20, 'train', {})
  slow, fast = metrics.read(tmp_path / 'metrics.jsonl')
  assert 0.6 < slow['tokens_per_second'] < 0.65
  assert slow['time_left'] == pytest.approx(90 * 100, rel=0.05)
  assert fast['tokens_per_second'] > 1000


def test_a_path_that_cannot_be_written_is_a_users_mistake(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot be written'):
    make_writer(tmp_path / 'file')


def test_a_full_disk_is_told_and_leaves_whole_lines(tmp_path):
  """A limit on the file's size stands for the full disk."""
  program = textwrap.dedent("""
    import resource, signal, sys
    from tpu_lm import metrics
    from tpu_lm.errors import UserError
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    writer = metrics.Writer(sys.argv[1], 0, 100, 64, 0, stage='pretrain')
    try:
      for step in range(1, 100):
        writer.update(step, 'train', {'loss': 1 / step})
    except UserError as error:
      print('error:', error)
      sys.exit(2)
  """)
  assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000
  assert signal.getsignal(signal.SIGINT)
  done = subprocess.run(
    [sys.executable, '-c', program, str(tmp_path)],
    capture_output=True,
    text=True,
    check=False,
    cwd=pathlib.Path(__file__).parents[1],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  assert done.returncode == 2, done.stderr
  last = done.stdout.splitlines()[-1]
  assert 'free some space' in last
  assert 'stay valid' in last
  text = (tmp_path / 'metrics.jsonl').read_text()
  assert text.endswith('\n')
  steps = [line['step'] for line in metrics.read(tmp_path / 'metrics.jsonl')]
  assert steps == list(range(1, len(steps) + 1))
  assert len(steps) >= 3


def test_tensorboard_gets_the_numbers(tmp_path):
  with make_writer(tmp_path, tensorboard=True) as writer:
    writer.update(10, 'train', {'loss': 2.0})
  (events,) = (tmp_path / 'tensorboard').iterdir()
  assert b'train/loss' in events.read_bytes()


class Terminal(io.StringIO):
  def isatty(self):
    return True


def screen(text: str) -> list[str]:
  """What a terminal shows after this output."""
  lines = []
  for line in text.split('\n'):
    shown = line.rpartition('\r')[2]
    for code in ('\x1b[K', '\x1b[1m', '\x1b[2m', '\x1b[0m'):
      shown = shown.replace(code, '')
    lines.append(shown)
  return lines


def test_progress_is_rewritten_on_a_terminal_and_lines_elsewhere(
  tmp_path, monkeypatch
):
  monkeypatch.setenv('COLUMNS', '70')
  monkeypatch.delenv('NO_COLOR', raising=False)
  for out, name in ((Terminal(), 'a'), (io.StringIO(), 'b')):
    with make_writer(tmp_path / name, out=out) as writer:
      for step in (10, 20, 30):
        writer.update(step, 'train', {'loss': 1.25})
        if step == 20:
          writer.update(step, 'heldout', {'loss': 1.5, 'bits_per_byte': 0.75})
    lines = screen(out.getvalue())
    heldout = 'step 20/100 · heldout · loss 1.5000 · bits_per_byte 0.7500'
    if out.isatty():
      assert lines[0] == heldout
      assert lines[1].startswith('━━━━──────── step 30/100 · loss 1.2500 ·')
      assert len(lines[1]) <= 69
      assert lines[2:] == ['']
      assert '\x1b[1m' in out.getvalue()
    else:
      assert '\x1b' not in out.getvalue()
      assert [line.split(' · ')[0] for line in lines[:-1]] == [
        'step 10/100',
        'step 20/100',
        'step 20/100',
        'step 30/100',
      ]


def test_no_color_is_respected(monkeypatch):
  monkeypatch.setenv('NO_COLOR', '1')
  out = Terminal()
  Progress(out).update('working', 0.5)
  assert '\x1b[1m' not in out.getvalue()


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [(7.4, '7 s'), (185, '3:05'), (7385, '2:03:05'), (352800, '4 d 02 h')],
)
def test_duration(seconds, text):
  assert duration(seconds) == text
