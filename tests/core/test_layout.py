"""The layout: `nbs/PLACE/NN_name.ipynb` is `lthash.PLACE.name`, and imports point upwards only.

Each rule is a function from notebooks to a list of faults, so that made-up notebooks show that it can fail.
"""
import ast
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = ('core', 'data', 'evaluation', 'models', 'supervised', 'unsupervised', 'diffusion', 'augmentation',
          'search', 'experiments', 'papers', 'cli')
NOTEBOOKS = sorted((ROOT/'nbs').glob('*/[!.]*.ipynb'))
ALL = [*NOTEBOOKS, ROOT/'nbs'/'index.ipynb']

# Questions about objects of other libraries, which have no other way to say what they are: (place, call) -> reason.
THIRD_PARTY = {
    ('experiments', "hasattr(os, 'sched_getaffinity')"): 'the operating system may lack it',
    ('diffusion', "getattr(output, 'pooler_output', None)"): 'outputs of transformers differ by model',
    ('diffusion', "getattr(self.model, 'get_image_features', self.model)"): 'only CLIP has it',
    ('diffusion', "hasattr(self.model, 'get_text_features')"): 'only CLIP has it',
}


def source(cell: dict) -> str:
    "The text of a cell; nbformat stores it as a list of lines or as one string."
    return ''.join(cell['source'])


def parsed(text: str) -> ast.Module:
    "Code of a cell without IPython's magics and shell lines; a cell of a `%%magic` is no Python."
    if text.lstrip().startswith('%%'):
        return ast.parse('')
    return ast.parse('\n'.join(re.sub(r'^(\s*)[%!].*', r'\1pass', line) for line in text.splitlines()))


@dataclass(frozen=True)
class Notebook:
    "A notebook of a place, read and taken apart."
    path: Path

    @property
    def place(self) -> str:
        return self.path.parent.name

    @cached_property
    def number(self) -> int | None:
        found = re.fullmatch(r'(\d\d)_[a-z][a-z0-9_]*', self.path.stem)
        return int(found[1]) if found else None

    @property
    def module(self) -> str:
        return f'{self.place}.{self.path.stem[3:]}'

    @cached_property
    def cells(self) -> list[dict]:
        return json.loads(self.path.read_text(encoding='utf-8'))['cells']

    @cached_property
    def code(self) -> list[tuple[str, bool, ast.Module]]:
        "(text, exported, syntax tree) of every code cell."
        texts = [source(c) for c in self.cells if c['cell_type'] == 'code']
        return [(t, bool(re.search(r'^#\|\s*exports?\b', t, re.M)), parsed(t)) for t in texts]

    @cached_property
    def imports(self) -> list[tuple[str, str]]:
        "(module without `lthash.`, name) of all imports of the package; the name is '' for the module itself."
        found = []
        for _, _, tree in self.code:
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    found += [(a.name.partition('.')[2], '') for a in node.names if a.name.startswith('lthash.')
                              or a.name == 'lthash' and a.asname]      # `import lthash as lh`: all of it
                if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'lthash':
                    inner = node.module.partition('.')[2]
                    found += [(inner, a.name) if '.' in inner else (f'{inner}.{a.name}'.strip('.'), '')
                              for a in node.names if a.name != '__version__']
        return found


def house(paths: list[Path]) -> list[Notebook]:
    "The notebooks at these paths."
    return [Notebook(p) for p in paths]


def misplaced(books: list[Notebook]) -> list[str]:
    "Path, number and export of each notebook: `nbs/PLACE/NN_name.ipynb`, one per number, exports `PLACE.name`."
    faults, taken = [], {}
    for b in books:
        where = f'{b.place}/{b.path.name}'
        if b.place not in PLACES:
            faults.append(f'{where}: there is no place {b.place!r}')
        if b.number is None:
            faults.append(f'{where}: a name is NN_name, two digits and lower case')
            continue
        if (other := taken.setdefault((b.place, b.number), b)) is not b:
            faults.append(f'{where}: has the number of {other.path.name}')
        targets = re.findall(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(t for t, *_ in b.code), re.M)
        if targets != [b.module]:
            faults.append(f'{where}: exports to {targets}, not to {b.module}')
        if not any(exported for _, exported, _ in b.code):
            faults.append(f'{where}: exports nothing')
    return faults


def backward_imports(books: list[Notebook]) -> list[str]:
    "Imports, also of cells that are not exported, of a later place, of a later number or of no module."
    order = {b.module: (PLACES.index(b.place), b.number) for b in books if b.place in PLACES and b.number is not None}
    faults = []
    for b in books:
        for module, _ in b.imports:
            if module not in order:
                faults.append(f'{b.module} imports lthash.{module}, which no notebook exports')
            elif b.module in order and order[module] >= order[b.module]:
                faults.append(f'{b.module} imports {module}, which comes later')
    return sorted(set(faults))


def circles(books: list[Notebook]) -> list[str]:
    "A circle of imports, wherever in the code they stand."
    graph = {b.module: {m for m, _ in b.imports} for b in books}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [' -> '.join(error.args[1])]
    return []


def hidden_imports(books: list[Notebook]) -> list[str]:
    "Imports of the package inside a function, and relative ones."
    faults = []
    for b in books:
        for _, _, tree in b.code:
            inside = {n for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                      for n in ast.walk(f)}
            for node in ast.walk(tree):
                relative = isinstance(node, ast.ImportFrom) and node.level > 0
                own = relative or isinstance(node, (ast.Import, ast.ImportFrom)) and 'lthash' in ast.unparse(node)
                if relative or own and node in inside:
                    faults.append(f'{b.module}: `{ast.unparse(node)}` {"is relative" if relative else "in a function"}')
    return faults


def private_names(books: list[Notebook]) -> list[str]:
    "`from lthash.x import _y`, and `module._y` of an imported module."
    modules = {b.module for b in books}
    faults = []
    for b in books:
        faults += [f'{b.module}: imports {name} of {module}' for module, name in b.imports if name.startswith('_')]
        bound = set()
        for _, _, tree in b.code:
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    bound |= {a.asname or a.name for a in node.names if a.name.startswith('lthash')}
                if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('lthash'):
                    inner = node.module.partition('.')[2]
                    bound |= {a.asname or a.name for a in node.names if f'{inner}.{a.name}' in modules}
        for _, _, tree in b.code:
            for node in ast.walk(tree):
                private = isinstance(node, ast.Attribute) and re.match('_[^_]', node.attr)
                if private and ast.unparse(node.value) in bound:
                    faults.append(f'{b.module}: uses {ast.unparse(node)}')
    return sorted(set(faults))


def questions(books: list[Notebook], allowed: dict = THIRD_PARTY) -> list[str]:
    "`hasattr`, and `getattr` of a fixed name, in exported cells: what an object is, its class says."
    faults = []
    for b in books:
        for _, exported, tree in b.code:
            for node in ast.walk(tree) if exported else ():
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    fixed = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
                    asks = node.func.id == 'hasattr' or node.func.id == 'getattr' and (fixed or len(node.args) > 2)
                    if asks and (b.place, ast.unparse(node)) not in allowed:
                        faults.append(f'{b.module}: {ast.unparse(node)}')
    return faults


def first_cells(books: list[Notebook]) -> list[str]:
    "Title and description, `default_exp`, parameters, then the exported imports; one docstring per module."
    faults = []
    for b in books:
        kinds = [(c['cell_type'], source(c).strip()) for c in b.cells] + [('', '')]*4
        tags = [c['metadata'].get('tags', []) for c in b.cells] + [[]]*4
        if not (kinds[0][0] == 'markdown' and re.match(r'# .+\n+> .+', kinds[0][1])):
            faults.append(f'{b.module}: the first cell is a title and a line `> what it provides`')
        if kinds[1] != ('code', f'#| default_exp {b.module}'):
            faults.append(f'{b.module}: the second cell is `#| default_exp {b.module}` and nothing else')
        if 'parameters' not in tags[2]:
            faults.append(f'{b.module}: the third cell is the one tagged `parameters`')
        code = [text for kind, text in kinds[3:] if kind == 'code']
        if not (code and re.match(r'#\|\s*export', code[0])):
            faults.append(f'{b.module}: after the parameters come the exported imports')
        for text, exported, tree in b.code:
            alone = tree.body[0] if len(tree.body) == 1 else None
            if exported and isinstance(alone, ast.Expr) and isinstance(alone.value, ast.Constant):
                faults.append(f'{b.module}: a second docstring, {text.splitlines()[-1]!r}')
            for name in re.findall(r"\bstart\(['\"]([^'\"]+)['\"], profile", text):
                if name != f'{b.place}/{b.path.stem}':
                    faults.append(f'{b.module}: the report is started as {name!r}')
    return faults


RULES = (misplaced, backward_imports, circles, hidden_imports, private_names, questions, first_cells)


@pytest.mark.parametrize('rule', RULES, ids=lambda r: r.__name__)
def test_the_notebooks_keep_the_rule(rule):
    faults = rule(house(NOTEBOOKS))
    assert not faults, f'{rule.__doc__}\n' + '\n'.join(faults)


def make(folder: Path, name: str, *cells: str, exp: str = '') -> Path:
    "A made-up notebook that keeps all rules if its cells do."
    path = folder/f'{name}.ipynb'
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [f"#| default_exp {exp or path.parent.name + '.' + path.stem[3:]}", 'profile = "cpu"', *cells]
    code = [{'cell_type': 'code', 'metadata': {'tags': ['parameters'] if i == 1 else []}, 'source': t}
            for i, t in enumerate(texts)]
    first = {'cell_type': 'markdown', 'metadata': {}, 'source': '# Title\n\n> What it provides.'}
    path.write_text(json.dumps({'cells': [first, *code]}))
    return path


def faults_of(rule, *paths: Path) -> str:
    "Faults of a rule in made-up notebooks, as one text."
    return '\n'.join(rule(house(list(paths))))


def test_a_good_notebook_has_no_fault(tmp_path):
    base = make(tmp_path, 'data/00_base', '#| export\nimport os')
    book = make(tmp_path, 'models/01_net', '#| export\nfrom lthash.data.base import Split',
                "report = start('models/01_net', profile, out)", '%matplotlib inline\nfrom lthash.data import base',
                '%%bash\nls')
    for rule in RULES:
        assert faults_of(rule, base, book) == '', rule.__name__


def test_misplaced_notebooks_are_found(tmp_path):
    export = '#| export\nimport os'
    assert "no place 'extra'" in faults_of(misplaced, make(tmp_path, 'extra/00_a', export))
    assert 'a name is NN_name' in faults_of(misplaced, make(tmp_path, 'data/01b_a', export))
    one, other = make(tmp_path, 'data/02_a', export), make(tmp_path, 'data/02_b', export)
    assert 'has the number of 02_a' in faults_of(misplaced, one, other)
    assert 'not to data.a' in faults_of(misplaced, make(tmp_path, 'data/02_a', export, exp='data.b'))
    assert 'exports nothing' in faults_of(misplaced, make(tmp_path, 'data/03_a', 'import os'))


def test_imports_of_what_comes_later_are_found(tmp_path):
    base = make(tmp_path, 'data/00_base', '#| export\nx = 1')
    files = make(tmp_path, 'data/01_files', '#| export\ny = 1')
    for line in ('from lthash.data.files import y', 'import lthash.data.files', 'from lthash.data import files'):
        early = make(tmp_path, 'core/00_early', '#| export\nz = 1', line)
        assert 'core.early imports data.files' in faults_of(backward_imports, early, base, files)
    sibling = make(tmp_path, 'data/00_base', '#| export\nfrom lthash.data.files import y')
    assert 'data.base imports data.files' in faults_of(backward_imports, sibling, files)
    gone = make(tmp_path, 'data/02_gone', '#| export\nfrom lthash.retrieval import pack')
    assert 'which no notebook exports' in faults_of(backward_imports, gone)


def test_circles_are_found_even_inside_functions(tmp_path):
    one = make(tmp_path, 'data/00_one', '#| export\ndef f():\n    from lthash.data.two import g')
    two = make(tmp_path, 'data/01_two', '#| export\nfrom lthash.data.one import f')
    assert 'data.one' in faults_of(circles, one, two)
    assert 'in a function' in faults_of(hidden_imports, one)
    relative = make(tmp_path, 'data/02_rel', '#| export\nfrom .one import f')
    assert 'is relative' in faults_of(hidden_imports, relative)


def test_private_names_of_other_modules_are_found(tmp_path):
    one = make(tmp_path, 'data/00_one', '#| export\n_x = 1')
    assert 'imports _x of data.one' in faults_of(private_names, one, make(tmp_path, 'data/01_a', '#| export\n'
                                                                          'from lthash.data.one import _x'))
    assert 'uses m._x' in faults_of(private_names, one, make(tmp_path, 'data/01_a', '#| export\n'
                                                             'from lthash.data import one as m\nprint(m._x)'))


def test_questions_about_objects_are_found(tmp_path):
    book = make(tmp_path, 'data/00_one', "#| export\nhasattr(x, 'run')\ngetattr(x, 'plan', None)\ngetattr(x, name)",
                "hasattr(y, 'not exported')")
    assert faults_of(questions, book) == "data.one: hasattr(x, 'run')\ndata.one: getattr(x, 'plan', None)"
    allowed = {('data', "hasattr(x, 'run')"): '', ('data', "getattr(x, 'plan', None)"): ''}
    assert not questions(house([book]), allowed)


def test_the_allow_list_names_only_what_is_there():
    calls = questions(house(NOTEBOOKS), allowed={})
    found = {(call.split('.')[0], call.split(': ', 1)[1]) for call in calls}
    assert set(THIRD_PARTY) == found


def test_wrong_first_cells_are_found(tmp_path):
    path = make(tmp_path, 'data/00_one', 'import os', '#| export\n"""More."""', "start('data/01_one', profile, out)")
    found = faults_of(first_cells, path)
    for part in ('exported imports', 'a second docstring', "started as 'data/01_one'"):
        assert part in found
    cells = json.loads(path.read_text())['cells']
    path.write_text(json.dumps({'cells': cells[1:]}))
    for part in ('a title and a line', '`#| default_exp data.one`', 'tagged `parameters`'):
        assert part in faults_of(first_cells, path)


# Notebooks and modules are in step, and the notebooks fit to be committed

def nbdev(command: str, folder: Path) -> None:
    "`nbdev_export` or `nbdev_clean` in a folder."
    module = {'nbdev_export': 'nbdev.doclinks', 'nbdev_clean': 'nbdev.clean'}[command]
    code = f'import sys; sys.argv[1:] = []; from {module} import {command} as go; go()'
    subprocess.run([sys.executable, '-c', code], cwd=folder, check=True, capture_output=True)


def test_export_and_clean_change_nothing(tmp_path):
    for name in ('nbs', 'lthash'):
        left = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '.last_checked')
        shutil.copytree(ROOT/name, tmp_path/name, ignore=left)
    for name in ('settings.ini', 'setup.py'):
        shutil.copy(ROOT/name, tmp_path)

    def state() -> dict[str, str]:
        files = [*tmp_path.glob('lthash/**/*.py'), *tmp_path.glob('nbs/**/*.ipynb')]
        return {p.relative_to(tmp_path).as_posix(): p.read_text(encoding='utf-8') for p in files}
    before = state()
    for command in ('nbdev_export', 'nbdev_clean'):
        nbdev(command, tmp_path)
        after = state()
        changed = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
        assert not changed, f'`nbdev_export && nbdev_clean` would change {", ".join(changed)}: run both and commit'


def test_a_hand_edit_is_noticed(tmp_path):
    "The check above can fail: an edit of an exported module is undone by the export."
    names = ('settings.ini', 'setup.py', 'lthash/__init__.py', 'lthash/core/__init__.py', 'lthash/core/report.py',
             'nbs/core/02_report.ipynb')
    for name in names:
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, tmp_path/name)
    edited = tmp_path/'lthash'/'core'/'report.py'
    edited.write_text(edited.read_text().replace('class Report', 'class Other'))
    nbdev('nbdev_export', tmp_path)
    assert edited.read_text() == (ROOT/'lthash'/'core'/'report.py').read_text()
    assert (tmp_path/'lthash'/'__init__.py').read_text() == (ROOT/'lthash'/'__init__.py').read_text()


def ids(path: Path) -> str:
    return f'{path.parent.name}/{path.stem}'


@pytest.mark.parametrize('notebook', ALL, ids=ids)
def test_outputs_are_presentable(notebook):
    outputs = [o for c in Notebook(notebook).cells for o in c.get('outputs', [])]
    assert not [o['evalue'] for o in outputs if o['output_type'] == 'error']
    standard_error = [o['text'] for o in outputs if o.get('name') == 'stderr']
    assert not standard_error, 'standard error is stored; `lthash refresh` drops it'
    stored = notebook.read_text(encoding='utf-8')
    assert f'{ROOT}/' not in stored, 'a path of this machine is stored; `lthash refresh` shortens it'


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=ids)
def test_one_parameters_cell(notebook):
    cells = Notebook(notebook).cells
    tagged = [i for i, c in enumerate(cells) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1, 'exactly one cell is tagged `parameters`'
    values = {t.targets[0].id: ast.literal_eval(t.value) for t in parsed(source(cells[tagged[0]])).body}
    assert (values['profile'], values['out']) == ('cpu', 'reports')
    later = '\n'.join(source(c) for c in cells[tagged[0] + 1:] if c['cell_type'] == 'code')
    assert not re.search(r'^(profile|out) =', later, re.M), 'a later cell overwrites a parameter'
