import json

import made_plans
import pytest
import tiny
from html_page import Page

from tpu_lm.errors import UserError
from tpu_lm.plan import command, estimate, files, stages, topology

WIDE = [('mesh.data', '1'), ('mesh.fsdp', '8')]


@pytest.fixture
def spec(tmp_path):
  """A small file of configs/."""
  source = tiny.write_text(tmp_path / 'text.txt')
  path = tmp_path / 'mine.py'
  path.write_text(tiny.CONFIG.format(source=str(source)))
  return str(path)


@pytest.fixture
def here(monkeypatch):
  """The devices of this machine stand for those of any topology."""
  monkeypatch.setattr(topology, 'devices', lambda one: made_plans.devices())


@pytest.fixture
def estimated(here, monkeypatch):
  """Records without a compilation; fits: whether each does."""
  fits = {'v5e-8': True, 'v5e:2x4': False}

  def update(config, one, devices):
    return made_plans.record(fits[one.name], topology=one.name)

  monkeypatch.setattr(estimate, 'update', update)
  monkeypatch.setattr(stages, 'others', lambda *rest: [])


def test_a_plan_is_printed_and_kept_beside_the_configuration(
  here, spec, tmp_path, capsys
):
  assert command.plan(spec, WIDE, ['v5e-8'], price=2.0)
  said = capsys.readouterr().out
  assert 'v5e-8: compiling for 8 devices' in said
  assert said.count('v5e-8  ') == 1
  folder = tmp_path / 'mine.plan'
  assert f'kept in {folder}' in said
  record = json.loads((folder / 'v5e-8.json').read_text())
  assert record['fits']
  assert record['config'] == spec
  assert record['overrides'] == dict(WIDE)
  assert record['price'] == pytest.approx(2 * record['chip_hours'])
  assert record['memory']['compiled'] > 0
  assert record['timeline'] == [] or record['timeline'][0]['seconds'] > 0
  assert files.read(folder, 'v5e-8') == record
  assert files.read(folder, 'v5e-16') is None
  page = Page((folder / 'v5e-8.html').read_text())
  assert f'PLAN of {spec} on v5e-8' in page.text


def test_whether_all_fit_is_told(estimated, spec, tmp_path, capsys):
  to = tmp_path / 'plans'
  assert command.plan(spec, [], ['v5e-8'], to=to, price=1.0)
  assert not command.plan(spec, [], ['v5e-8', 'v5e:2x4'], to=to, price=1.0)
  assert 'total memory required' in capsys.readouterr().out
  names = {path.name for path in to.iterdir()}
  assert names == {
    'v5e-8.json', 'v5e-8.html', 'v5e_2x4.json', 'v5e_2x4.html',
  }  # fmt: skip
  refused = files.read(to, 'v5e:2x4')
  assert 'price' not in refused
  assert files.read(to, 'v5e-8')['price'] == 24_576.0


def test_what_cannot_be_is_said_before_anything_is_compiled(
  estimated, spec, tmp_path, capsys, monkeypatch
):
  file = tmp_path / 'file'
  file.touch()
  for to in (file, file / 'sub'):
    with pytest.raises(UserError, match=f'--to={to}: {file} is a file'):
      command.plan(spec, [], ['v5e-8'], to=to)
  experts = [('model.num_experts', '6'), ('mesh.expert', '4')]
  with pytest.raises(UserError, match=r'mesh\.expert=4: does not divide'):
    command.plan(spec, experts, ['v5e-8'])
  odd = [('batch_size', '9')]
  monkeypatch.setattr(
    topology, 'devices', lambda one: made_plans.devices(one.size)
  )
  with pytest.raises(UserError, match='batch_size'):
    command.plan(spec, odd, ['v5e-1', 'v5e-8'])
  assert 'compiling' not in capsys.readouterr().out
  assert not (tmp_path / 'mine.plan').exists()


def test_a_search_that_finds_nothing_says_what_to_change(
  estimated, spec, monkeypatch
):
  monkeypatch.setattr(command.search, 'search', lambda *rest: [])
  with pytest.raises(UserError, match=r'v5e-8: nothing .* batch_size'):
    command.plan(spec, [], ['v5e-8'], tries=2)


def test_the_best_of_a_search_is_kept_with_its_overrides(
  estimated, spec, monkeypatch, tmp_path
):
  found = [made_plans.record(overrides={'mesh.fsdp': n}) for n in (4, 8)]
  planned = []
  monkeypatch.setattr(command.search, 'search', lambda *rest: found)
  monkeypatch.setattr(
    stages, 'others', lambda config, *rest: planned.append(config) or []
  )
  command.plan(spec, [('seed', '3')], ['v5e-8'], tries=2)
  record = files.read(tmp_path / 'mine.plan', '2xv5e-256')
  assert record['overrides'] == {'mesh.fsdp': 4, 'seed': '3'}
  assert planned[0].mesh.fsdp == 4  # nor are the other programs another run's


def test_a_variant_has_its_own_folder():
  assert str(files.beside('configs/a.py')) == 'configs/a.plan'
  assert str(files.beside('configs/a.py:tiny')) == 'configs/a_tiny.plan'


@pytest.mark.parametrize(
  ('names', 'overrides', 'message'),
  [
    (['v5e-9'], WIDE, r'--topology=v5e-9: unknown.* v5e-8'),
    (['v5e-8', 'x'], WIDE, r'--topology=x: unknown'),  # before any compilation
    (['v5e-8'], [('mesh.data', '3')], r'mesh\.data x mesh\.fsdp = 3'),
    (['v5e-8'], [*WIDE[:1], ('mesh.fsdp', '16')], r'fsdp=16 needs 16 devices'),
    (
      ['v5e-8'],
      [('mesh.data', '2'), ('mesh.tensor', '4')],
      r'mesh\.tensor=4: does not divide the 2 heads',
    ),
    (['v5e-8'], [*WIDE, ('batch_size', '12')], r'batch_size=12: 12 rows'),
    (
      ['v5e-8'],
      [('mesh.data', '2'), ('mesh.sequence', '3')],
      r'data\.length=16: .*mesh\.sequence=3',
    ),
    (['v5e-8'], [('learning_rate', '1')], r'learning_rate'),
  ],
)
def test_mistakes_name_what_to_change(here, spec, names, overrides, message):
  with pytest.raises(UserError, match=message):
    command.plan(spec, overrides, names)
