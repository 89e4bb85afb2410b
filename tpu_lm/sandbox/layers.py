"""What binds a process from within: own uid, Landlock, seccomp, rlimits.

Through ctypes, without a dependency; Linux on x86-64 and aarch64. Elsewhere
the rlimits remain. Each function says whether its layer holds; none raises
for a kernel that lacks it. Nothing here can be undone by the process itself.

- The uid first: RLIMIT_NPROC does not bind uid 0, and files, processes and
  signals of others are out of reach of a uid that nobody else has.
- Landlock (landlock(7)): no file but those named can be opened; no TCP port
  bound or connected; no signal and no abstract socket leaves the domain.
- seccomp (seccomp(2)): a list of what may be called. No sockets, no new
  processes, no exec, no ptrace, no signal to another process.

This file runs inside and imports nothing of this package.
"""

import ctypes
import errno
import os
import platform
import random
import resource
import struct
import sys

# name: (x86-64, aarch64); None where the machine lacks it.
_CALLS = {
  'read': (0, 63),
  'write': (1, 64),
  'readv': (19, 65),
  'writev': (20, 66),
  'pread64': (17, 67),
  'pwrite64': (18, 68),
  'open': (2, None),
  'openat': (257, 56),
  'close': (3, 57),
  'close_range': (436, 436),
  'stat': (4, None),
  'fstat': (5, 80),
  'lstat': (6, None),
  'newfstatat': (262, 79),
  'statx': (332, 291),
  'access': (21, None),
  'faccessat': (269, 48),
  'faccessat2': (439, 439),
  'readlink': (89, None),
  'readlinkat': (267, 78),
  'getdents64': (217, 61),
  'getcwd': (79, 17),
  'lseek': (8, 62),
  'mmap': (9, 222),
  'mprotect': (10, 226),
  'munmap': (11, 215),
  'mremap': (25, 216),
  'madvise': (28, 233),
  'brk': (12, 214),
  'futex': (202, 98),
  'set_robust_list': (273, 99),
  'rseq': (334, 293),
  'rt_sigaction': (13, 134),
  'rt_sigprocmask': (14, 135),
  'rt_sigreturn': (15, 139),
  'rt_sigtimedwait': (128, 137),
  'rt_sigpending': (127, 136),
  'rt_sigsuspend': (130, 133),
  'sigaltstack': (131, 132),
  'exit': (60, 93),
  'exit_group': (231, 94),
  'getpid': (39, 172),
  'getppid': (110, 173),
  'gettid': (186, 178),
  'getuid': (102, 174),
  'geteuid': (107, 175),
  'getgid': (104, 176),
  'getegid': (108, 177),
  'getresuid': (118, 148),
  'getresgid': (120, 150),
  'getgroups': (115, 158),
  'getrandom': (318, 278),
  'clock_gettime': (228, 113),
  'clock_getres': (229, 114),
  'clock_nanosleep': (230, 115),
  'nanosleep': (35, 101),
  'gettimeofday': (96, 169),
  'time': (201, None),
  'times': (100, 153),
  'getrusage': (98, 165),
  'sysinfo': (99, 179),
  'uname': (63, 160),
  'sched_yield': (24, 124),
  'sched_getaffinity': (204, 123),
  'getcpu': (309, 168),
  'poll': (7, None),
  'ppoll': (271, 73),
  'select': (23, None),
  'pselect6': (270, 72),
  'epoll_create1': (291, 20),
  'epoll_ctl': (233, 21),
  'epoll_wait': (232, None),
  'epoll_pwait': (281, 22),
  'eventfd2': (290, 19),
  'pipe': (22, None),
  'pipe2': (293, 59),
  'dup': (32, 23),
  'dup2': (33, None),
  'dup3': (292, 24),
  'socketpair': (53, 199),
  'recvfrom': (45, 207),
  'setitimer': (38, 103),
  'getitimer': (36, 102),
  'alarm': (37, None),
  'pause': (34, None),
  'restart_syscall': (219, 128),
  'arch_prctl': (158, None),
  'set_tid_address': (218, 96),
  'getrlimit': (97, 163),
  'membarrier': (324, 283),
  'fadvise64': (221, 223),
}
# These are let through for some arguments only.
_CLONE, _CLONE3 = (56, 220), (435, 435)
_KILL, _TGKILL, _PRLIMIT = (62, 129), (234, 131), (302, 261)
_IOCTL, _FCNTL, _SENDTO = (16, 29), (72, 25), (44, 206)
_THREAD = 0x10000  # CLONE_THREAD
# TCGETS, TIOCGWINSZ, FIONBIO, FIONCLEX, FIOCLEX
_IOCTLS = (0x5401, 0x5413, 0x5421, 0x5450, 0x5451)
# Duplicate, flags, size of a pipe; not F_SETOWN, which sends signals.
_FCNTLS = (0, 1, 2, 3, 4, 1030, 1032)

_ARCHES = {'x86_64': (0, 0xC000003E), 'aarch64': (1, 0xC00000B7)}
_ALLOW, _REFUSE, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def _libc():
  return ctypes.CDLL(None, use_errno=True)


def linux():
  """Whether the layers beyond rlimits are known for this machine."""
  return sys.platform == 'linux' and platform.machine() in _ARCHES


def drop_uid():
  """Leaves uid 0 for one that nobody else has; returns it, None if it cannot.

  A user namespace may map few uids (rootless containers): small ones are
  tried then. Returns the uid unchanged when it is not 0.
  """
  if os.getuid() != 0:
    return os.getuid()
  chance = random.SystemRandom()
  for low, high in ((1 << 30, 1 << 31), (30_000, 60_000)):
    uid = chance.randrange(low, high)
    try:
      os.setgroups([])
      os.setresgid(uid, uid, uid)
      os.setresuid(uid, uid, uid)
    except (OSError, ValueError):
      continue
    return uid
  return None


def no_new_privs():
  """No setuid program gives anything; and nobody may trace this process."""
  if not linux():
    return False
  libc = _libc()
  dumpable = libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
  return libc.prctl(38, 1, 0, 0, 0) == 0 and dumpable == 0


def adopt_orphans():
  """What a run leaves behind becomes this process's child, to be ended."""
  _libc().prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def landlock(readable, writable=()):
  """Leaves these paths to be read (and written); 0, or the kernel's ABI.

  Landlock is there from Linux 5.13 (ABI 1); TCP from ABI 4, signals and
  abstract sockets from 6.
  """
  if not linux():
    return 0
  libc = _libc()
  create, add, restrict = 444, 445, 446
  abi = libc.syscall(create, None, ctypes.c_size_t(0), 1)
  if abi < 1:
    return 0
  files = (1 << 13) - 1  # ABI 1; then refer, truncate, ioctl on devices
  files |= (abi >= 2) << 13 | (abi >= 3) << 14 | (abi >= 5) << 15
  rules = struct.pack('<Q', files)
  if abi >= 4:
    rules += struct.pack('<Q', 0b11)  # bind and connect
  if abi >= 6:
    rules += struct.pack('<Q', 0b11)  # abstract sockets and signals
  ruleset = libc.syscall(create, rules, ctypes.c_size_t(len(rules)), 0)
  if ruleset < 0:
    return 0
  read_file, write_file, read_folder = 1 << 2, 1 << 1, 1 << 3
  for path in (*readable, *writable):
    try:
      fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
      continue
    rights = read_file | (read_folder if os.path.isdir(path) else 0)
    rights |= write_file if path in writable else 0
    rule = struct.pack('<Qi', rights, fd)
    added = libc.syscall(add, ruleset, 1, rule, 0)
    os.close(fd)
    if added != 0:
      os.close(ruleset)
      return 0
  done = libc.syscall(restrict, ruleset, 0)
  os.close(ruleset)
  return abi if done == 0 else 0


def _step(code, value, yes=0, no=0):
  return struct.pack('<HBBI', code, yes, no, value & 0xFFFFFFFF)


def _when(number, steps):
  """Runs `steps`, which end by returning, for one system call."""
  return [_step(_EQUAL, number, 0, len(steps)), *steps]


def _argument(index, high=False):
  return _step(_LOAD, _ARGUMENTS + 8 * index + 4 * high)


def _one_of(index, values):
  """Allows a call whose argument is one of these; refuses it otherwise."""
  count = len(values)
  tests = [
    _step(_EQUAL, value, count - place, 0) for place, value in enumerate(values)
  ]
  return [_argument(index), *tests, _refuse(errno.EPERM), _allow()]


def _allow():
  return _step(_RETURN, _ALLOW)


def _refuse(error):
  return _step(_RETURN, _REFUSE | error)


def seccomp():
  """Leaves the system calls of a program that computes; whether it holds.

  For this process, its threads and what they start. Call it in the process
  that it binds: signals to its own pid are let through.
  """
  if not linux():
    return False
  column, arch = _ARCHES[platform.machine()]
  pid = os.getpid()
  steps = [
    _step(_LOAD, _ARCH),
    _step(_EQUAL, arch, 1, 0),
    _step(_RETURN, _KILL_PROCESS),
    _step(_LOAD, _NUMBER),
  ]
  if arch == _ARCHES['x86_64'][1]:  # x32 has numbers of its own
    steps += [_step(_AT_LEAST, 0x40000000, 0, 1), _refuse(errno.ENOSYS)]
  special = {
    # A thread, not a process; libc falls back to clone without clone3.
    _CLONE: [
      _argument(0),
      _step(_ANY_BIT, _THREAD, 1, 0),
      _refuse(errno.EPERM),
      _allow(),
    ],
    _CLONE3: [_refuse(errno.ENOSYS)],
    _KILL: _one_of(0, (pid,)),
    _TGKILL: _one_of(0, (pid,)),
    _PRLIMIT: _one_of(0, (0, pid)),
    _IOCTL: _one_of(1, _IOCTLS),
    _FCNTL: _one_of(1, _FCNTLS),
    # Within a pair of sockets; an address would lead out.
    _SENDTO: [
      _argument(4),
      _step(_EQUAL, 0, 0, 2),
      _argument(4, high=True),
      _step(_EQUAL, 0, 1, 0),
      _refuse(errno.EPERM),
      _allow(),
    ],
  }
  for numbers, body in special.items():
    steps += _when(numbers[column], body)
  for numbers in _CALLS.values():
    if numbers[column] is not None:
      steps += [_step(_EQUAL, numbers[column], 0, 1), _allow()]
  steps.append(_refuse(errno.EPERM))
  code = b''.join(steps)
  program = ctypes.create_string_buffer(code, len(code))
  header = struct.pack('HxxxxxxP', len(steps), ctypes.addressof(program))
  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
  return _libc().prctl(22, 2, header, 0, 0) == 0


def num_tasks(uid):
  """How many threads this uid has: what RLIMIT_NPROC counts; 0 unknown."""
  count = 0
  try:
    for name in os.listdir('/proc'):
      if name.isdigit() and os.stat(f'/proc/{name}').st_uid == uid:
        count += len(os.listdir(f'/proc/{name}/task'))
  except OSError:
    pass
  return count


def limit(memory, seconds, tasks):
  """Sets the rlimits: MiB of address space, processor seconds, threads."""
  size = memory << 20
  for name, value in (
    ('RLIMIT_AS', size),
    ('RLIMIT_CPU', seconds),
    ('RLIMIT_NPROC', tasks),
    ('RLIMIT_FSIZE', 0),
    ('RLIMIT_NOFILE', 64),
    ('RLIMIT_CORE', 0),
    ('RLIMIT_STACK', min(size, 8 << 20)),
    ('RLIMIT_MEMLOCK', 0),
    ('RLIMIT_MSGQUEUE', 0),
  ):
    kind = getattr(resource, name, None)
    if kind is None:
      continue
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
      value = min(value, hard)
    resource.setrlimit(kind, (value, value))
