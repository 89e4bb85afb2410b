import types

import made_plans
import pytest
from made_plans import (
  PRODUCT_FLOPS,
  WHOLE_BYTES,
  done,
  gather,
  product,
  started,
)

from tpu_lm.plan import chips, estimate, hlo, programs

POD = chips.find('v5e-256')
PRODUCT = PRODUCT_FLOPS / POD.chip.flops
GATHERED = WHOLE_BYTES * 15 / 16
GATHER = GATHERED / (2 * POD.chip.link)


def timed(body: str, after: str = '', topology=POD):
  others, entry = made_plans.loop(body, times=32)
  text = made_plans.text(made_plans.ARGUMENTS + entry + after, others)
  program = hlo.parse(text)
  return estimate.time_of(program, topology, tokens=1000, count=1e12)


def test_a_step_is_what_its_schedule_takes():
  found = timed(gather('g.1') + product('a.1'))
  seconds = 32 * (PRODUCT + GATHER)
  assert found['seconds'] == pytest.approx(seconds)
  by = found['by']
  assert by['matmul'] == pytest.approx(32 * PRODUCT)
  assert by['interconnect'] == pytest.approx(32 * GATHER)
  assert sum(by.values()) == pytest.approx(found['seconds'])
  assert found['bound'] == 'matmul'
  assert found['tokens_per_second'] == pytest.approx(1000 / seconds)
  assert found['model_flops'] == 1e12 * 1000 / 256
  assert found['hardware_flops'] == 32 * PRODUCT_FLOPS
  mfu = 1e12 * 1000 / 256 / seconds / 197e12
  assert found['mfu'] == pytest.approx(mfu)


def test_collectives_are_summed_by_kind_and_by_links():
  body = gather('g.1') + started('g.2') + product('a.1') + done('g.2')
  found = timed(
    body,
    gather('g.3') + gather('g.4', '{{0,256},{1,257}}'),
    chips.find('2xv5e-256'),
  )
  near, far = found['collectives']
  assert (near['kind'], near['over'], near['count']) == (
    'all-gather', 'links', 65,
  )  # fmt: skip
  assert near['bytes'] == pytest.approx(65 * GATHERED)
  assert near['overlapped_bytes'] == pytest.approx(32 * GATHERED)
  assert near['seconds'] == pytest.approx(65 * GATHER)
  assert (far['over'], far['count']) == ('slices', 1)
  # Outside of loops nothing counts.
  assert found['overlapped'] == pytest.approx(0.5)


def test_without_collectives_all_are_overlapped():
  found = timed(product('a.1'))
  assert found['collectives'] == []
  assert found['overlapped'] == 1.0


def test_the_links_are_named_where_they_are_the_bound():
  found = timed(''.join(gather(f'g.{n}') for n in range(20)))
  assert found['bound'] == 'interconnect'


def test_a_budget_is_all_steps_on_all_chips():
  config = types.SimpleNamespace(steps=86_400)
  found = estimate.budget({'seconds': 2.0}, config, POD)
  assert found == {
    'steps': 86_400,
    'days': 2.0,
    'chip_hours': pytest.approx(48 * 256),
  }


def test_a_record_of_this_machines_devices():
  """The same function, with the compiler of this CPU."""
  config = made_plans.config(fsdp=8)
  config.model.dtype = 'float32'  # XLA:CPU cannot scatter sums in 16 bits
  topology = chips.find('v5e-8')
  found = estimate.update(config, topology, made_plans.devices())
  assert found['fits']
  assert found['refusal'] == ''
  assert found['mesh'] == {'fsdp': 8}
  assert found['devices'] == 8
  assert found['note'] == estimate.HONEST
  assert found['memory']['limit'] == 15.75 * 2**30
  assert found['memory']['compiled'] > found['memory']['parameters']
  assert found['tokens_per_second'] * found['seconds'] == pytest.approx(8 * 16)
  kinds = {one['kind'] for one in found['collectives']}
  assert {'all-gather', 'reduce-scatter'} <= kinds


def test_the_compilers_version_is_told(monkeypatch):
  monkeypatch.setattr('importlib.metadata.version', lambda name: f'of {name}')
  monkeypatch.setattr('importlib.util.find_spec', lambda name: name)
  assert programs.version() == 'jax of jax, libtpu of libtpu'
