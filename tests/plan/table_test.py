import made_plans

from tpu_lm.plan import estimate, table


def columns(text: str, name: str) -> dict[str, str]:
  """The row of a topology by the heads, which are parted by two blanks."""
  heads, row = (
    next(line for line in text.splitlines() if line.startswith(start))
    for start in ('topology', name)
  )
  cells = [cell.strip() for cell in row.split('  ') if cell.strip()]
  names = [cell.strip() for cell in heads.split('  ') if cell.strip()]
  return dict(zip(names, cells, strict=True))


def test_a_line_says_what_one_asks():
  text = table.of_records([made_plans.record(price=98_304.0)])
  assert columns(text, '2xv5e-256') == {
    'topology': '2xv5e-256',
    'mesh': 'data=2 fsdp=16 fsdp_y=16',
    'fits': 'yes',
    'HBM GiB': '12.50',
    'of': '16.00',
    'model GiB': '10.00',
    'step s': '2.000',
    'matmul': '0.500',
    'memory': '0.300',
    'links': '1.200',
    'tokens/s': '4,194,304',
    'MFU': '12.3%',
    'hidden': '75%',
    'days': '2.0',
    'chip-hours': '24,576',
    'price': '98,304',
  }
  assert (
    'all-gather over links: 1,234 a step, 4.00 GB a device, 75% asynchronous'
    in text
  )
  assert 'bound by interconnect' in text
  assert 'activations 3.00, layer 0.50, loss 2.75' in text
  assert f'This is {estimate.HONEST}.' in text


def test_what_does_not_fit_says_why():
  text = table.of_records(
    [made_plans.record(fits=False, topology='v5e-8'), made_plans.record()]
  )
  row = columns(text, 'v5e-8')
  assert row['fits'] == 'NO'
  assert row['model GiB'] == '10.00'
  assert {row[name] for name in ('HBM GiB', 'step s', 'MFU', 'price')} == {'-'}
  assert 'v5e-8: total memory required (20G) exceeds (15.75G)' in text
  assert '2xv5e-256: total' not in text


def test_columns_stand_below_each_other():
  one = made_plans.record(topology='v5e-8')
  lines = table.of_records([one, made_plans.record()]).splitlines()[:3]
  at = lines[0].index('mesh')
  assert [line.index('data=2') for line in lines[1:]] == [at, at]
  ends = lines[0].index('tokens/s') + len('tokens/s')
  for line in lines[1:]:
    assert line.index('4,194,304') + len('4,194,304') == ends


def test_other_programs_are_told_of():
  text = table.of_records([made_plans.record(programs=made_plans.OTHERS)])
  assert (
    'decode: 12.5 ms, 20,480 tokens/s, 5.00 GiB (parameters 2.00, cache 1.00), '
    'bound by memory'
  ) in text
  assert 'prefill: does not fit: too much' in text


def test_a_search_gives_overrides_to_paste():
  found = [
    made_plans.record(overrides={'mesh.fsdp': n, 'microbatches': 1})
    for n in range(8)
  ]
  lines = table.of_search(found).splitlines()
  assert len(lines) == 1 + 5  # the best few
  assert lines[1].endswith('--config.mesh.fsdp=0 --config.microbatches=1')
  assert lines[1].split()[:4] == ['12.3%', '2.000', '12.50', '10.00']
