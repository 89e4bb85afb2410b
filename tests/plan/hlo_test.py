import made_plans
import pytest

from tpu_lm.plan import hlo


def one(line: str) -> hlo.Op:
  """The first instruction of the entry."""
  found = hlo.parse(
    f'HloModule m\n\nENTRY %e.1 (p: s32[]) -> s32[] {{\n{line}\n}}'
  )
  return found.computations['e.1'][0]


def test_the_entry_and_all_computations_are_found():
  others, entry = made_plans.loop(made_plans.product('product.1'))
  program = made_plans.program(entry, others)
  assert program.entry == 'main.1_spmd'
  assert list(program.computations) == [
    'wide.condition.1', 'wide.body.1', 'main.1_spmd',
  ]  # fmt: skip
  names = [op.name for op in program.computations['main.1_spmd']]
  assert names == ['x.1', 'w.1', 'own.1', 'zero.1', 'tuple.1', 'while.1']
  loop = program.find('main.1_spmd', 'while.1')
  assert loop.operands == ('tuple.1',)
  assert loop.called_as('body') == 'wide.body.1'
  assert loop.path.endswith('Transformer._scanned/while')
  assert program.find('wide.body.1', 'while.1') is None


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.parse('HloModule m\n%a (x: f32[]) -> f32[] {\n}\n')


def test_a_tuple_has_its_arrays_and_where_they_lie():
  op = one(
    '  ROOT %fusion.2 = (f32[]{:T(128)}, bf16[1,8192]{1,0:T(1,128)(2,1)S(1)}, '
    's4[6]{0:T(8,128)S(5)}, /*index=3*/pred[3]{0}) fusion(%a.1, '
    '/*index=1*/%b), kind=kLoop, calls=%fused.1'
  )
  assert [a.dtype for a in op.results] == ['f32', 'bf16', 's4', 'pred']
  assert [a.shape for a in op.results] == [(), (1, 8192), (6,), (3,)]
  assert [a.num_bytes for a in op.results] == [4, 16384, 3, 3]
  assert [a.is_near for a in op.results] == [False, True, True, False]
  assert op.num_bytes == 4 + 16384 + 3 + 3
  assert (op.name, op.kind) == ('fusion.2', 'fusion')
  assert op.operands == ('a.1', 'b')
  assert op.called == ('fused.1',)


def test_what_the_compiler_adds_is_read():
  op = one(
    '  %k.1 = f32[2]{0} custom-call(%a.1), custom_call_target='
    '"tpu_custom_call", metadata={op_name="jit(update)/splash/a"}, '
    'backend_config={"window_config":{"estimated_cycles":"2511"}}'
  )
  assert op.target == 'tpu_custom_call'
  assert op.path == 'jit(update)/splash/a'
  assert op.cycles == 2511
  plain = one('  %a.1 = f32[2]{0} add(%b, %c)')
  assert (plain.target, plain.path, plain.cycles) == ('', '', 0)


@pytest.mark.parametrize(
  ('groups', 'size'),
  [
    ('replica_groups={{0,4,8,12},{1,5,9,13}}', 4),
    ('replica_groups=[16,8]<=[128]', 8),
    ('replica_groups=[2,64]<=[64,2]T(1,0)', 64),
    ('source_target_pairs={{0,1},{1,0}}', 0),
  ],
)
def test_how_many_devices_take_part(groups, size):
  op = one(f'  %g.1 = f32[8]{{0}} all-gather(%a), channel_id=1, {groups}')
  assert op.group == size


def test_a_scan_runs_as_often_as_its_constant_says():
  others, entry = made_plans.loop(made_plans.product('product.1'), times=32)
  program = made_plans.program(entry, others)
  loop = program.find('main.1_spmd', 'while.1')
  assert hlo.trips(program, loop) == 32
  known = loop._replace(
    text=loop.text + ', backend_config={"known_trip_count":{"n":"7"}}'
  )
  assert hlo.trips(program, known) == 7


def test_a_loop_of_unknown_length_counts_once():
  others, entry = made_plans.loop(made_plans.product('product.1'), times=32)
  others = others.replace('direction=LT', 'direction=NE')
  program = made_plans.program(entry, others)
  assert hlo.trips(program, program.find('main.1_spmd', 'while.1')) == 1


def flops(left: str, right: str, product: str) -> float:
  program = made_plans.program(
    f'  %l.1 = {left} parameter(3)\n  %r.1 = {right} parameter(4)\n{product}'
  )
  op = program.computations[program.entry][-1]
  return hlo.flops(program, program.entry, op)


@pytest.mark.parametrize(
  ('left', 'right', 'out', 'labels', 'expected'),
  [
    # [T,D] x [D,F]
    (
      'bf16[64,32]',
      'bf16[32,48]',
      'bf16[64,48]',
      'bf_io->bf',
      2 * 64 * 32 * 48,
    ),
    # [T,D] x [V,D]
    ('bf16[64,32]', 'bf16[50,32]', 'f32[64,50]', 'bf_oi->bf', 2 * 64 * 32 * 50),
    # gradient of a weight: [T,V] x [T,D], over T
    ('bf16[64,50]', 'bf16[64,32]', 'f32[50,32]', 'fb_io->bf', 2 * 64 * 50 * 32),
    # the result lies the other way round
    (
      'bf16[64,32]',
      'bf16[32,48]',
      'bf16[48,64]',
      'bf_io->fb',
      2 * 64 * 32 * 48,
    ),
  ],
)
def test_products_are_spelled_as_convolutions(
  left, right, out, labels, expected
):
  line = f'  %c.1 = {out}{{1,0}} convolution(%l.1, %r.1), dim_labels={labels}'
  assert flops(left, right, line) == expected


def test_heads_as_a_window_that_mostly_misses():
  # [T,D] x [D,H,K] -> [T,H,K], H = 8: a window over a dimension of size one.
  line = (
    '  %c.1 = bf16[64,8,16]{2,0,1} convolution(%l.1, %r.1), window={size=8 '
    'pad=7_7 rhs_reversal=1}, dim_labels=bf0_i0o->b0f'
  )
  found = flops('bf16[64,32,1]', 'bf16[32,8,16]', line)
  assert found == 2 * 64 * 32 * 8 * 16


def test_heads_that_are_summed_over():
  # [T,H,K] x [H,K,D] -> [T,D], H = 8: a window over all of them.
  line = (
    '  %c.1 = bf16[64,32,1]{0,1,2} convolution(%l.1, %r.1), window={size=8}, '
    'dim_labels=b0f_0io->bf0'
  )
  found = flops('bf16[64,8,16]', 'bf16[8,16,32]', line)
  assert found == 2 * 64 * 8 * 16 * 32


def test_a_batch_as_a_window_over_a_dilated_dimension():
  # [E,T,D] x [E,D,F] -> [E,T,F], E = 8: each window finds its own only.
  line = (
    '  %c.1 = bf16[8,64,48]{2,1,0} convolution(%l.1, %r.1), window={size=8 '
    'stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf'
  )
  found = flops('bf16[8,64,32]', 'bf16[8,32,48]', line)
  assert found == 2 * 8 * 64 * 32 * 48


def test_a_dot_multiplies_what_it_contracts():
  line = (
    '  %c.1 = f32[4,16,24]{2,1,0} dot(%l.1, %r.1), lhs_batch_dims={0}, '
    'lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}'
  )
  assert flops('f32[4,16,32]', 'f32[4,32,24]', line) == 2 * 4 * 16 * 32 * 24


def test_a_fusion_holds_the_products_of_all_that_it_calls():
  others = f"""
%fused.1 (p.1: {made_plans.X}, p.2: {made_plans.W}) -> {made_plans.OUT} {{
  %p.1 = {made_plans.X} parameter(0)
  %p.2 = {made_plans.W} parameter(1)
  %c.1 = {made_plans.OUT} convolution(%p.1, %p.2), dim_labels=bf_io->bf
  ROOT %n.1 = {made_plans.OUT} negate(%c.1)
}}

%fused.2 (p.3: {made_plans.X}, p.4: {made_plans.W}) -> {made_plans.OUT} {{
  %p.3 = {made_plans.X} parameter(0)
  %p.4 = {made_plans.W} parameter(1)
  %f.1 = {made_plans.OUT} fusion(%p.3, %p.4), kind=kOutput, calls=%fused.1
  %c.2 = {made_plans.OUT} convolution(%p.3, %p.4), dim_labels=bf_io->bf
  ROOT %a.1 = {made_plans.OUT} add(%f.1, %c.2)
}}
"""
  line = f'  %f.2 = {made_plans.OUT} fusion(%x.1, %w.1), calls=%fused.2\n'
  program = made_plans.program(line, others)
  op = program.find(program.entry, 'f.2')
  found = hlo.flops(program, program.entry, op)
  assert found == 2 * made_plans.PRODUCT_FLOPS
  add = made_plans.program(f'  %a.2 = {made_plans.X} add(%x.1, %x.1)\n')
  assert hlo.flops(add, add.entry, add.find(add.entry, 'a.2')) == 0
