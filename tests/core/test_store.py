"Identity by code: what counts, what does not, how far names are followed; and results that are computed once."
import functools
import importlib
import json
import linecache
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest

from lthash.core import store
from lthash.core.store import Registry, cached, code_digest, stage_folder

TOY = {
    '__init__': '',
    'constants': '''
        SCALE = 2
        UNUSED = 3
    ''',
    'inner': '''
        from . import constants
        from .constants import SCALE

        def helper(x):
            "Scaled."
            return SCALE*x            # a comment

        def other(x):
            return constants.UNUSED*x
    ''',
    'outer': '''
        from dataclasses import dataclass
        from lthash.core.store import Registry
        from .inner import helper, other

        class Base:
            def step(self, x):
                return helper(x)

        class Model(Base):
            def run(self, x):
                return self.step(x)

        def entry(x):
            return x + 1

        TABLE: Registry[str, object] = {'entry': entry, 'helper': helper}
        PLAIN = {'entry': entry}

        def by_name(name, x):
            return TABLE[name](x)

        def by_plain_table(name, x):
            return PLAIN[name](x)

        def independent(x):
            return x

        @dataclass(frozen=True)
        class Entry:
            make: object
            size: int = 32
    ''',
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A function that gives the module `outer` of a small package, after a change of its source."
    folder = tmp_path/'toy'
    folder.mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    def load(module: str = 'outer', before: str = '', after: str = ''):
        for name, text in TOY.items():
            text = textwrap.dedent(text)
            if name == module and before:
                assert before in text
                text = text.replace(before, after)
            (folder/f'{name}.py').write_text(text, encoding='utf-8')
        for name in [m for m in sys.modules if m.split('.')[0] == 'toy']:
            del sys.modules[name]
        importlib.invalidate_caches()
        store._source.cache_clear()
        return importlib.import_module('toy.outer')
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    yield load
    for name in [m for m in sys.modules if m.split('.')[0] == 'toy']:
        del sys.modules[name]
    store._source.cache_clear()


def changes(toy, objects, module: str, before: str, after: str) -> bool:
    "Does a change of a module's source change the digest of `objects(outer)`?"
    first = code_digest(*objects(toy()))
    assert code_digest(*objects(toy())) == first
    return code_digest(*objects(toy(module, before, after))) != first


def test_comments_docstrings_and_layout_do_not_count(toy):
    for before, after in (('"Scaled."', '"Other words."'), ('    "Scaled."\n', ''), ('   # a comment', ''),
                          ('SCALE*x', '(SCALE *\n            x)')):
        assert not changes(toy, lambda m: [m.Model], 'inner', before, after)


def test_code_two_modules_away_counts(toy):
    assert changes(toy, lambda m: [m.Model], 'inner', 'SCALE*x', 'SCALE + x')
    assert changes(toy, lambda m: [m.Model], 'outer', 'return helper(x)', 'return helper(x) + 1')     # a base class


def test_constants_are_followed_and_only_those_that_are_used(toy):
    assert changes(toy, lambda m: [m.Model], 'constants', 'SCALE = 2', 'SCALE = 4')
    assert not changes(toy, lambda m: [m.Model], 'constants', 'UNUSED = 3', 'UNUSED = 4')
    assert changes(toy, lambda m: [m.other], 'constants', 'UNUSED = 3', 'UNUSED = 4')                 # module.NAME


def test_what_is_not_used_does_not_count(toy):
    assert not changes(toy, lambda m: [m.independent], 'outer', 'return x + 1', 'return x + 2')
    assert not changes(toy, lambda m: [m.Model], 'outer', 'return TABLE[name](x)', 'return TABLE[name](x) + 1')


def test_registries_are_not_followed_and_other_tables_are(toy):
    change = 'outer', 'return x + 1', 'return x + 2'
    assert not changes(toy, lambda m: [m.by_name], *change)
    assert changes(toy, lambda m: [m.by_name, m.TABLE['entry']], *change)          # the entry that is used
    assert not changes(toy, lambda m: [m.by_name, m.TABLE['helper']], *change)
    assert changes(toy, lambda m: [m.by_plain_table], *change)
    more = 'outer', "'helper': helper}", "'helper': helper, 'new': Base}"
    assert not changes(toy, lambda m: [m.by_name, m.TABLE['entry']], *more)        # another entry invalidates nothing


def test_partials_and_dataclasses_count_with_their_values_and_their_code(toy):
    def partial(m):
        return [functools.partial(m.entry, 1)]

    def entry(m):
        return [m.Entry(m.entry, 32)]
    for objects in (partial, entry):
        assert changes(toy, objects, 'outer', 'return x + 1', 'return x + 2')
        assert not changes(toy, objects, 'outer', 'return helper(x)', 'return 0')
    outer = toy()
    assert len({code_digest(functools.partial(outer.entry, *a)) for a in ((), (1,), (2,))}) == 3
    assert code_digest(functools.partial(outer.entry, x=1)) != code_digest(functools.partial(outer.entry, 1))
    assert code_digest(outer.Entry(outer.entry)) != code_digest(outer.Entry(outer.entry, 64))
    assert code_digest(outer.Entry(outer.entry)) != code_digest(outer.Entry(outer.helper))


def test_plain_values_count():
    values = (None, 1, 1., '1', b'1', True, [1], {'a': 1}, {'a': 2}, [[1], 2], [1, [2]])
    assert len({code_digest(v) for v in values}) == len(values)
    assert code_digest([1, 2]) == code_digest((1, 2)) and code_digest({'a': 1, 'b': 2}) == code_digest({'b': 2, 'a': 1})


def cell(text: str, number: int) -> dict:
    "What a notebook's cell defines; its source is known to `linecache`, as Jupyter's is."
    file, namespace = f'<cell {number}>', {'__name__': '__main__'}
    linecache.cache[file] = len(text), None, text.splitlines(True), file
    exec(compile(text, file, 'exec'), namespace)
    return namespace


def test_lambdas_and_functions_of_a_notebook_count_by_their_source():
    one = lambda x: x + 1
    two = lambda x: x + 2
    assert code_digest(one) == code_digest(one) != code_digest(two)
    cells = [cell(f'def f(x):\n    return x + {n}\n', n) for n in (1, 2)]
    assert code_digest(cells[0]['f']) == code_digest(cells[0]['f']) != code_digest(cells[1]['f'])


def test_classes_of_a_notebook_count_by_their_source():
    cells = [cell(f'class A:\n    def f(self, x):\n        return x + {n}\n', n) for n in (1, 2)]
    assert code_digest(cells[0]['A']) == code_digest(cells[0]['A']) != code_digest(cells[1]['A'])


def test_libraries_count_by_name():
    assert code_digest(json.dumps) == code_digest(json.dumps) != code_digest(json.loads)
    assert code_digest(functools.reduce) is not None


def test_a_registry_is_a_dict():
    assert isinstance(Registry(a=1), dict)


# Results that are computed once

@dataclass(frozen=True)
class Config:
    x: int = 3


def test_a_result_is_computed_once_and_read_afterwards(tmp_path, monkeypatch):
    monkeypatch.setenv('LTHASH_HOME', str(tmp_path))
    calls = []

    def compute(folder):
        calls.append(folder)
        return {'value': 9}
    first = cached('toy', Config(), compute)
    assert first['value'] == 9 and first['seconds'] >= 0 and cached('toy', {'x': 3}, compute) == first
    assert calls == [stage_folder('toy', Config())] == [tmp_path/'runs'/'toy'/calls[0].name]
    assert json.loads((calls[0]/'config.json').read_text()) == {'x': 3}
    assert cached('toy', Config(4), lambda folder: {'value': 16, 'seconds': 1.5}) == {'value': 16, 'seconds': 1.5}


def test_a_failed_computation_leaves_no_result(tmp_path, monkeypatch):
    monkeypatch.setenv('LTHASH_HOME', str(tmp_path))

    def fails(folder):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        cached('toy', Config(), fails)
    assert cached('toy', Config(), lambda folder: {'value': 1})['value'] == 1


CONCURRENT = '''
import os, time
from lthash.core.store import cached
def compute(folder):
    with open(folder/'calls', 'a') as file:
        file.write('x')
    time.sleep(.3)
    return {'value': os.getpid()}
print(cached('toy', {'a': 1}, compute)['value'])
'''


def test_processes_that_ask_at_once_compute_once(tmp_path, root):
    environment = {**os.environ, 'LTHASH_HOME': str(tmp_path)}
    started = [subprocess.Popen([sys.executable, '-c', CONCURRENT], cwd=root, env=environment, text=True,
                                stdout=subprocess.PIPE) for _ in range(3)]
    answers = {p.communicate(timeout=120)[0] for p in started}
    calls, = tmp_path.glob('runs/toy/*/calls')
    assert len(answers) == 1 and calls.read_text() == 'x'


def test_a_killed_computation_gives_its_lock_back(tmp_path, root, monkeypatch):
    monkeypatch.setenv('LTHASH_HOME', str(tmp_path))
    script = CONCURRENT.replace('time.sleep(.3)', "print('computing', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, '-c', script], cwd=root, text=True, stdout=subprocess.PIPE)
    assert process.stdout.readline() == 'computing\n'
    process.kill()
    process.communicate()
    assert cached('toy', {'a': 1}, lambda folder: {'value': 1})['value'] == 1
