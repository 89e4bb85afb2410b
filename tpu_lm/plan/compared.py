"""The first steps of a run beside what was planned for these devices."""

from collections.abc import Callable
from typing import Any

import jax

from tpu_lm.plan import files

# JAX's name of a device: the chip of a plan.
_CHIPS = {
  'TPU v4': 'v4', 'TPU v5 lite': 'v5e', 'TPU v5': 'v5p', 'TPU v5p': 'v5p',
  'TPU v6 lite': 'v6e', 'NVIDIA H100 80GB HBM3': 'h100',
}  # fmt: skip


def expected(spec: str, devices: list[Any] | None = None) -> dict | None:
  """The record of `tpu_lm plan` for a configuration and the devices here.

  Args:
    spec: of the configuration, as `plan` was given it.
    devices: all of the run; by default JAX's.
  """
  devices = jax.devices() if devices is None else devices
  chip = _CHIPS.get(devices[0].device_kind)
  if chip is None:
    return None
  for record in files.read_all(files.beside(spec)):
    is_here = record['chip'] == chip and record['devices'] == len(devices)
    if is_here and record['fits']:
      return record
  return None


class Watch:
  """Notes once how the measured time of a step compares with the plan's.

  The first line of metrics holds steps that were compiled for; the second is
  compared.
  """

  def __init__(self, record: dict, note: Callable[[str], None]):
    self._record, self._note, self._lines = record, note, 0

  def __call__(self, line: dict[str, Any]) -> None:
    self._lines += 1
    if self._lines != 2:
      return
    planned, measured = self._record['seconds'], 1 / line['steps_per_second']
    self._note(
      f'plan for {self._record["topology"]}: {planned:.3f} s a step; measured '
      f'{measured:.3f} s, {measured / planned:.2f} times as long'
    )
