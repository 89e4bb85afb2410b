import made_plans
import pytest

from tpu_lm.plan import traffic

STACK = 'bf16[32,64,128]{2,1,0:T(8,128)(2,1)}'
LAYER = 'bf16[1,64,128]{2,1,0:T(8,128)(2,1)}'
NEAR = 'bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)}'
SIZE = 2 * 64 * 128  # of a layer
HEAD = f"""
  %stack.1 = {STACK} parameter(3)
  %layer.1 = {LAYER} parameter(4)
  %i.1 = s32[] constant(3)
"""


def moved(line: str, others: str = '') -> float:
  program = made_plans.program(f'{HEAD}  %op.1 = {line}\n', others)
  index = {op.name: op for op in program.computations[program.entry]}
  return traffic.of(program, index['op.1'], index)


def fused(*lines: str) -> str:
  """A fusion of a stack, a number and a layer."""
  body = '\n'.join(f'  {line}' for line in lines)
  return f"""
%fused.1 (p.0: {STACK}, p.1: s32[], p.2: {LAYER}) -> {STACK} {{
  %p.0 = {STACK} parameter(0)
  %p.1 = s32[] parameter(1)
  %p.2 = {LAYER} parameter(2)
{body}
}}
"""


CALL = 'fusion(%stack.1, %i.1, %layer.1), kind=kLoop, calls=%fused.1'
SLICE = f'%d.1 = {LAYER} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={{1}}'
UPDATE = f'%u.1 = {STACK} dynamic-update-slice(%p.0, %p.2, %p.1)'


@pytest.mark.parametrize(
  ('line', 'expected'),
  [
    (f'{LAYER} negate(%layer.1)', 2 * SIZE),
    (f'{NEAR} negate(%layer.1)', SIZE),
    (f'{LAYER} multiply(%layer.1, %layer.1)', 2 * SIZE),
    (f'{STACK} negate(%stack.1)', 2 * 32 * SIZE),
    (f'{LAYER} dynamic-slice(%stack.1, %i.1)', 2 * SIZE + 4),
    (f'{STACK} dynamic-update-slice(%stack.1, %layer.1, %i.1)', 2 * SIZE + 4),
    (f'{LAYER} gather(%stack.1, %i.1)', 2 * SIZE + 4),
  ],
)
def test_operands_are_read_and_results_written(line, expected):
  assert moved(line) == expected


def test_of_a_stack_only_the_layer_is_read():
  others = fused(SLICE, f'ROOT %a.1 = {LAYER} add(%d.1, %p.2)')
  assert moved(f'{LAYER} {CALL}', others) == 3 * SIZE + 4


def test_a_stack_by_another_name_is_the_same():
  others = fused(
    f'%b.1 = {STACK} bitcast(%p.0)',
    SLICE.replace('%p.0', '%b.1'),
    f'ROOT %a.1 = {LAYER} add(%d.1, %p.2)',
  )
  assert moved(f'{LAYER} {CALL}', others) == 3 * SIZE + 4


def test_of_a_stack_only_the_layer_is_written():
  assert moved(f'{STACK} {CALL}', fused(f'ROOT {UPDATE}')) == 2 * SIZE + 4


def test_a_written_layer_is_found_through_other_names_and_tuples():
  others = fused(
    UPDATE,
    f'%b.1 = {STACK} bitcast(%u.1)',
    f'%n.1 = {LAYER} negate(%p.2)',
    f'ROOT %t.1 = ({STACK}, {LAYER}) tuple(%b.1, %n.1)',
  )
  assert moved(f'({STACK}, {LAYER}) {CALL}', others) == 3 * SIZE + 4


def test_a_slice_within_a_nested_fusion_is_one():
  others = fused(SLICE.replace('%d.1', 'ROOT %d.1')).replace(
    'fused.1', 'deep.1'
  )
  others += fused(
    f'%f.1 = {LAYER} fusion(%p.0, %p.1, %p.2), kind=kLoop, calls=%deep.1',
    f'ROOT %n.1 = {LAYER} negate(%f.1)',
  )
  # The nested one does not touch the layer.
  assert moved(f'{LAYER} {CALL}', others) == 2 * SIZE + 4


def test_a_stack_that_is_also_read_whole_is_read_once():
  others = fused(
    SLICE,
    f'%n.1 = {STACK} negate(%p.0)',
    f'ROOT %t.1 = ({LAYER}, {STACK}) tuple(%d.1, %n.1)',
  )
  found = moved(f'({LAYER}, {STACK}) {CALL}', others)
  assert found == SIZE + 32 * SIZE + 32 * SIZE + 4
