"Files that are whole or absent, folders, seeds and digests."
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from lthash.core import runtime
from lthash.core.runtime import (
    atomic_write,
    check_profile,
    data_dir,
    derive_seed,
    device,
    device_name,
    digest,
    home,
    project_data,
    runs_dir,
    seed_everything,
    seeded,
    versions,
    weights_dir,
    write_json,
)


def test_files_are_written_from_text_bytes_and_functions(tmp_path):
    assert atomic_write(tmp_path/'new'/'a.txt', 'é').read_text(encoding='utf-8') == 'é'
    assert atomic_write(tmp_path/'b.bin', b'\x00\xff').read_bytes() == b'\x00\xff'
    assert atomic_write(str(tmp_path/'c.npy'), lambda p: np.save(p, np.arange(3))).stat().st_mode & 0o777 == 0o644
    assert json.loads(write_json(tmp_path/'d.json', {'path': Path('x'), 'word': 'ä'}).read_text()) == {
        'path': 'x', 'word': 'ä'}
    assert np.load(tmp_path/'c.npy').tolist() == [0, 1, 2]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = atomic_write(tmp_path/'a.txt', 'whole')

    def half(temporary: Path) -> None:
        temporary.write_text('ha')
        raise OSError('disk full')
    with pytest.raises(OSError, match='disk full'):
        atomic_write(path, half)
    assert path.read_text() == 'whole' and list(tmp_path.iterdir()) == [path]


KILLED = '''
import sys
from lthash.core.runtime import atomic_write
def slow(temporary):
    with open(temporary, 'w') as file:
        file.write('half')
        file.flush()
        print('writing', flush=True)
        sys.stdin.read()
atomic_write(sys.argv[1], slow)
'''


def test_a_killed_write_leaves_the_old_file(tmp_path, root):
    path = atomic_write(tmp_path/'a.txt', 'whole')
    process = subprocess.Popen([sys.executable, '-c', KILLED, str(path)], cwd=root, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == b'writing\n'
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert path.read_text() == 'whole'


def test_home_is_the_clone_unless_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv('LTHASH_HOME', str(tmp_path/'here'))
    assert home() == (tmp_path/'here').resolve() and runs_dir() == home()/'runs'
    monkeypatch.delenv('LTHASH_HOME')
    (tmp_path/'clone'/'nbs'/'core').mkdir(parents=True)
    monkeypatch.chdir(tmp_path/'clone'/'nbs'/'core')
    (tmp_path/'clone'/'settings.ini').touch()
    assert home() == tmp_path/'clone'


def test_folders_are_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv('LTHASH_DATA', str(tmp_path/'data'))
    monkeypatch.setenv('LTHASH_WEIGHTS', '~/weights')
    assert data_dir() == tmp_path/'data' and weights_dir() == Path.home()/'weights'
    assert project_data().is_dir()


def test_profiles_are_checked():
    assert [check_profile(p) for p in runtime.PROFILES] == ['smoke', 'cpu', 'real', 'paper']
    with pytest.raises(ValueError, match="smoke, cpu, real, paper; found 'fast'"):
        check_profile('fast')


@dataclass(frozen=True)
class Config:
    a: int = 1
    b: str = 'x'


def test_digests_are_of_values_and_the_same_on_every_machine():
    assert digest({'a': 1, 'b': 'x'}) == digest({'b': 'x', 'a': 1}) == digest(Config()) != digest(Config(2))
    assert digest([1]) != digest([1.]) and len(digest('x', 4)) == 8
    assert derive_seed('order', 0, 3) == derive_seed('order', 0, 3) != derive_seed('order', 3, 0)
    assert derive_seed('order', 0, 3) == int(digest(['order', 0, 3]), 16) >> 1
    assert 0 <= derive_seed() < 2**63


def test_seeds_reach_every_generator():
    def draws():
        return random.random(), float(np.random.rand()), float(torch.rand(()))
    seed_everything('test', 1)
    first = draws()
    assert seed_everything('test', 1) == derive_seed('test', 1) and draws() == first
    seed_everything('test', 2)
    assert all(a != b for a, b in zip(draws(), first))


def test_seeded_draws_repeat_and_leave_the_state_alone():
    state = torch.get_rng_state()
    with seeded(3):
        a = torch.rand(4)
    with seeded(3):
        assert torch.equal(torch.rand(4), a)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ZeroDivisionError), seeded(3):
        torch.rand(1)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), state)


def test_devices_are_named(monkeypatch):
    assert device('meta') == torch.device('meta')
    monkeypatch.setenv('LTHASH_DEVICE', 'cpu')
    assert device().type == 'cpu' and device_name() == device_name(torch.device('cpu'))
    assert device_name().startswith('CPU, ') and ('threads' in device_name()) == (torch.get_num_threads() > 1)


def test_versions_name_what_can_change_a_number():
    assert list(versions()) == ['lthash', 'python', 'torch', 'torchvision', 'numpy']
    assert versions()['torch'] == torch.__version__ and os.fspath(project_data())
