"""Every notebook runs from top to bottom."""

import pathlib

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / 'notebooks'


# The kernel's own libraries warn about themselves.
@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('path', sorted(FOLDER.glob('*.ipynb')), ids=str)
def test_runs(path, tmp_path):
  notebook = nbformat.read(path, as_version=4)
  assert not any(cell.get('outputs') for cell in notebook.cells), (
    'committed without outputs'
  )
  nbclient.NotebookClient(
    notebook, timeout=300, resources={'metadata': {'path': str(FOLDER)}}
  ).execute()
  errors = [
    output
    for cell in notebook.cells
    for output in cell.get('outputs', [])
    if output.output_type == 'error'
  ]
  assert not errors
