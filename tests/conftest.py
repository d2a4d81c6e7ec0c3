"One temporary home for the whole run, so that no test writes into the clone, and figures without a screen."
import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ['MPLBACKEND'] = 'agg'
os.environ.setdefault('OMP_NUM_THREADS', '1')       # the tests run in parallel, one core each

if 'PYTEST_XDIST_WORKER' not in os.environ:         # workers inherit it: what one has computed, the others read
    os.environ['LTHASH_HOME'] = tempfile.mkdtemp(prefix='lthash-tests-')
    atexit.register(shutil.rmtree, os.environ['LTHASH_HOME'], ignore_errors=True)


@pytest.fixture(scope='session')
def lthash_home() -> Path:
    "`$LTHASH_HOME` of all workers, kernels and child processes."
    return Path(os.environ['LTHASH_HOME'])


@pytest.fixture(scope='session')
def root() -> Path:
    "The clone."
    return ROOT
