"""`tpu_lm plan`: compiles a run for devices that are not here, and reports.

The records are kept beside the configuration, in NAME.plan/: a JSON file and a
page a topology, with which `train` compares its first steps.
"""

import pathlib
from typing import Any

from tpu_lm import config as configs
from tpu_lm import workdir as workdirs
from tpu_lm.errors import UserError
from tpu_lm.plan import (
  chips,
  estimate,
  files,
  page,
  programs,
  search,
  stages,
  table,
  topology,
)


def plan(
  spec: str,
  overrides: list[tuple[str, str]],
  names: list[str],
  *,
  to: pathlib.Path | None = None,
  price: float = 0.0,
  tries: int = 0,
) -> bool:
  """Plans a configuration for each topology; prints and writes the records.

  Args:
    spec: of the configuration, FILE[:VARIANT].
    overrides: of its keys.
    names: of topologies (chips.find).
    to: the folder of the records; None: beside the configuration.
    price: of a chip for an hour, in any currency; 0: not known.
    tries: how many compilations to search with; 0: only the configuration.

  Returns:
    Whether everything fits.

  Raises:
    UserError: an unknown topology, no compiler, or a mesh that cannot be.
  """
  config = configs.load(spec, overrides)
  wanted = [chips.find(name) for name in names]
  folder = to or files.beside(spec)
  workdirs.check('--to', folder)
  made = [(one, topology.devices(one)) for one in wanted]
  if not tries:  # what cannot be is said before minutes are spent
    for _, devices in made:
      programs.assemble(config, devices)
  records = []
  for one, devices in made:
    print(f'{one.name}: compiling for {one.size} devices …', flush=True)
    if tries:
      found = search.search(config, one, devices, tries, print)
      print(table.of_search(found))
      record = found[0] if found else None
      if record is None:
        raise UserError(
          f'--topology={one.name}: nothing was found that fits; take more '
          'chips, or a smaller batch_size or data.length'
        )
    else:
      record = estimate.update(config, one, devices)
    chosen = record.get('overrides', {})
    record |= {'config': spec, 'versions': programs.version()}
    record['overrides'] = chosen | dict(overrides)
    if price and record['fits']:
      record['price'] = price * record['chip_hours']
    best = search.varied(config, chosen)
    record['programs'] = stages.others(best, one, devices)
    write(record, folder)
    records.append(record)
  print(table.of_records(records))
  print(f'kept in {folder}')
  return all(record['fits'] for record in records)


def write(record: dict[str, Any], folder: pathlib.Path) -> None:
  """Writes a record and its page."""
  folder.mkdir(parents=True, exist_ok=True)
  path = files.path_of(folder, record['topology'])
  workdirs.write_json(path, record)
  path.with_suffix('.html').write_text(page.of(record))
