import itertools

import made_plans
import pytest

from tpu_lm.models import remat
from tpu_lm.plan import chips, estimate, search

EIGHT = chips.find('v5e-8')
V5E = EIGHT.chip


def config(**given):
  """Of which nothing is given that the search would vary."""
  made = made_plans.config(fsdp=8)
  made.update(given)
  return made


def meshes(given, topology=EIGHT):
  """Sizes of data, fsdp, tensor, sequence and expert that are tried."""
  found = search.candidates(given, topology)
  return {
    tuple(n for key, n in one.items() if key.startswith('mesh.'))
    for one in found
  }


def ranked(given, topology=EIGHT):
  return search._ranked(given, topology, made_plans.devices())


def test_all_meshes_of_eight_chips_are_tried():
  assert meshes(config()) == {
    (8 // fsdp // tensor, fsdp, tensor, 1, 1)
    for fsdp in (1, 2, 4, 8)
    for tensor in (1, 2, 4, 8)
    if fsdp * tensor <= 8
  }


def test_data_spans_the_slices():
  found = meshes(config(batch_size=16), chips.find('2xv5e-8'))
  alone = meshes(config(batch_size=16))
  assert found == {(2 * data, *rest) for data, *rest in alone}


def test_large_pods_keep_fsdp_to_whole_rings_and_256():
  found = meshes(config(batch_size=1024), chips.find('v5p-2048'))
  alone = {mesh[:2] for mesh in found if mesh[2:] == (1, 1, 1)}
  assert alone == {(64, 16), (32, 32), (16, 64), (8, 128), (4, 256)}


def test_long_rows_may_be_shared_out_and_experts_too():
  made = config()
  made.data.length = 16_384
  assert (1, 4, 1, 2, 1) in meshes(made)
  made = config()
  made.model.num_experts = 4
  found = meshes(made)
  assert (1, 2, 1, 1, 4) in found
  assert not any(mesh[4] == 8 for mesh in found)  # of four experts


def test_rows_and_their_parts_are_divided_evenly():
  for one in search.candidates(config(batch_size=24), EIGHT):
    parts = one['mesh.data'] * one['mesh.fsdp'] * one['mesh.expert']
    assert 24 % (parts * one['microbatches']) == 0
  # 12 rows cannot be divided by 8.
  assert (1, 8, 1, 1, 1) not in meshes(config(batch_size=12))
  assert (1, 4, 2, 1, 1) in meshes(config(batch_size=12))


def test_every_policy_and_chunk_is_tried():
  made = config()
  made.data.length = 1024
  found = list(search.candidates(made, EIGHT))
  assert {one['model.remat'] for one in found} == set(remat.POLICIES)
  assert {one['model.loss_chunk'] for one in found} == {0, 512}  # of 1024


def test_heads_that_a_mesh_does_not_divide_are_left_out():
  found, count = ranked(config())
  tensors = {given['mesh.tensor'] for _, given in found}
  assert tensors == {1, 2}  # of two key-value heads
  assert count == len(list(search.candidates(config(), EIGHT)))
  assert len(found) < count


def test_what_does_not_fit_is_left_out():
  small = EIGHT._replace(chip=EIGHT.chip._replace(memory=90_000 / 0.97))
  found, _ = ranked(config(), small)
  kept = {(given['model.remat'], given['microbatches']) for _, given in found}
  less = ('full', 'offload', 'attention', 'qkv')
  assert kept == {*itertools.product(less, (1, 2)), ('dots', 2)}
  nothing = EIGHT._replace(chip=EIGHT.chip._replace(memory=1e3))
  assert ranked(config(), nothing)[0] == []


def large():
  """Wide enough for products to count."""
  made = config(batch_size=64)
  made.data.length = 4096
  made.data.vocab_size = 32_000
  made.model.update(
    num_layers=16,
    dim=2048,
    num_heads=16,
    num_kv_heads=8,
    hidden_dim=5632,
  )
  return made


def test_the_fastest_comes_first_and_keeps_most():
  found, _ = ranked(large())
  seconds = [taken for taken, _ in found]
  assert seconds == sorted(seconds)
  # Tensor parallelism waits for sums of activations; more microbatches gather
  # again; what is kept is not made again.
  best = found[0][1]
  assert (best['mesh.fsdp'], best['mesh.tensor']) == (8, 1)
  same = [
    (taken, given)
    for taken, given in found
    if given['mesh.tensor'] == 1 and given['microbatches'] == 8
  ]
  by_policy = {given['model.remat']: taken for taken, given in reversed(same)}
  order = ('none', 'dots', 'qkv', 'attention', 'full')
  kept = [by_policy[name] for name in order if name in by_policy]
  assert len(kept) >= 3
  assert kept == sorted(kept)
  full = {
    given['microbatches']: taken
    for taken, given in found
    if given['mesh.tensor'] == 1 and given['model.remat'] == 'full'
  }
  assert list(full) == sorted(full)  # fewest first


def test_slices_cost_a_sum_over_the_network_between_them():
  mesh = {'mesh.data': 2, 'mesh.fsdp': 4}
  parts = search._parts(search.varied(large(), mesh), made_plans.devices())
  one = search.guessed(large(), EIGHT, parts)
  two = search.guessed(large(), chips.find('2xv5e-4'), parts)
  own = 2 * 886_000_000 / 4  # bfloat16
  more = own / V5E.slices - own / (2 * V5E.link)
  assert two - one == pytest.approx(more, rel=0.1)


def test_the_best_few_are_compiled(monkeypatch):
  asked, told = [], []

  def update(config, topology, devices):
    asked.append((config.mesh.fsdp, config.model.remat, config.microbatches))
    speed = {2: 3e6, 3: 5e6}.get(len(asked), 1e6)
    return made_plans.record(fits=len(asked) != 1, tokens_per_second=speed)

  monkeypatch.setattr(estimate, 'update', update)
  given = config()
  found = search.search(given, EIGHT, made_plans.devices(), 4, told.append)
  assert len(asked) == len(set(asked)) == 4
  assert [one['tokens_per_second'] for one in found] == [5e6, 3e6, 1e6]
  assert found[0]['overrides']['model.remat'] == asked[2][1]
  assert len(told) == 1 + 4
  assert 'does not fit' in told[1]
  assert 'MFU 12.3%' in told[2]
  assert given.mesh.fsdp == 8  # the configuration itself is not changed
  assert given.model.remat == 'full'
