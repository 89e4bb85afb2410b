import made_plans
import pytest
from made_plans import (
  OUT,
  OWN,
  PRODUCT_BYTES,
  PRODUCT_FLOPS,
  ROW,
  WHOLE,
  WHOLE_BYTES,
  done,
  gather,
  loop,
  product,
  started,
)

from tpu_lm.plan import chips, schedule

POD = chips.find('v5e-256')  # 16x16, closed to rings
SMALL = chips.find('v5e:4x4')  # lines
TWO = chips.find('2xv5e-256')
V5E = chips.CHIPS['v5e']
PRODUCT = PRODUCT_FLOPS / V5E.flops
# 15/16 of a weight arrive, over both neighbours of a ring.
GATHER = WHOLE_BYTES * 15 / 16 / (2 * V5E.link)


def cost(entry: str, others='', topology=POD, held=1.0) -> schedule.Cost:
  return schedule.cost(made_plans.program(entry, others), topology, held)


def only(entry: str, topology=POD) -> schedule.Collective:
  (found,) = cost(entry, topology=topology).collectives
  return found


# Products and memory.


def test_a_product_takes_its_flops_at_the_peak():
  found = cost(product('a.1'))
  assert PRODUCT_BYTES / V5E.bandwidth < PRODUCT
  assert found.seconds == pytest.approx(PRODUCT)
  assert (found.matmul, found.memory, found.exposed) == (found.seconds, 0, 0)
  assert found.flops == PRODUCT_FLOPS


def test_a_narrow_product_takes_its_traffic_and_is_bound_by_it():
  narrow = (
    '  %v.1 = bf16[1,4096]{1,0} parameter(3)\n'
    '  %a.1 = bf16[1,14336]{1,0} convolution(%v.1, %w.1), '
    'dim_labels=bf_io->bf\n'
  )
  found = cost(narrow)
  moved = 2 * (4096 + 14336 + 4096 * 14336)
  assert found.seconds == pytest.approx(moved / V5E.bandwidth)
  assert (found.matmul, found.memory) == (0, found.seconds)
  assert found.flops == 2 * 4096 * 14336


def test_products_of_eight_bits_take_half_as_long():
  lines = (
    '  %a.1 = s8[8192,4096]{1,0} parameter(3)\n'
    '  %b.1 = s8[4096,14336]{1,0} parameter(4)\n'
    '  %m.1 = s32[8192,14336]{1,0} dot(%a.1, %b.1), '
    'lhs_contracting_dims={1}, rhs_contracting_dims={0}\n'
  )
  found = cost(lines)
  assert found.flops == 2 * 8192 * 4096 * 14336
  assert found.matmul == pytest.approx(found.flops / (2 * V5E.flops))
  v4 = cost(lines, topology=chips.find('v4-8'))
  assert v4.matmul == pytest.approx(found.flops / chips.CHIPS['v4'].flops)


def test_what_is_near_costs_no_traffic():
  near = made_plans.X.replace('(2,1)}', '(2,1)S(1)}')
  found = cost(f'  %n.1 = {near} negate(%x.1)\n  %m.1 = {near} negate(%n.1)\n')
  assert found.seconds == pytest.approx(2 * 8192 * 4096 / V5E.bandwidth)


def test_the_compilers_cycles_are_taken_where_they_are_right():
  line = f'  %n.1 = {made_plans.X} negate(%x.1), "estimated_cycles":"3000000"\n'
  assert cost(line).seconds == pytest.approx(3e6 / 1.5e9)
  v5p = cost(line, topology=chips.find('v5p-128'))
  moved = 2 * 2 * 8192 * 4096 / chips.CHIPS['v5p'].bandwidth
  assert v5p.seconds == pytest.approx(moved)


def test_attention_kernels_count_half_a_square():
  heads, parts = (f'bf16[{n}32,1024,128]{{2,1,0}}' for n in ('', '4,'))
  a_product = 2 * 32 * 1024 * 1024 * 128 / 2
  for name, result, products in (
    ('fwd', heads, 2), ('dkv', f'({parts}, {heads})', 5),
    ('dkv', f'({heads}, {heads})', 4), ('dq', heads, 3),
  ):  # fmt: skip
    lines = (
      f'  %q.1 = {heads} parameter(3)\n'
      f'  %splash_mha_{name}_segmented.1 = {result} custom-call(%q.1), '
      'custom_call_target="tpu_custom_call"\n'
    )
    assert cost(lines).flops == products * a_product


def test_experts_multiply_the_rows_that_are_theirs():
  rows, made = 'bf16[512,256]{1,0}', 'bf16[512,1024]{1,0}'
  called = 'custom_call_target="tpu_custom_call"\n'
  lines = (
    f'  %r.1 = {rows} parameter(3)\n'
    '  %w.1 = bf16[8,256,1024]{2,1,0} parameter(4)\n'
    '  %s.1 = s32[9]{0} parameter(5)\n'
    f'  %gmm.1 = {made} custom-call(%s.1, %r.1, %w.1), {called}'
    '  %tgmm.1 = bf16[8,256,1024]{2,1,0} custom-call'
    f'(%s.1, %r.1, %gmm.1), {called}'
  )
  assert cost(lines).flops == 2 * 2 * 512 * 256 * 1024
  assert cost(lines, held=1 / 4).flops == 2 * 2 * 512 * 256 * 1024 / 4


def test_buffers_and_other_names_are_free():
  lines = (
    f'  %b.1 = {made_plans.X} bitcast(%x.1)\n'
    f'  %c.1 = {OUT} custom-call(), custom_call_target="AllocateBuffer"\n'
    '  %t.1 = (s32[]) tuple(%b.1)\n'
  )
  assert cost(lines).seconds == 0


def test_copies_that_run_beside_cost_what_is_left_of_them():
  near = OUT.replace('(2,1)}', '(2,1)S(1)}')
  copy = f'  %c.1 = ({near}, {OUT}, u32[]{{:S(2)}}) copy-start(%y.1)\n'
  alone = cost(f'  %y.1 = {OUT} parameter(3)\n{copy}')
  size = 2 * 8192 * 14336
  assert alone.seconds == pytest.approx(size / V5E.bandwidth)
  beside = cost(product('y.1') + copy)
  assert beside.seconds == pytest.approx(PRODUCT)


# Collectives: bytes, and how fast.


def test_a_gather_along_a_ring_comes_from_both_sides():
  found = only(gather('g.1'))
  assert (found.kind, found.group) == ('all-gather', 16)
  assert found.num_bytes == WHOLE_BYTES * 15 / 16
  assert found.seconds == pytest.approx(GATHER)
  assert not found.is_async
  assert not found.crosses_slices
  assert not found.in_loop
  spent = cost(gather('g.1'))
  assert spent.exposed == spent.seconds == pytest.approx(GATHER)


@pytest.mark.parametrize(
  ('groups', 'topology', 'share', 'speed'),
  [
    # along the second side: the same
    ('[16,16]<=[16,16]T(1,0)', POD, 15 / 16, 2 * V5E.link),
    # over the whole torus: two rings
    ('[1,256]<=[256]', POD, 255 / 256, 4 * V5E.link),
    # four in a row of sixteen make no ring
    ('{{0,1,2,3},{4,5,6,7}}', POD, 3 / 4, V5E.link),
    # a small slice is not closed to rings
    ('{{0,1,2,3},{4,5,6,7}}', SMALL, 3 / 4, V5E.link),
    ('[1,16]<=[16]', SMALL, 15 / 16, 2 * V5E.link),
    # devices of both slices
    ('{{0,256},{1,257}}', TWO, 1 / 2, V5E.slices),
  ],
)
def test_speed_is_that_of_the_links_between_them(
  groups, topology, share, speed
):
  found = only(gather('g.1', groups), topology)
  assert found.num_bytes == pytest.approx(WHOLE_BYTES * share)
  assert found.seconds == pytest.approx(WHOLE_BYTES * share / speed)
  assert found.crosses_slices == (topology is TWO)


def test_a_torus_of_v5p_is_closed_from_four_on():
  v5p = chips.find('v5p-128')  # 4x4x4
  found = only(gather('g.1', '{{0,1,2,3}}'), v5p)
  assert found.seconds == pytest.approx(
    WHOLE_BYTES * 3 / 4 / (2 * v5p.chip.link)
  )


def collective(kind: str, out: str, more: str = '') -> str:
  return (
    f'  %c.1 = {out} {kind}(%x.1), channel_id=1, replica_groups={{{ROW}}}'
    f'{more}\n'
  )


def test_a_sum_arrives_twice_and_a_scattered_one_once():
  size = 2 * 8192 * 4096
  found = only(collective('all-reduce', made_plans.X))
  assert found.num_bytes == size * 2 * 15 / 16
  scattered = 'bf16[512,4096]{1,0:T(8,128)(2,1)}'
  found = only(collective('reduce-scatter', scattered, ', dimensions={0}'))
  assert (found.kind, found.num_bytes) == ('reduce-scatter', size * 15 / 16)


def test_an_exchange_waits_for_the_middle_of_the_ring():
  found = only(collective('all-to-all', made_plans.X, ', dimensions={0}'))
  size = 2 * 8192 * 4096 * 15 / 16
  assert found.num_bytes == size
  assert found.seconds == pytest.approx(2 * size / (2 * V5E.link))


def test_a_permutation_sends_everything_to_a_neighbour():
  line = (
    f'  %c.1 = {made_plans.X} collective-permute(%x.1), channel_id=1, '
    'source_target_pairs={{0,1},{1,2},{2,0}}\n'
  )
  found = only(line)
  assert found.num_bytes == 2 * 8192 * 4096
  assert found.seconds == pytest.approx(found.num_bytes / V5E.link)


def test_a_sum_that_is_sliced_at_once_is_a_scattered_one():
  padded = 'bf16[2240,4096]{1,0:T(8,128)(2,1)}'
  others = f"""
%add.1 (a.9: bf16[], b.9: bf16[]) -> bf16[] {{
  %a.9 = bf16[] parameter(0)
  ROOT %s.9 = bf16[] add(%a.9, %a.9)
}}

%all-reduce-scatter.3 (input.1: bf16[2048,4096]) -> bf16[140,4096] {{
  %input.1 = bf16[2048,4096]{{1,0:T(8,128)(2,1)}} parameter(0)
  %constant.1 = bf16[] constant(0)
  %pad.1 = {padded} pad(%input.1, %constant.1), padding=0_192x0_0
  %all-reduce.31 = {padded} all-reduce(%pad.1), channel_id=29, replica_groups={{{ROW}}}, to_apply=%add.1
  %i.1 = u32[] constant(0)
  ROOT %dynamic-slice.7 = bf16[140,4096]{{1,0:T(8,128)(2,1)S(1)}} dynamic-slice(%all-reduce.31, %i.1, %i.1), dynamic_slice_sizes={{140,4096}}
}}
"""  # noqa: E501
  line = (
    '  %half.1 = bf16[2048,4096]{1,0} parameter(3)\n'
    '  %f.1 = bf16[140,4096]{1,0:T(8,128)(2,1)S(1)} fusion(%half.1), '
    'kind=kCustom, calls=%all-reduce-scatter.3\n'
  )
  spent = cost(line, others)
  (found,) = spent.collectives
  size = 2 * 2240 * 4096 * 15 / 16
  assert (found.kind, found.num_bytes) == ('reduce-scatter', size)
  assert not found.is_async
  assert spent.seconds == spent.exposed == pytest.approx(size / 2 / V5E.link)


# What runs beside what.


def test_a_gather_behind_a_product_is_not_waited_for():
  found = cost(started('g.1') + product('a.1') + done('g.1'))
  assert GATHER < PRODUCT
  assert found.seconds == pytest.approx(PRODUCT)
  assert found.exposed == 0
  assert found.collectives[0].is_async
  assert found.collectives[0].seconds == pytest.approx(GATHER)


def test_what_is_left_of_a_gather_is_waited_for():
  slow = '{{0,1,2,3}}'  # a line: its own speed is half
  entry = (
    ''.join(started(f'g.{n}', slow) for n in range(1, 13))
    + product('a.1')
    + ''.join(done(f'g.{n}') for n in range(1, 13))
  )
  found = cost(entry)
  # The links carry one after the other.
  one = WHOLE_BYTES * 3 / 4 / V5E.link
  assert found.seconds == pytest.approx(12 * one)
  assert found.exposed == pytest.approx(12 * one - PRODUCT)
  assert found.matmul == pytest.approx(PRODUCT)


def test_a_gather_waits_for_the_one_that_is_on_the_links():
  found = cost(started('g.1') + gather('g.2') + done('g.1'))
  assert found.seconds == found.exposed == pytest.approx(2 * GATHER)


def test_slices_are_joined_by_other_links():
  across = started('g.1', '{{0,256},{1,257}}')
  found = cost(across + gather('g.2') + done('g.1'), topology=TWO)
  slow = WHOLE_BYTES / 2 / V5E.slices
  assert slow > GATHER
  assert found.seconds == pytest.approx(slow)  # not their sum
  assert [one.crosses_slices for one in found.collectives] == [True, False]


def exchanged(between: str) -> str:
  """What hosts carry between slices, as XLA's TPU compiler spells it."""
  about = (
    'channel_id=2, is_host_transfer=true, frontend_attributes={'
    '_xla_host_transfer_rendezvous="psum.1_0",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}'
  )
  kind = f'({OWN}, u32[], token[])'
  return f"""  %after-all.1 = token[] after-all()
  %send.1 = {kind} send(%own.1, %after-all.1), {about}
  %recv.1 = {kind} recv(%after-all.1), {about}
{between}  %send-done.1 = token[] send-done(%send.1), channel_id=2
  %recv-done.1 = ({OWN}, token[]) recv-done(%recv.1), channel_id=2
"""


def test_what_hosts_carry_between_slices_is_waited_for():
  (alone,) = cost(exchanged(''), topology=TWO).collectives
  assert (alone.kind, alone.group) == ('all-reduce', 2)
  assert alone.crosses_slices
  assert alone.is_async
  assert alone.num_bytes == WHOLE_BYTES / 16  # a shard of 16, once there, back
  slow = alone.num_bytes / V5E.slices
  beside = cost(exchanged(product('a.1')), topology=TWO)
  assert beside.seconds == pytest.approx(max(slow, PRODUCT))
  assert beside.exposed == pytest.approx(max(slow - PRODUCT, 0))
  after = cost(exchanged('') + product('a.1'), topology=TWO)
  assert after.seconds == pytest.approx(slow + PRODUCT)


def fused(groups: str = f'{{{ROW}}}') -> tuple[str, str]:
  """(computations, entry): a gather that goes on within a product's fusion."""
  state = f'({OWN}, {WHOLE}, s32[2]{{0:S(4)}}, u32[]{{:S(2)}})'
  groups = f'channel_id=1, replica_groups={groups}, dimensions={{0}}'
  others = f"""
%fused_computation.1 (param_0.1: bf16[256,4096]) -> (bf16[256,4096]) {{
  %param_0.1 = {OWN} parameter(0)
  %all-gather.1 = {WHOLE} all-gather(%param_0.1), {groups}
  ROOT %custom-call.1 = {state} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.1 (param_0.2: bf16[256,4096]) -> (bf16[256,4096]) {{
  %param_0.2 = {OWN} parameter(0)
  %param_1.2 = {WHOLE} parameter(1)
  %param_2.2 = s32[2]{{0:S(4)}} parameter(2)
  %param_3.2 = u32[]{{:S(2)}} parameter(3)
  %param_4.2 = {made_plans.X} parameter(4)
  %param_5.2 = {made_plans.W} parameter(5)
  %convolution.2 = {OUT} convolution(%param_4.2, %param_5.2), dim_labels=bf_io->bf
  %all-gather.2 = {WHOLE} all-gather(%param_0.2), {groups}
  ROOT %tuple.2 = ({OUT}, {OWN}, {WHOLE}, s32[2]{{0:S(4)}}, u32[]{{:S(2)}}) tuple(%convolution.2, %param_0.2, %all-gather.2, %param_2.2, %param_3.2)
}}

%fused_computation.3 (param_0.3: bf16[256,4096]) -> bf16[4096,4096] {{
  %param_0.3 = {OWN} parameter(0)
  %param_1.3 = {WHOLE} parameter(1)
  %param_2.3 = s32[2]{{0:S(4)}} parameter(2)
  %param_3.3 = u32[]{{:S(2)}} parameter(3)
  %all-gather.3 = {WHOLE} all-gather(%param_0.3), {groups}
  ROOT %custom-call.3 = {WHOLE} custom-call(%param_0.3, %param_1.3, %all-gather.3, %param_2.3, %param_3.3), custom_call_target="AsyncCollectiveDone"
}}
"""  # noqa: E501
  types = (OWN, WHOLE, 's32[2]{0:S(4)}', 'u32[]{:S(2)}')
  parts = [
    f'  %s.{n} = {kind} get-tuple-element(%async-collective-start.1), index={n}'
    for n, kind in enumerate(types)
  ]
  later = [
    f'  %t.{n} = {kind} get-tuple-element(%fusion.2), index={n + 1}'
    for n, kind in enumerate(types)
  ]
  entry = '\n'.join(
    [
      f'  %async-collective-start.1 = {state} fusion(%own.1), kind=kCustom, '
      'output_to_operand_aliasing={{0}: (0, {})}, calls=%fused_computation.1',
      *parts,
      f'  %fusion.2 = ({OUT}, {OWN}, {WHOLE}, s32[2]{{0:S(4)}}, '
      'u32[]{:S(2)}) fusion(%s.0, %s.1, %s.2, %s.3, %x.1, /*index=5*/%w.1), '
      'kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), '
      '{3}: (2, {}), {4}: (3, {})}, calls=%async_collective_fusion.1',
      *later,
      f'  %async-collective-done.1 = {WHOLE} fusion(%t.0, %t.1, %t.2, %t.3), '
      'kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, '
      'calls=%fused_computation.3',
    ]
  )
  return others, entry + '\n'


def test_a_gather_within_fusions_runs_beside_their_products():
  others, entry = fused()
  found = cost(entry, others)
  assert [one.kind for one in found.collectives] == ['all-gather']
  assert found.collectives[0].is_async
  assert found.seconds == pytest.approx(PRODUCT)  # to begin and end is free
  assert (found.memory, found.exposed) == (0, 0)
  assert found.flops == PRODUCT_FLOPS


def test_its_end_is_found_through_the_fusions_between():
  others, entry = fused('{{0,256},{1,257}}')  # slow: between slices
  found = cost(entry, others, TWO)
  slow = WHOLE_BYTES / 2 / V5E.slices
  assert found.seconds == pytest.approx(slow)
  assert found.exposed == pytest.approx(slow - PRODUCT)


def test_buffers_on_their_way_through_a_product_are_no_traffic():
  others, entry = fused()
  others = others.replace(
    f'{OUT} convolution(%param_4.2, %param_5.2), dim_labels=bf_io->bf',
    f'{OUT} broadcast(%param_4.2)',
  )
  found = cost(entry, others)
  size = 2 * (8192 * 4096 + 8192 * 14336)  # of what is read, and the result
  assert found.memory == found.seconds == pytest.approx(size / V5E.bandwidth)


# Loops and branches.


def test_a_loop_costs_its_body_as_often_as_it_runs():
  body = gather('g.1') + started('g.2') + product('a.1') + done('g.2')
  others, entry = loop(body, times=32)
  found = cost(entry + gather('g.9'), others)
  assert found.flops == 32 * PRODUCT_FLOPS
  assert found.matmul == pytest.approx(32 * PRODUCT)
  assert found.exposed == pytest.approx(33 * GATHER)
  assert found.seconds == pytest.approx(32 * PRODUCT + 33 * GATHER)
  told = [(one.times, one.in_loop, one.is_async) for one in found.collectives]
  assert told == [(32, True, False), (32, True, True), (1, False, False)]


def test_of_branches_the_longest_counts():
  others = '\n'.join(
    f'%{name}.1 (p: {made_plans.X}) -> {OUT} {{\n'
    f'  %x.1 = {made_plans.X} parameter(0)\n'
    f'  %w.1 = {made_plans.W} parameter(1)\n'
    f'  %y.1 = {OUT} parameter(2)\n{lines}}}\n'
    for name, lines in (
      ('skipped', f'  ROOT %b.1 = {OUT} bitcast(%y.1)\n'),
      ('taken', product('a.1') + product('b.1')),
    )
  )
  line = (
    f'  %c.1 = {OUT} conditional(%i.1, %x.1, %x.1), '
    'branch_computations={%skipped.1, %taken.1}\n'
  )
  assert cost(line, others).flops == 2 * PRODUCT_FLOPS
