"What every test relies on: a home of its own, so that no test writes into the clone, and figures without a screen."
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ['MPLBACKEND'] = 'agg'


@pytest.fixture(scope='session', autouse=True)
def lthash_home(tmp_path_factory):
    "`$LTHASH_HOME` for the whole session, kernels and child processes included."
    before = os.environ.get('LTHASH_HOME')
    folder = tmp_path_factory.mktemp('home')
    os.environ['LTHASH_HOME'] = str(folder)
    yield folder
    os.environ.pop('LTHASH_HOME')
    if before is not None: os.environ['LTHASH_HOME'] = before


@pytest.fixture(scope='session')
def root() -> Path:
    "The clone."
    return ROOT
