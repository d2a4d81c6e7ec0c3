"Every notebook runs through papermill at profile smoke, all in one temporary home."
import json
import os
from pathlib import Path

import pytest

from lthash.experiments.jobs import notebook_paths
from lthash.experiments.notebooks import execute, read_cells, tagged_cells

ROOT = Path(__file__).parents[2]
NOTEBOOKS = notebook_paths(ROOT/'nbs', index=True)      # papers first: they take longest
SUFFIXES = {'figure': ('png', 'svg'), 'table': ('csv', 'md')}


def name(notebook: Path) -> str:
    return notebook.relative_to(ROOT/'nbs').with_suffix('').as_posix()


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 60 and len({name(p) for p in NOTEBOOKS}) == len(NOTEBOOKS)


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=name)
def test_notebook(notebook, lthash_home, monkeypatch):
    monkeypatch.setenv('TQDM_DISABLE', '1')
    monkeypatch.setenv('MPLBACKEND', 'module://matplotlib_inline.backend_inline')
    out = lthash_home/'reports'
    parameters = {'profile': 'smoke', 'out': str(out)} if tagged_cells(read_cells(notebook)) else {}
    error = execute(notebook, lthash_home/'executed'/f'{name(notebook)}.ipynb', parameters, ROOT)
    assert error is None, (f"{name(notebook)}, cell {error['cell']} ({error['source']}): {error['message']}\n"
                           f"{error['traceback']}")
    left = out/'artefacts'/f'{name(notebook)}.json'
    if left.exists():     # what it registered is there, and was made at this profile
        left = json.loads(left.read_text(encoding='utf-8'))
        assert left['profile'] == 'smoke'
        for item in left['items']:
            for suffix in SUFFIXES[item['kind']]:
                assert os.path.getsize(out/f"{item['kind']}s"/f"{item['name']}.{suffix}") > 0
            assert item['caption'].strip(), f"{item['name']} has no caption"
