"""Every notebook runs from top to bottom, as it is committed."""

import pathlib

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / 'notebooks'
NAMES = ('pretrain', 'finetune', 'reinforce')


def test_no_notebook_is_left_out():
  assert {path.stem for path in FOLDER.glob('*.ipynb')} == set(NAMES)


# They take minutes; .ci/run runs them apart.
@pytest.mark.slow
# The kernel's own libraries warn about themselves.
@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('name', NAMES)
def test_runs(name, monkeypatch):
  monkeypatch.setenv('MPLBACKEND', 'Agg')  # draws, and shows nothing
  notebook = nbformat.read(FOLDER / f'{name}.ipynb', as_version=4)
  assert not any(cell.get('outputs') for cell in notebook.cells), (
    'committed without outputs'
  )
  code = [cell.source for cell in notebook.cells if cell.cell_type == 'code']
  scales = [line for line in '\n'.join(code).split('\n') if 'SCALE = ' in line]
  assert all("'small'  #" in line for line in scales)
  # Raises at the first cell that fails.
  nbclient.NotebookClient(
    notebook, timeout=300, resources={'metadata': {'path': str(FOLDER)}}
  ).execute()
