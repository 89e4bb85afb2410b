"""What JAX sees on this machine, what is missing, and the exact mend."""

import importlib.metadata
import os
import platform
import shutil
import sys

import jax

from tpu_lm import __version__, devices, flops

REQUIRED = (
  'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'chex',
  'ml-collections', 'numpy', 'tokenizers', 'pyarrow', 'jinja2',
  'tensorflow-datasets', 'seqio', 'tensorflow',
)  # fmt: skip
# Package, the extra that brings it, and what it is for.
OPTIONAL = (
  ('libtpu', 'tpu', 'training on TPUs'),
  ('jax-cuda13-plugin', 'cuda', 'training on NVIDIA GPUs'),
  ('datasets', 'hf', 'data.source=hf:NAME'),
  ('tensorboardX', 'tensorboard', 'tensorboard=True'),
  ('pytest', 'dev', 'running the tests'),
)


def version(package: str) -> str | None:
  """The installed version of a package, or None."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _gigabytes(size: float) -> str:
  return f'{size / 2**30:.1f} GiB'


def _device_lines() -> list[str]:
  lines = []
  found = jax.devices()
  kinds = sorted({device.device_kind for device in found})
  lines.append(
    f'{len(found)} {found[0].platform} device(s), {", ".join(kinds)}; '
    f'process {jax.process_index()} of {jax.process_count()}'
  )
  for device in jax.local_devices():
    stats = device.memory_stats() or {}
    if 'bytes_limit' in stats:
      used, limit = stats['bytes_in_use'], stats['bytes_limit']
      lines.append(
        f'device {device.id}: {_gigabytes(used)} of {_gigabytes(limit)} used'
      )
  peak = flops.total_peak()
  if peak is not None:
    how = 'measured, float32' if found[0].platform == 'cpu' else 'tabulated'
    lines.append(f'peak {peak / 1e12:.2f} TFLOP/s ({how})')
  return lines


def _host_lines() -> list[str]:
  pages = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  cores = len(os.sched_getaffinity(0))
  cache = devices.compilation_cache()
  free = shutil.disk_usage(os.getcwd()).free
  return [
    f'{platform.system()} {platform.machine()}, Python '
    f'{platform.python_version()}, {cores} core(s), {_gigabytes(pages)} memory',
    f'{_gigabytes(free)} free on the disk of the current directory',
    f'compiled programs are kept in {cache}',
  ]


def _accelerator_mend() -> str | None:
  """What to install when an accelerator is there that JAX does not use."""
  if jax.default_backend() != 'cpu':
    return None
  asked = os.environ.get('JAX_PLATFORMS', '')
  if os.path.exists('/dev/nvidia0') and asked in ('', 'cuda', 'gpu'):
    return "a GPU is here but JAX does not see it: pip install 'tpu_lm[cuda]'"
  if os.path.exists('/dev/accel0') or os.path.exists('/dev/vfio/0'):
    return "a TPU is here but JAX does not see it: pip install 'tpu_lm[tpu]'"
  if asked == 'cpu':
    return None
  return None


def report() -> int:
  """Prints the report; returns 1 when something required is missing."""
  sections = {
    f'tpu_lm {__version__}': _host_lines(),
    'Devices': _device_lines(),
    'Packages': [],
    'Optional': [],
    'To mend': [],
  }
  for package in REQUIRED:
    found = version(package)
    sections['Packages'].append(f'{package:<22} {found or "MISSING"}')
    if found is None:
      sections['To mend'].append(f'pip install {package}')
  for package, extra, use in OPTIONAL:
    found = version(package)
    mend = f"not installed; for {use}: pip install 'tpu_lm[{extra}]'"
    sections['Optional'].append(f'{package:<22} {found or mend}')
  missing = bool(sections['To mend'])
  mend = _accelerator_mend()
  if mend:
    sections['To mend'].append(mend)
  bold, plain = ('\033[1m', '\033[0m') if sys.stdout.isatty() else ('', '')
  for title, lines in sections.items():
    print(f'{bold}{title}{plain}')
    for line in lines or ['nothing']:
      print(f'  {line}')
  return 1 if missing else 0
