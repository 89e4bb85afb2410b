import types

import numpy as np
import pytest

from tpu_lm import compiler, sharding
from tpu_lm.errors import UserError


def mesh(kind='TPU v5 lite', platform='tpu', count=4, axis='fsdp'):
  device = types.SimpleNamespace(device_kind=kind, platform=platform)
  shape = dict.fromkeys(sharding.AXES, 1) | {axis: count}
  return types.SimpleNamespace(devices=np.array([device] * count), shape=shape)


def test_options_are_for_tpus_only():
  for platform in ('cpu', 'gpu'):
    assert compiler.options('auto', mesh('any', platform)) == {}
    assert compiler.options('whole_einsums', mesh('any', platform)) == {}


@pytest.mark.parametrize(
  ('kind', 'groups'),
  [
    ('TPU v5 lite', ('whole_einsums', 'async_scatter')),
    ('TPU v6 lite', ('whole_einsums', 'wide_vmem', 'sparse_core')),
    ('TPU v5', ('whole_einsums', 'wide_vmem', 'sparse_core')),
  ],
)
def test_auto_chooses_by_the_chip(kind, groups):
  expected = {}
  for name in groups:
    expected |= compiler.GROUPS[name]
  assert compiler.options('auto', mesh(kind)) == expected
  assert compiler.options(', '.join(groups), mesh('TPU v4')) == expected


def test_a_device_alone_is_spared_what_is_for_collectives():
  usual = compiler.GROUPS['whole_einsums'] | compiler.GROUPS['wide_vmem']
  assert compiler.options('auto', mesh(count=1)) == usual
  asked = compiler.options('async_scatter', mesh(count=1))
  assert asked == compiler.GROUPS['async_scatter']


def test_what_is_for_scattered_gradients_needs_some():
  usual = compiler.GROUPS['whole_einsums'] | compiler.GROUPS['wide_vmem']
  assert compiler.options('auto', mesh(axis='sequence')) == usual
  whole = compiler.options('auto', mesh('TPU v5', axis='data'))
  assert whole.items() >= compiler.GROUPS['sparse_core'].items()


def test_none_are_given_where_none_are_named():
  assert compiler.options('', mesh()) == {}


def test_an_unknown_group_is_named_with_the_nearest():
  with pytest.raises(
    UserError, match=r"compiler='whole_einsum,x': whole_einsum is unknown"
  ) as caught:
    compiler.options('whole_einsum,x', mesh())
  assert "'whole_einsums'?" in str(caught.value)
  assert all(name in str(caught.value) for name in compiler.GROUPS)
