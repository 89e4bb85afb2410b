"""The first steps of a run beside its plan."""

import json
import types

import pytest

from tpu_lm.plan import compared


def tpus(count: int, kind: str = 'TPU v5 lite'):
  return [types.SimpleNamespace(device_kind=kind)] * count


@pytest.fixture
def spec(tmp_path):
  folder = tmp_path / 'mine.plan'
  folder.mkdir()
  for name, chip, count, fits in (
    ('v5e-8', 'v5e', 8, True), ('v5e-4', 'v5e', 4, False),
    ('v5p-16', 'v5p', 8, True),
  ):  # fmt: skip
    record = {'topology': name, 'chip': chip, 'devices': count, 'fits': fits}
    (folder / f'{name}.json').write_text(json.dumps(record | {'seconds': 2.0}))
  return str(tmp_path / 'mine.py')


def test_the_plan_for_the_devices_here_is_found(spec):
  assert compared.expected(spec, tpus(8))['topology'] == 'v5e-8'
  assert compared.expected(spec, tpus(8, 'TPU v5'))['topology'] == 'v5p-16'


def test_other_devices_and_what_did_not_fit_have_none(spec):
  assert compared.expected(spec, tpus(16)) is None
  assert compared.expected(spec, tpus(4)) is None
  assert compared.expected(spec, tpus(8, 'cpu')) is None
  assert compared.expected('nowhere.py', tpus(8)) is None


def test_the_second_line_is_compared_once():
  said = []
  watch = compared.Watch({'topology': 'v5e-8', 'seconds': 2.0}, said.append)
  for speed in (0.1, 0.4, 0.5):
    watch({'steps_per_second': speed})
  assert said == [
    'plan for v5e-8: 2.000 s a step; measured 2.500 s, 1.25 times as long'
  ]
