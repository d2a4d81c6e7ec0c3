"Every notebook runs through papermill at profile smoke, in order, in one temporary home."
import json
import os

import pytest
from conftest import ROOT
from lthash.notebooks import execute, read_cells, tagged_cells

NOTEBOOKS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb')) + sorted((ROOT/'nbs').glob('index.ipynb'))


def test_there_are_notebooks(): assert len(NOTEBOOKS) >= 10


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(notebook, lthash_home, monkeypatch):
    monkeypatch.setenv('TQDM_DISABLE', '1')
    monkeypatch.setenv('MPLBACKEND', 'module://matplotlib_inline.backend_inline')
    out = lthash_home/'reports'
    parameters = {'profile': 'smoke', 'out': str(out)} if tagged_cells(read_cells(notebook)) else {}
    error = execute(notebook, lthash_home/'executed'/notebook.name, parameters, ROOT)
    assert error is None, f"{notebook.name}, cell {error['cell']} ({error['source']}): {error['message']}\n{error['traceback']}"
    left = out/'artefacts'/f'{notebook.stem}.json'
    if left.exists():     # what it registered is there, and was made at the profile asked for
        left = json.loads(left.read_text(encoding='utf-8'))
        assert left['profile'] == 'smoke'
        for item in left['items']:
            for suffix in {'figure': ('png', 'svg'), 'table': ('csv', 'md')}[item['kind']]:
                assert os.path.getsize(out/f"{item['kind']}s"/f"{item['name']}.{suffix}") > 0
            assert item['caption'].strip(), f"{item['name']} has no caption"
