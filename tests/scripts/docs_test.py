"""What `docs/` tells people to type exists, and is what it says it is."""

import argparse
import pathlib
import re
import subprocess

import pytest

from tpu_lm import cli, options
from tpu_lm import config as configs

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted((ROOT / 'docs').glob('*.md'))
# Commands that pages may name before they are there.
AWAITED = {'plan'}


def lines_of(page: pathlib.Path) -> list[str]:
  """The commands of a page, each with the exports before it, a line each."""
  found, exports = [], ''
  for block in re.findall(r'^```sh\n(.*?)^```', page.read_text(), re.M | re.S):
    for line in block.replace('\\\n', ' ').splitlines():
      if line.startswith('export '):
        exports += f'{line}\n'
      elif line.strip():
        found.append(exports + line)
  return found


def command_of(line: str) -> str:
  """Without the exports."""
  return line.rpartition('\n')[2]


def typed(pattern: str) -> list:
  """Every shell line of the pages whose command begins like that."""
  return [
    pytest.param(line, id=f'{page.stem}: {command_of(line)[:50]}')
    for page in PAGES
    for line in lines_of(page)
    if re.match(pattern, command_of(line))
  ]


def words_of(line: str) -> list[str]:
  """The words that a shell makes of a line."""
  exports = line.removesuffix(command_of(line))
  script = f'set -f\n{exports}printf "%s\\0" {command_of(line)}'
  told = subprocess.run(
    ['bash', '-c', script], capture_output=True, text=True, check=True
  )
  return told.stdout.split('\0')[:-1]


def subparsers() -> dict:
  return cli.make_parser()._subparsers._group_actions[0].choices


def check_command(words: list[str]) -> None:
  """Parses a command of tpu_lm, and its configuration with all overrides."""
  assert words[0] == 'tpu_lm'
  if words[1] in AWAITED - set(subparsers()):
    return
  rest, overrides = cli.split_overrides(words[1:])
  args = cli.make_parser().parse_args(rest)
  if getattr(args, 'config', ''):
    spec = args.config.removeprefix('tpu_lm_repository/')
    configs.load(str(ROOT / spec), overrides)
  else:
    assert not overrides


def test_there_are_pages():
  assert {page.name for page in PAGES} >= {'tpu.md', 'colab.md'}
  assert len(typed('bash scripts/tpu/tpu.sh')) >= 15
  assert len(typed('bash scripts/tpu/xpk.sh')) >= 6
  assert len(typed('tpu_lm ')) >= 5


@pytest.mark.parametrize('line', typed('bash scripts/tpu/'))
def test_a_script_is_called_as_it_can_be(line):
  dry = re.sub(r'(scripts/tpu/\w+\.sh [\w-]+)', r'\1 --dry-run', line)
  done = subprocess.run(
    ['bash', '-c', dry], capture_output=True, text=True, cwd=ROOT, check=False
  )
  assert done.returncode == 0, done.stderr
  assert re.match(r'(gcloud|xpk|mkdir) ', done.stdout)
  words = words_of(line)
  if '--' in words:
    check_command(words[words.index('--') + 1 :])


@pytest.mark.parametrize('line', typed('tpu_lm '))
def test_a_command_is_called_as_it_can_be(line):
  check_command(words_of(line))


@pytest.mark.parametrize('line', typed('(?!bash scripts/tpu/|tpu_lm )'))
def test_of_other_programs_there_are_few(line):
  words = words_of(line)
  assert words[0] in ('bash', 'git', 'pip')
  if words[0] == 'bash':
    assert (ROOT / words[1]).exists()


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_what_the_prose_names_exists(page):
  known = subparsers()
  text = page.read_text()
  for command, rest in re.findall(r'`!?tpu_lm (\w+)([^`]*)`', text):
    if command in AWAITED - set(known):
      continue
    assert command in known, command
    for flag in re.findall(r'--[\w.]+', rest):
      is_known = flag in known[command]._option_string_actions
      assert is_known or flag.startswith('--config.'), f'{command} {flag}'
  for key in re.findall(r'`--config\.([\w.]+)', text):
    assert key in configs.flatten(configs.base()), key
  help_text = (ROOT / 'scripts/tpu/tpu.sh').read_text()
  help_text += (ROOT / 'scripts/tpu/xpk.sh').read_text()
  for flag in re.findall(r'`(--[a-z-]+)=?[^`]*`', text):
    assert flag in help_text or flag in ('--config', '--coordinator'), flag


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page):
  for target in re.findall(r'\]\(([^)#]+)', page.read_text()):
    if not re.match(r'https?://', target):
      assert (page.parent / target).exists(), target


def test_a_page_says_what_a_workdir_on_a_bucket_does():
  """The warning stands as long as it is true, and no longer."""
  with pytest.raises(argparse.ArgumentTypeError, match='cloud storage'):
    options.path('gs://bucket/run')
  page = (ROOT / 'docs/tpu.md').read_text()
  assert 'cannot keep a working directory on `gs://`' in page
  assert not re.search(r'WORKDIR=(\$BUCKET|gs:)', page)
