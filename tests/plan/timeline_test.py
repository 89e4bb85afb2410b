import made_plans
import pytest
from made_plans import (
  PRODUCT_FLOPS,
  WHOLE_BYTES,
  done,
  gather,
  product,
  started,
)

from tpu_lm.plan import chips, timeline

POD = chips.find('v5e-256')
PRODUCT = PRODUCT_FLOPS / POD.chip.flops
GATHER = WHOLE_BYTES * 15 / 16 / (2 * POD.chip.link)


def shown(body: str, entry: str = '', topology=POD):
  others, loop = made_plans.loop(body, times=32)
  return timeline.timeline(made_plans.program(entry + loop, others), topology)


def test_a_pass_has_its_spans_in_their_lanes():
  body = started('g.1') + product('a.1') + done('g.1') + gather('g.2')
  core, first, second = shown(body)
  assert core == {
    'loop': 'Layers, forward',
    'times': 32,
    'name': 'mlp/a.1',
    'kind': 'matmul',
    'lane': 'core',
    'start': 0.0,
    'seconds': pytest.approx(PRODUCT),
  }
  for span, start in ((first, 0.0), (second, PRODUCT)):
    assert (span['lane'], span['kind']) == ('links', 'collective')
    assert span['start'] == pytest.approx(start)
    assert span['seconds'] == pytest.approx(GATHER)
  assert first['name'] == 'all-gather of g.1'


def test_slices_and_kernels_are_told_apart():
  kernel = (
    f'  %k.1 = {made_plans.X} custom-call(%x.1), '
    'custom_call_target="tpu_custom_call"\n'
  )
  body = kernel + gather('g.1', '{{0,256},{1,257}}')
  found = shown(body, topology=chips.find('2xv5e-256'))
  assert [(one['lane'], one['kind']) for one in found] == [
    ('core', 'kernel'),
    ('slices', 'collective'),
  ]


def test_a_loop_that_hardly_counts_is_left_out():
  outside = ''.join(product(f'b.{n}') for n in range(200))
  body = f'  %n.1 = {made_plans.OWN} negate(%own.1)\n'
  assert shown(body)
  assert shown(body, outside) == []


def test_short_neighbours_of_a_kind_are_one():
  small = ''.join(
    f'  %n.{n} = {made_plans.OWN} negate(%own.1)\n' for n in range(9)
  )
  found = shown(product('a.1') + small + product('b.1'))
  a_small = 2 * 2 * 256 * 4096 / POD.chip.bandwidth
  kinds = ['matmul', 'memory', 'matmul']
  assert [one['kind'] for one in found] == kinds
  took = [one['seconds'] for one in found]
  assert took == pytest.approx([PRODUCT, 9 * a_small, PRODUCT])


def test_a_loop_within_a_loop_is_a_span_and_has_its_own():
  inner, entry = made_plans.loop(product('a.1'), times=3)
  names = ('wide.condition.1', 'wide.body.1')
  for name in names:
    inner = inner.replace(name, f'inner.{name}')
    entry = entry.replace(name, f'inner.{name}')
  body = entry.replace('while.1', 'while.2').replace('_scanned/', 'x/')
  others, outer = made_plans.loop(body.replace('tuple.1', 'tuple.7'), 5, inner)
  program = made_plans.program(outer, others)
  found = timeline.timeline(program, POD)
  told = [(one['loop'], one['times'], one['kind']) for one in found]
  assert told == [
    ('Layers, forward', 5, 'loop'),
    ('Outside layers, forward', 15, 'matmul'),
  ]
  assert found[0]['seconds'] == pytest.approx(3 * PRODUCT)
