"""The records of a plan as plain text."""

from typing import Any

from tpu_lm.plan import memory

_GIB = 2**30


def of_records(records: list[dict[str, Any]]) -> str:
  """One table, a line a topology, and what is behind its columns."""
  rows = [
    (
      'topology', 'mesh', 'fits', 'HBM GiB', 'of', 'model GiB', 'step s',
      'matmul', 'memory', 'links', 'tokens/s', 'MFU', 'hidden', 'days',
      'chip-hours', 'price',
    )
  ]  # fmt: skip
  rows += [_row(record) for record in records]
  lines = [_aligned(rows, 2), *_refusals(records), '', *_notes(records)]
  return '\n'.join(lines)


def _row(record: dict[str, Any]) -> tuple[str, ...]:
  held = record['memory']
  head = (
    record['topology'],
    _mesh(record['mesh']),
    'yes' if record['fits'] else 'NO',
    f'{held["compiled"] / _GIB:.2f}' if record['fits'] else '-',
    f'{held["limit"] / _GIB:.2f}',
    f'{held["analytic"] / _GIB:.2f}',
  )
  if not record['fits']:
    return (*head, *('-',) * 10)
  by = record['by']
  return (
    *head,
    f'{record["seconds"]:.3f}',
    *(f'{by[name]:.3f}' for name in ('matmul', 'memory', 'interconnect')),
    f'{record["tokens_per_second"]:,.0f}',
    f'{record["mfu"]:.1%}',
    f'{record["overlapped"]:.0%}',
    f'{record["days"]:,.1f}',
    _amount(record['chip_hours']),
    _amount(record['price']) if 'price' in record else '-',
  )


def _amount(value: float) -> str:
  return f'{value:,.0f}' if value >= 100 else f'{value:.2f}'


def _mesh(mesh: dict[str, int]) -> str:
  return ' '.join(f'{axis}={size}' for axis, size in mesh.items()) or '1'


def _aligned(rows: list[tuple[str, ...]], num_left: int) -> str:
  """Columns, the first so many of them to the left."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    '  '.join(
      cell.ljust(width) if n < num_left else cell.rjust(width)
      for n, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  )


def _refusals(records: list[dict[str, Any]]) -> list[str]:
  return [f'{r["topology"]}: {r["refusal"]}' for r in records if r['refusal']]


def _notes(records: list[dict[str, Any]]) -> list[str]:
  """What fills the memory, the collectives, other programs; then the words."""
  lines = []
  for record in records:
    bars = record['memory']
    parts = [f'{name} {bars[name] / _GIB:.2f}' for name in memory.NAMES]
    lines.append(f'{record["topology"]}: GiB by the model: {", ".join(parts)}')
    for one in record.get('collectives', ()):
      share = one['overlapped_bytes'] / one['bytes'] if one['bytes'] else 0
      lines.append(
        f'  {one["kind"]} over {one["over"]}: {one["count"]:,} a step, '
        f'{one["bytes"] / 1e9:.2f} GB a device, {share:.0%} asynchronous'
      )
    if record['fits']:
      lines.append(f'  bound by {record["bound"]}')
    lines += [f'  {_other(other)}' for other in record.get('programs', ())]
  lines += [
    '',
    'step s: estimated; matmul, memory: seconds bound by either; links: waited',
    'for collectives; hidden: share of the bytes of collectives within loops',
    'that is asynchronous; model GiB: the analytic model of memory.',
    *sorted({f'This is {record["note"]}.' for record in records}),
  ]
  return lines


def _other(record: dict[str, Any]) -> str:
  if not record['fits']:
    return f'{record["program"]}: does not fit: {record["refusal"]}'
  filled = ', '.join(
    f'{name} {record[name] / _GIB:.2f}'
    for name in ('parameters', 'cache')
    if name in record
  )
  return (
    f'{record["program"]}: {record["seconds"] * 1e3:,.1f} ms, '
    f'{record["tokens_per_second"]:,.0f} tokens/s, '
    f'{record["compiled"] / _GIB:.2f} GiB ({filled}), bound by '
    f'{record["bound"]}'
  )


def of_search(records: list[dict[str, Any]]) -> str:
  """The best few configurations, with the overrides to paste."""
  rows = [('MFU', 'step s', 'HBM GiB', 'model GiB', 'overrides')]
  for record in records[:5]:
    given = ' '.join(
      f'--config.{key}={value}' for key, value in record['overrides'].items()
    )
    held = record['memory']
    rows.append(
      (
        f'{record["mfu"]:.1%}',
        f'{record["seconds"]:.3f}',
        f'{held["compiled"] / _GIB:.2f}',
        f'{held["analytic"] / _GIB:.2f}',
        given,
      )
    )
  return _aligned(rows, len(rows[0]))
