import re

import made_plans
import pytest
from html_page import Page

from tpu_lm.plan import estimate, gantt, page

HOSTILE = '</script><img src=x onerror=alert(1)>"\'&{0}{name}%s'


def shown(record):
  return Page(page.of(record))


def shares(found, said):
  """(class, share) of the parts of the bar that says so."""
  start = next(
    n
    for n, (_, attrs) in enumerate(found.tags)
    if attrs.get('aria-label', '').startswith(said)
  )
  parts = []
  for tag, attrs in found.tags[start + 1 :]:
    if tag != 'span':
      return parts
    share = float(re.search(r'--share:([\d.]+)', attrs['style'])[1])
    parts.append((attrs['class'], share))
  return parts


def test_the_page_says_what_it_is_of():
  found = shown(made_plans.record(price=98_304.0))
  assert 'PLAN of configs/made.py:big on 2xv5e-256' in found.text
  assert f'This is {estimate.HONEST}.' in found.text
  for told in (
    'Fits yes', 'MFU, estimated 12.3%', 'Tokens a second 4,194,304',
    'A step 2 s', 'Days 2.0', 'Chip-hours 24,576', 'Price 98,304',
    'Devices 512 of v5e, 2 slices', 'Mesh data 2 × fsdp 16 × fsdp_y 16',
    'Steps 86,400', 'jax 1, libtpu 2',
    'tpu_lm train \\ --config=configs/made.py:big \\ --config.mesh.fsdp=256',
  ):  # fmt: skip
    assert re.sub(r'\s+', ' ', told) in found.text, told
  assert 'Price' not in shown(made_plans.record()).text


def test_memory_is_two_bars_against_the_limit():
  found = shown(made_plans.record())
  assert shares(found, 'The analytic model') == [
    ('c-parameters', 1 / 16),
    ('c-optimizer', 2 / 16),
    ('c-batch', pytest.approx(0.25 / 16, abs=1e-5)),
    ('c-copies', 0.5 / 16),
    ('c-gradients', 0.5 / 16),
    ('c-activations', 3 / 16),
    ('c-loss', pytest.approx(2.75 / 16, abs=1e-5)),  # a layer takes turns
  ]
  assert shares(found, 'The compiler') == [
    ('c-compiled', pytest.approx(12.5 / 16, abs=1e-5))
  ]
  assert '10.00 GiB, 62.5% of what there is' in found.text
  assert '12.50 GiB, 78.1% of what there is; the model says 20.0% less' in (
    found.text
  )
  limits = [a['style'] for a in found.all('div', 'limited')]
  assert limits == ['--limit:1.00000'] * 2


def test_a_layer_that_is_larger_than_the_loss_is_in_the_bar():
  record = made_plans.record()
  record['memory'] |= {'layer': 3.0 * made_plans.GIB}
  kinds = [kind for kind, _ in shares(shown(record), 'The analytic model')]
  assert kinds[-2:] == ['c-activations', 'c-layer']


def test_time_is_a_bar_of_what_it_goes_to():
  found = shown(made_plans.record())
  assert shares(found, 'matrix products and kernels 500 ms') == [
    ('c-matmul', 0.25),
    ('c-memory', 0.15),
    ('c-interconnect', 0.6),
  ]
  assert '2 s a step, bound by waiting for collectives' in found.text
  record = made_plans.record(by={'matmul': 1, 'memory': 0, 'interconnect': 0.5})
  parts = shares(shown(record), 'matrix products and kernels 1 s')
  assert parts[-1] == ('c-rest', 0.25)


def test_collectives_are_told_by_kind():
  record = made_plans.record()
  record['collectives'][1]['bytes'] = 1.5e7
  text = shown(record).text
  assert 'all-gather over links 1,234 4 GB 75% 50 ms' in text
  assert 'all-reduce over slices 1 15 MB 0% 1 s' in text
  assert 'within loops, 75% are asynchronous' in text
  assert 'No collectives.' in shown(made_plans.record(collectives=[])).text


def test_a_pass_is_drawn_in_lanes():
  found = shown(made_plans.record())
  assert 'Layers, forward: 32 times a step' in found.text
  (drawing,) = found.all('svg')
  assert drawing['aria-label'] == (
    'One pass of 4 ms. core: matmul 100%. links: collective 50%.'
  )
  lanes = found.all('rect', 'lane')
  work = found.all('rect', 'work')
  assert len(lanes) == 2
  assert [one['class'] for one in work] == [
    'work c-matmul', 'work c-collective',
  ]  # fmt: skip
  whole = float(lanes[0]['width'])
  assert float(work[0]['width']) == pytest.approx(whole, abs=0.1)
  assert float(work[1]['width']) == pytest.approx(whole / 2, abs=0.1)
  start = float(work[1]['x']) - float(lanes[1]['x'])
  assert start == pytest.approx(whole / 4, abs=0.1)
  assert float(work[1]['y']) > float(work[0]['y'])
  assert 'all-gather of mlp: collective, 2 ms from 1 ms on' in found.text


def test_without_a_timeline_nothing_is_drawn():
  for record in (
    made_plans.record(timeline=[]),
    {k: v for k, v in made_plans.record().items() if k != 'timeline'},
  ):
    found = shown(record)
    assert not found.all('svg')
    assert 'One pass' not in found.text


def test_what_does_not_fit_is_shown_with_the_refusal():
  record = made_plans.record(fits=False)
  record['memory']['analytic'] = 32.0 * made_plans.GIB
  record['memory']['activations'] = 25.0 * made_plans.GIB
  found = shown(record)
  assert 'Fits no' in found.text
  assert 'The compiler refuses: total memory required (20G)' in found.text
  assert 'Where the time' not in found.text
  assert [a['style'] for a in found.all('div', 'limited')] == [
    '--limit:0.50000'  # half of what the model says
  ]
  total = sum(share for _, share in shares(found, 'The analytic model'))
  assert total == pytest.approx(1, abs=1e-4)


def test_other_programs_have_a_table():
  text = shown(made_plans.record(programs=made_plans.OTHERS)).text
  assert 'decode 12.5 ms 20,480 5.00 GiB 2.00 GiB 1.00 GiB traffic' in text
  assert 'prefill: too much' in text
  assert 'The other programs' not in shown(made_plans.record()).text


def test_nothing_of_a_record_becomes_part_of_the_page():
  record = made_plans.record(
    config=HOSTILE, overrides={HOSTILE: HOSTILE}, stage=HOSTILE,
    refusal=HOSTILE, versions=HOSTILE, topology=HOSTILE,
  )  # fmt: skip
  record['timeline'][0] |= {'name': HOSTILE, 'loop': HOSTILE, 'kind': HOSTILE}
  record['collectives'][0]['kind'] = HOSTILE
  record['programs'] = [{'program': HOSTILE, 'fits': False, 'refusal': HOSTILE}]
  found = shown(record)
  assert not found.all('img')
  assert len(found.all('script')) == 1
  assert HOSTILE in found.text
  assert {name for _, attrs in found.tags for name in attrs if name[:2] == 'on'
          } == set()  # fmt: skip


def test_the_page_needs_no_network():
  text = page.of(made_plans.record())
  links = re.findall(r'(?:href|src)="([^"]*)"', text)
  assert all(link.startswith(('#', 'data:')) for link in links)
  assert 'url(' not in text
  assert '@import' not in text
  assert "default-src 'none'" in text
  assert page.of(made_plans.record()) == text


@pytest.mark.parametrize(
  ('seconds', 'expected'),
  [(2.5, '2.5 s'), (0.0125, '12.5 ms'), (3e-6, '3 µs'), (0.0, '0 µs')],
)
def test_times_have_a_unit_that_fits(seconds, expected):
  assert gantt.spoken(seconds) == expected
