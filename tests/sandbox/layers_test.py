"""What a bound process can still call, file by file and call by call."""

import platform

import boxes
import pytest

PROBE = """
import ctypes, errno, json, os, resource, signal, socket, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
  ctypes.set_errno(0)
  found = libc.syscall(number, *args)
  return errno.errorcode.get(ctypes.get_errno(), 'ok') if found == -1 else 'ok'
def kind(act, *args):
  try:
    act(*args)
    return 'ok'
  except OSError as error:
    return errno.errorcode[error.errno]
"""


@pytest.fixture(scope='module', params=list('AB'))
def probe(request):
  with boxes.box(request.param) as sandbox:

    def give(*expressions):
      steps = [{'give': text} for text in expressions]
      run = sandbox.run(PROBE, steps=steps, seconds=5.0)
      assert all(x.ok for x in run.outcomes), run
      return [x.value for x in run.outcomes]

    yield give


def refused(probe, *expressions):
  found = dict(zip(expressions, probe(*expressions), strict=True))
  return {text: said for text, said in found.items() if said != 'EPERM'}


def test_calls_that_lead_out_are_refused(probe):
  assert not refused(
    probe,
    'kind(os.fork)',
    'kind(os.execv, "/bin/true", ["true"])',
    'kind(socket.socket)',
    'kind(socket.socket, socket.AF_UNIX)',
    'kind(os.kill, os.getppid(), 0)',
    'kind(os.kill, -1, 0)',
    'kind(os.kill, 0, 0)',
    'kind(os.killpg, os.getpid(), 0)',
    'kind(resource.prlimit, os.getppid(), resource.RLIMIT_CPU, (0, 0))',
    'kind(os.sched_setaffinity, os.getppid(), {0})',
    'kind(os.setpriority, os.PRIO_PROCESS, os.getppid(), 19)',
    'kind(os.memfd_create, "x")',
    'kind(os.mkdir, "/tmp/x")',
    'kind(os.chdir, "/tmp")',
    'kind(os.unlink, "/tmp/x")',
    'kind(os.chmod, "/tmp", 0o777)',
    'kind(os.setsid)',
  )


def test_calls_by_number_are_refused(probe):
  if platform.machine() != 'x86_64':
    pytest.skip('the numbers are of x86-64')
  numbers = {
    'ptrace': 101,
    'process_vm_readv': 310,
    'pidfd_open': 434,
    'pidfd_send_signal': 424,
    'mount': 165,
    'unshare': 272,
    'setns': 308,
    'bpf': 321,
    'perf_event_open': 298,
    'keyctl': 250,
    'io_uring_setup': 425,
    'userfaultfd': 323,
    'connect': 42,
    'sendmsg': 46,
    'prctl': 157,
    'seccomp': 317,
    'vfork': 58,
    'execveat': 322,
    'shmget': 29,
    'tkill': 200,
    'chroot': 161,
  }
  assert not refused(probe, *(f'call({n}, 0, 0, 0)' for n in numbers.values()))
  # clone3 is said not to be there; the x32 numbers are not.
  assert probe('call(435, 0, 0)', 'call(0x40000000 + 57)') == ['ENOSYS'] * 2


def test_a_descriptor_sends_no_signals(probe):
  assert not refused(
    probe,
    'kind(__import__("fcntl").fcntl, 0, 8, os.getppid())',
    'kind(__import__("fcntl").fcntl, 0, 10, 9)',
    'kind(__import__("fcntl").ioctl, 0, 0x5412, b"x")',
  )


def test_files_that_are_not_of_the_interpreter_are_out_of_reach(probe):
  texts = [
    f'kind(open, {path!r})'
    for path in ('/etc/passwd', '/proc/self/environ', '/root/x', '/dev/zero')
  ] + [
    'kind(os.listdir, "/")',
    'kind(os.listdir, "/tmp")',
    'kind(open, "/tmp/x", "w")',
    'kind(open, "/dev/shm/x", "w")',
    'kind(open, os.__file__, "a")',
  ]
  assert set(probe(*texts)) <= {'EACCES', 'ENOENT', 'EROFS'}


def test_what_a_program_needs_is_there(probe):
  assert probe(
    'dict(os.environ)',
    'os.getuid() != 0',
    'kind(open, "/dev/null", "w")',
    'len(os.urandom(4))',
    'sorted(__import__("heapq").nsmallest(2, [3, 1, 2]))',
    '__import__("zlib").crc32(b"a")',
    '__import__("sqlite3").connect(":memory:").execute("select 1").fetchall()',
    '__import__("asyncio").run(__import__("asyncio").sleep(0, 5))',
    '[t.start() or t.join() for t in [threading.Thread(target=int)]]',
    'signal.raise_signal(0)',
    'resource.getrlimit(resource.RLIMIT_CORE)',
  ) == [{}, True, 'ok', 4, [1, 2], 3904355907, [(1,)], 5, [None], None, (0, 0)]


def test_every_limit_is_hard(probe):
  names = ('AS', 'CPU', 'NPROC', 'FSIZE', 'NOFILE', 'CORE')
  found = probe(*(f'resource.getrlimit(resource.RLIMIT_{n})' for n in names))
  assert found[0] == (512 << 20,) * 2
  assert found[1] == (7, 7)
  assert found[3:] == [(0, 0), (64, 64), (0, 0)]
  assert all(soft == hard for soft, hard in found)
  assert refused(probe, 'kind(os.pipe)')  # the probe itself can tell
