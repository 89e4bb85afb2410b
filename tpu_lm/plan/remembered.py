"""Programs that were compiled before: to plan again takes seconds, not minutes.

Kept in the folder `plans` beside JAX's own cache (which cannot read back a
program without its devices): the schedule's text, memory and time, by the
program that was asked for, its devices, options and the compiler's version.
"""

import gzip
import hashlib
import json
import os
import pathlib
from typing import Any

from tpu_lm import devices

_FORM = 3  # of a record; those of another are not found


def key(lowered: Any, mesh: Any, options: dict[str, Any], version: str) -> str:
  """Of a program: its text, and all that its compilation depends on."""
  about = [
    _FORM,
    version,
    sorted(options.items()),
    list(mesh.shape.items()),
    [str(device) for device in mesh.devices.flat],
    mesh.devices.flat[0].device_kind,
    len({getattr(d, 'slice_index', 0) for d in mesh.devices.flat}),
  ]
  digest = hashlib.sha256(json.dumps(about).encode())
  digest.update(lowered.as_text().encode())
  return digest.hexdigest()[:32]


def find(name: str) -> dict[str, Any] | None:
  """{memory, text, seconds, refusal}; None: not compiled before."""
  path = _path(name)
  try:
    return json.loads(gzip.decompress(path.read_bytes()))
  except (OSError, ValueError, EOFError):
    return None  # missing, or torn: it is compiled again


def keep(name: str, record: dict[str, Any]) -> None:
  """Writes what `find` gives; where it cannot, the next plan takes longer."""
  path = _path(name)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record).encode()
    temporary = path.with_suffix(f'.{os.getpid()}.tmp')
    temporary.write_bytes(gzip.compress(text, 6))
    temporary.replace(path)
  except OSError:
    return


def _path(name: str) -> pathlib.Path:
  return devices.compilation_cache().parent / 'plans' / f'{name}.json.gz'
