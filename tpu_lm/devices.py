"""The devices that JAX sees, and the settings of JAX that every command has."""

import contextlib
import ctypes
import os
import pathlib
import socket
import time
from collections.abc import Iterator

import jax
from jax._src import distributed

from tpu_lm import accelerators, peers
from tpu_lm.errors import UserError

_PATIENCE = 300  # seconds in which all processes must have been started
_HEARTBEAT = 40  # seconds without one, after which a process counts as dead
PLATFORMS = ('cpu', 'gpu', 'tpu')
# Numbers of <malloc.h>: (option, value).
_MALLOPT = {
  'M_ARENA_MAX': (-8, 1),
  'M_MMAP_MAX': (-4, 0),
  'M_TRIM_THRESHOLD': (-1, -1),
}


def compilation_cache() -> pathlib.Path:
  """Where compiled programs are kept between runs."""
  given = os.environ.get('JAX_COMPILATION_CACHE_DIR')
  home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(given or pathlib.Path(home) / 'tpu_lm' / 'xla')


def _keep_memory() -> None:
  """Lets the C library keep freed memory for the next step (Linux, CPU).

  XLA:CPU asks malloc for the whole temporary memory of a program at each
  call. glibc maps it from the system, and to fault it in page by page took 30
  to 40 % of a training step. With one arena, no mapping and no trimming the
  same pages are used again. Where an accelerator computes this would only
  hold on to the host's memory.
  """
  if accelerators.are_there() and os.environ.get('JAX_PLATFORMS') != 'cpu':
    return
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:
    for option, value in _MALLOPT.values():
      mallopt(option, value)


def set_up(num_cpu_devices: int = 0) -> None:
  """Applies the settings of JAX; before the first array is made.

  Args:
    num_cpu_devices: how many devices to simulate on a CPU; 0: as JAX says.
  """
  _keep_memory()
  cache = compilation_cache()
  try:
    cache.mkdir(parents=True, exist_ok=True)
    jax.config.update('jax_compilation_cache_dir', str(cache))
  except OSError:
    pass  # a read-only home only costs the compilation each time
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)
  if num_cpu_devices:
    jax.config.update('jax_num_cpu_devices', num_cpu_devices)


@contextlib.contextmanager
def connected(
  coordinator: str, num_processes: int, process: int
) -> Iterator[None]:
  """Joins the processes of a run that spans several; none: stays alone.

  On Cloud TPU the three are found by JAX itself: `coordinator='auto'`. When
  one process ends before its time, all do, and tell which it was (peers.py).

  Raises:
    UserError: the three do not go together.
  """
  if num_processes > 1 and not coordinator:
    raise UserError(
      f'--processes={num_processes}: give --coordinator=HOST:PORT, too'
    )
  if process >= num_processes and coordinator != 'auto':
    raise UserError(
      f'--process={process}: must be below --processes={num_processes}'
    )
  if not coordinator:
    yield
    return
  others = _joined(coordinator, num_processes, process)
  try:
    yield
  except BaseException as error:
    if isinstance(error, jax.errors.JaxRuntimeError):
      others.wait()  # a collective fails when another process is gone
    others.close(str(error).strip().split('\n')[0] or type(error).__name__)
    raise
  others.close()
  jax.distributed.shutdown()


def _joined(coordinator: str, num_processes: int, process: int) -> peers.Peers:
  known = {}
  if coordinator != 'auto':
    if process:
      _meet(coordinator)
    known = {
      'coordinator_address': coordinator,
      'num_processes': num_processes,
      'process_id': process,
    }
  try:
    jax.distributed.initialize(
      **known,
      heartbeat_timeout_seconds=_HEARTBEAT,
      shutdown_timeout_seconds=_HEARTBEAT,
    )
  except (RuntimeError, ValueError) as error:
    said = str(error).strip().split('\n')[0]
    raise UserError(
      f'--coordinator={coordinator}: the {num_processes} processes did not '
      f'meet ({said}); start all of them, with the same HOST:PORT of process 0'
    ) from error
  # JAX has no public name for the store in which its processes meet.
  state = distributed.global_state
  host = state.coordinator_address.rpartition(':')[0].strip('[]')
  return peers.Peers(state.client, host, state.num_processes, state.process_id)


def _meet(coordinator: str) -> None:
  """Waits for process 0, since JAX aborts where it does not come."""
  host, _, port = coordinator.rpartition(':')
  if not (host and port.isdecimal()):
    raise UserError(f'--coordinator={coordinator}: must be HOST:PORT, or auto')
  due = time.monotonic() + _PATIENCE
  while True:
    try:
      socket.create_connection((host.strip('[]'), int(port)), 10).close()
      return
    except OSError as error:
      if time.monotonic() > due:
        raise UserError(
          f'--coordinator={coordinator}: process 0 does not answer there after '
          f'{_PATIENCE} s ({error}); start it too, and name its HOST:PORT'
        ) from error
    time.sleep(0.2)


def require(platform: str) -> None:
  """Refuses to fall back silently to another kind of device.

  Raises:
    UserError: `platform` is asked for and JAX has another.
  """
  if platform and platform not in PLATFORMS:
    raise UserError(
      f'platform={platform!r}: choose one of {", ".join(PLATFORMS)}'
    )
  try:
    found = jax.default_backend()
  except RuntimeError as error:  # JAX_PLATFORMS asks for what is not there
    what = str(error).split(':')[0]
    raise UserError(
      f'JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS", "")}: {what}; see '
      '`tpu_lm doctor`, or set JAX_PLATFORMS=cpu'
    ) from error
  if platform and found != platform:
    extra = {'gpu': 'cuda', 'tpu': 'tpu'}.get(platform)
    mend = (
      f"pip install 'tpu_lm[{extra}]' and see `tpu_lm doctor`"
      if extra
      else 'set JAX_PLATFORMS=cpu'
    )
    raise UserError(
      f'platform={platform!r}: JAX found only {found} devices; {mend}'
    )
