import types

import pytest

from tpu_lm import compiler
from tpu_lm.errors import UserError


def device(kind='TPU v5 lite', platform='tpu'):
  return types.SimpleNamespace(device_kind=kind, platform=platform)


def test_options_are_for_tpus_only():
  for platform in ('cpu', 'gpu'):
    assert compiler.options('auto', device('any', platform)) == {}
    assert compiler.options('whole_einsums', device('any', platform)) == {}


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
  assert compiler.options('auto', device(kind)) == expected
  assert compiler.options(', '.join(groups), device('TPU v4')) == expected


def test_none_are_given_where_none_are_named():
  assert compiler.options('', device()) == {}


def test_an_unknown_group_is_named_with_the_nearest():
  with pytest.raises(
    UserError, match=r"compiler='whole_einsum,x': whole_einsum is unknown"
  ) as caught:
    compiler.options('whole_einsum,x', device())
  assert "'whole_einsums'?" in str(caught.value)
  assert all(name in str(caught.value) for name in compiler.GROUPS)
