import importlib.metadata

from tpu_lm import __version__, cli, doctor


def test_it_tells_devices_versions_and_what_to_mend(capsys):
  assert cli.main(['doctor']) == 0
  told = capsys.readouterr().out
  assert f'tpu_lm {__version__}' in told
  assert '8 cpu device(s)' in told
  for package in doctor.REQUIRED:
    assert importlib.metadata.version(package) in told
  for package, extra, _ in doctor.OPTIONAL:
    line = next(
      one for one in told.splitlines() if one.startswith(f'  {package} ')
    )
    if doctor.version(package) is None:
      assert f"pip install 'tpu_lm[{extra}]'" in line
    else:
      assert doctor.version(package) in line
  assert told.rstrip().endswith('To mend\n  nothing')


def test_a_package_that_is_not_there_has_no_version():
  assert doctor.version('no-such-package-anywhere') is None


def test_the_extras_it_names_are_those_of_setup():
  with open('setup.py', encoding='utf-8') as file:
    setup = file.read()
  for _, extra, _ in doctor.OPTIONAL:
    assert f"'{extra}':" in setup, extra
