"""Scheduled programs as the TPU compiler writes them, and records of plans."""

import jax

from tpu_lm import config as configs
from tpu_lm import sharding
from tpu_lm.plan import estimate, hlo

GIB = 2**30
MIB = 2**20
_LINE = ', backend_config={"flag_configs":[],"scoped_memory_configs":[]}'
X = 'bf16[8192,4096]{1,0:T(8,128)(2,1)}'
W = 'bf16[4096,14336]{1,0:T(8,128)(2,1)}'
OUT = 'bf16[8192,14336]{1,0:T(8,128)(2,1)}'
PRODUCT_FLOPS = 2 * 8192 * 4096 * 14336
PRODUCT_BYTES = 2 * (8192 * 4096 + 4096 * 14336 + 8192 * 14336)
# A weight, shared out over 16 devices and gathered.
OWN = 'bf16[256,4096]{1,0:T(8,128)(2,1)}'
WHOLE = 'bf16[4096,4096]{1,0:T(8,128)(2,1)}'
WHOLE_BYTES = 2 * 4096 * 4096
ROW = '{' + ','.join(map(str, range(16))) + '}'  # ids along the first side
ARGUMENTS = f"""
  %x.1 = {X} parameter(0)
  %w.1 = {W} parameter(1)
  %own.1 = {OWN} parameter(2)
"""


def text(entry: str, others: str = '') -> str:
  """A module of an entry, and of computations before it."""
  lines = [line.rstrip() for line in entry.strip('\n').splitlines()]
  body = '\n'.join(
    line + _LINE if 'parameter(' not in line else line for line in lines if line
  )
  return (
    'HloModule jit_update, is_scheduled=true, entry_computation_layout={'
    f'({X})->{OUT}}}, num_partitions=256\n\n{others.strip()}\n\n'
    f'ENTRY %main.1_spmd (x.1: {X}) -> {OUT} {{\n{body}\n}}\n'
  )


def program(entry: str, others: str = '') -> hlo.Program:
  return hlo.parse(text(ARGUMENTS + entry, others))


def product(name: str, x: str = 'x.1', w: str = 'w.1') -> str:
  return (
    f'  %{name} = {OUT} convolution(%{x}, %{w}), dim_labels=bf_io->bf, '
    f'metadata={{op_name="jit(update)/mlp/{name}/dot_general"}}\n'
  )


def gather(
  name: str, groups: str = f'{{{ROW}}}', operand: str = 'own.1'
) -> str:
  """One that is waited for."""
  return (
    f'  %{name} = {WHOLE} all-gather(%{operand}), channel_id=1, '
    f'replica_groups={groups}, dimensions={{0}}, use_global_device_ids=true\n'
  )


def started(name: str, groups: str = f'{{{ROW}}}') -> str:
  """One that runs beside what follows."""
  return (
    f'  %{name} = ({OWN}, {WHOLE}) all-gather-start(%own.1), channel_id=1, '
    f'replica_groups={groups}, dimensions={{0}}, use_global_device_ids=true\n'
  )


def done(name: str) -> str:
  return f'  %{name}.done = {WHOLE} all-gather-done(%{name})\n'


_STATE = f'(s32[]{{:T(128)}}, {X}, {W}, {OWN})'


def loop(body: str, times: int = 4, inner: str = '') -> tuple[str, str]:
  """(computations, entry) of a scan over layers whose body is `body`."""
  others = f"""
{inner}
%wide.condition.1 (arg.1: (s32[])) -> pred[] {{
  %arg.1 = {_STATE} parameter(0)
  %get-tuple-element.1 = s32[]{{:T(128)}} get-tuple-element(%arg.1), index=0
  %constant.7 = s32[]{{:T(128)}} constant({times})
  ROOT %lt.1 = pred[]{{:T(512)S(6)}} compare(%get-tuple-element.1, %constant.7), direction=LT, metadata={{op_name="jit(update)/lt"}}
}}

%wide.body.1 (arg.2: (s32[])) -> (s32[]) {{
  %arg.2 = {_STATE} parameter(0)
  %i.1 = s32[]{{:T(128)}} get-tuple-element(%arg.2), index=0
  %x.1 = {X} get-tuple-element(%arg.2), index=1
  %w.1 = {W} get-tuple-element(%arg.2), index=2
  %own.1 = {OWN} get-tuple-element(%arg.2), index=3
{body.rstrip()}
  ROOT %tuple.2 = {_STATE} tuple(%i.1, %x.1, %w.1, /*index=3*/%own.1)
}}
"""  # noqa: E501
  entry = f"""
  %zero.1 = s32[]{{:T(128)}} constant(0)
  %tuple.1 = {_STATE} tuple(%zero.1, %x.1, %w.1, /*index=3*/%own.1)
  %while.1 = {_STATE} while(%tuple.1), condition=%wide.condition.1, body=%wide.body.1, metadata={{op_name="jit(update)/jvp(Transformer)/Transformer._scanned/while"}}
"""  # noqa: E501
  return others, entry


def config(**sizes: int):
  """Two narrow layers of Llama's kind on a mesh of these sizes."""
  made = configs.base()
  made.batch_size = 8
  made.data.length = 16
  made.data.vocab_size = 64
  made.model_name = 'llama'
  shape = {
    'num_layers': 2,
    'dim': 32,
    'num_heads': 4,
    'num_kv_heads': 2,
    'hidden_dim': 48,
    'dtype': 'bfloat16',
    'remat': 'full',
  }
  made.model.update(shape)
  made.mesh.update(dict.fromkeys(sharding.AXES, 1) | sizes)
  return made


def devices(count: int = 8):
  return jax.devices()[:count]


# One that fits, and one that does not (stages.py).
OTHERS = [
  {
    'program': 'decode',
    'fits': True,
    'refusal': '',
    'seconds': 0.0125,
    'tokens_per_second': 20_480.0,
    'compiled': 5 * GIB,
    'parameters': 2 * GIB,
    'cache': 1 * GIB,
    'bound': 'memory',
  },
  {'program': 'prefill', 'fits': False, 'refusal': 'too much'},
]


def record(fits: bool = True, **given) -> dict:
  """What `tpu_lm plan` would keep of a network that waits for its links."""
  made = {
    'config': 'configs/made.py:big',
    'versions': 'jax 1, libtpu 2',
    'overrides': {'mesh.fsdp': 256, 'model.remat': 'full'},
    'topology': '2xv5e-256',
    'chip': 'v5e',
    'devices': 512,
    'slices': 2,
    'mesh': {'data': 2, 'fsdp': 16, 'fsdp_y': 16},
    'stage': 'pretrain',
    'remat': 'full',
    'microbatches': 2,
    'batch_size': 1024,
    'length': 8192,
    'note': estimate.HONEST,
    'program': 'update',
    'compile_s': 95.0,
    'fits': fits,
    'refusal': '' if fits else 'total memory required (20G) exceeds (15.75G)',
    'memory': {
      'parameters': 1.0 * GIB,
      'optimizer': 2.0 * GIB,
      'batch': 0.25 * GIB,
      'copies': 0.5 * GIB,
      'gradients': 0.5 * GIB,
      'activations': 3.0 * GIB,
      'layer': 0.5 * GIB,
      'loss': 2.75 * GIB,
      'analytic': 10.0 * GIB,
      'limit': 16.0 * GIB,
    },
    'programs': [],
  }
  if fits:
    made |= {
      'seconds': 2.0,
      'by': {'matmul': 0.5, 'memory': 0.3, 'interconnect': 1.2},
      'bound': 'interconnect',
      'tokens_per_second': 4_194_304.0,
      'mfu': 0.1234,
      'model_flops': 5e13,
      'hardware_flops': 7e13,
      'collectives': [
        {
          'kind': 'all-gather',
          'over': 'links',
          'count': 1234,
          'bytes': 4e9,
          'overlapped_bytes': 3e9,
          'seconds': 0.05,
        },
        {
          'kind': 'all-reduce',
          'over': 'slices',
          'count': 1,
          'bytes': 1e9,
          'overlapped_bytes': 0.0,
          'seconds': 1.0,
        },
      ],
      'overlapped': 0.75,
      'steps': 86_400,
      'days': 2.0,
      'chip_hours': 24_576.0,
      'timeline': [
        {
          'loop': 'Layers, forward',
          'times': 32,
          'name': 'mlp/TD,DF->TF',
          'kind': 'matmul',
          'lane': 'core',
          'start': 0.0,
          'seconds': 0.004,
        },
        {
          'loop': 'Layers, forward',
          'times': 32,
          'name': 'all-gather of mlp',
          'kind': 'collective',
          'lane': 'links',
          'start': 0.001,
          'seconds': 0.002,
        },
      ],
    }
    made['memory']['compiled'] = 12.5 * GIB
  return made | given
