"Style that a machine can check: length of modules and lines, docstrings, type hints, prose in the source, wording."
import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = [p for p in sorted((ROOT/'lthash').glob('**/*.py')) if p.name not in ('_modidx.py', '__init__.py')]
NOTEBOOKS = sorted((ROOT/'nbs').glob('**/[!.]*.ipynb'))
PAGES = [p for name in ('README.md', 'CONTRIBUTING.md', 'RESULTS.md', 'benchmarks/README.md')
         if (p := ROOT/name).exists()]
SCRIPTS = [p for folder in ('tests', 'benchmarks') for p in sorted((ROOT/folder).glob('**/*.py'))
           if p.name != 'test_style.py']
LINES, WIDTH = 330, 120

COINED = {                                    # pattern: what the field says
    r'won back': 'gap recovered',
    r'remed(y|ies)\b': 'baseline',
    r'\bregimes?\b': 'setting, training set',
    r'image passes|\bpasses (over|of) (the )?images|\bpasses=|\.passes\b': 'training samples',
    r'\bexaminees?\b|\bexam\b|\bexamined\b': 'classifier, CAS test, evaluated',
    r'\bluck(y|iest)?\b': 'best case, null distribution',
    r'\brulers?\b': 'reference classifier',
    r'\bbench\b': 'evaluation set',
    r'\bthe gate (passed|failed|test)|(?<![\w.])gate\(|\bUnfit\b': 'CAS test',
    r'knows? the classes|knowing the classes|unknowing': 'pretrained on the target classes',
    r'\ba (line|column|row|picture|panel|number|trial|cell) an? [a-z]+': 'one line per ...',
    r'\basked\b': 'query; requested',
    r'goes on where it': 'rerun to resume',
    r'[Ww]hat (stayed|stays) open': 'Limitations',
    r'[Ww]hat came out': 'Results',
    r'[Ww]ho pays': 'which classes lose accuracy',
    r'its circumstances|cost nothing|stopped as hopeless|chance with a veto': 'a plain sentence',
    r'negatives that are no negatives': 'false negatives',
    r'lost \((share|points)\)': 'relative drop (%), drop (points)',
    r'holds in part': 'mixed: n positive, m negative',
    r'\bon_record\b|\bcost_verdict\b|\bregime_bars\b|\bbest_cheap\b|\bcontrast_table\b': 'the new names',
}


def source(cell: dict) -> str:
    return ''.join(cell['source'])


@cache
def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding='utf-8'))['cells']


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


@pytest.mark.parametrize('module', MODULES, ids=where)
def test_modules_are_short(module):
    lines = len(module.read_text(encoding='utf-8').splitlines())
    assert lines <= LINES, f'{lines} lines: split the notebook by idea'


def test_ruff_is_content():
    "Line length, one statement per line, sorted and used imports, defined names: ruff.toml."
    command = [sys.executable, '-m', 'ruff', 'check', '--quiet', '--output-format=concise', 'lthash', 'nbs', 'tests',
               'benchmarks']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if 'No module named ruff' in done.stderr:
        pytest.skip('ruff is not installed')
    assert done.returncode == 0, done.stdout


# Docstrings and type hints

def public(tree: ast.Module) -> Iterator[tuple[str, ast.AST, ast.ClassDef | None]]:
    "(name, node, class) of public functions, classes, their public methods and `__init__`."
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
            yield node.name, node, None
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and (not inner.name.startswith('_') or inner.name == '__init__'):
                    yield f'{node.name}.{inner.name}', inner, node


def documented(classes: dict[str, ast.ClassDef], node: ast.ClassDef, method: str) -> bool:
    "Whether a base class, of any module, documents a method; PyTorch documents `forward`."
    if method == 'forward':
        return True
    for base in (classes.get(ast.unparse(b).split('.')[-1]) for b in node.bases):
        own = [n for n in base.body if isinstance(n, ast.FunctionDef) and n.name == method] if base else []
        if any(ast.get_docstring(n) for n in own) or base and documented(classes, base, method):
            return True
    return False


def undocumented(text: str, classes: dict[str, ast.ClassDef]) -> list[str]:
    "Public definitions without a docstring."
    return [name for name, node, owner in public(ast.parse(text))
            if not ast.get_docstring(node) and not name.endswith('__init__')
            and not (owner and documented(classes, owner, node.name))]


def unhinted(text: str) -> list[str]:
    "Public functions and methods with a parameter or a return value that has no type hint; `*` and `**` may."
    found = []
    for name, node, owner in public(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            static = any(ast.unparse(d) == 'staticmethod' for d in node.decorator_list)
            args = [*node.args.posonlyargs, *node.args.args][bool(owner) and not static:] + node.args.kwonlyargs
            missing = [a.arg for a in args if a.annotation is None]
            if node.returns is None and node.name != '__init__':
                missing.append('return')
            found += [f'{name} ({", ".join(missing)})'] if missing else []
    return found


@cache
def all_classes() -> dict[str, ast.ClassDef]:
    trees = [ast.parse(m.read_text(encoding='utf-8')) for m in MODULES]
    return {n.name: n for tree in trees for n in tree.body if isinstance(n, ast.ClassDef)}


@pytest.mark.parametrize('module', MODULES, ids=where)
def test_public_names_have_docstrings_and_hints(module):
    text = module.read_text(encoding='utf-8')
    assert ast.get_docstring(ast.parse(text)), 'the notebook has no `> line`'
    assert not undocumented(text, all_classes()), 'no docstring'
    assert not unhinted(text), 'no type hint'


def test_missing_docstrings_and_hints_are_found():
    text = ('class Base:\n    def fit(self) -> int:\n        "Doc."\n\n'
            'class A(Base):\n    "Doc."\n    def fit(self): pass\n    def other(self, x) -> int: pass\n\n'
            'def _private(): pass\n\ndef f(a: int, *more): "Doc."\n')
    classes = {n.name: n for n in ast.parse(text).body if isinstance(n, ast.ClassDef)}
    assert undocumented(text, classes) == ['Base', 'A.other']
    assert unhinted(text) == ['A.fit (return)', 'A.other (x)', 'f (return)']


# Conclusions are written, not assembled

def assembled_sentences(text: str) -> list[str]:
    "Sentences of more than 120 characters in f-strings, numbers not counted; a message of an error may be one."
    tree = ast.parse('\n'.join(re.sub(r'^(\s*)[%!].*', r'\1pass', line) for line in text.splitlines()))
    raised = {n for r in ast.walk(tree) if isinstance(r, ast.Raise) for n in ast.walk(r)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and node not in raised:
            prose = '{}'.join(p.value for p in node.values if isinstance(p, ast.Constant))
            found += [sentence for sentence in re.split(r'(?<=[.!?])\s+', prose)
                      if len(sentence) > WIDTH and len(re.findall(r"[A-Za-z']{2,}", sentence)) > 12]
    return found


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=where)
def test_no_sentence_is_assembled(notebook):
    code = [source(c) for c in cells(notebook) if c['cell_type'] == 'code' and not source(c).startswith('%%')]
    found = [s for text in code for s in assembled_sentences(text)]
    assert not found, 'write it as markdown, and assert its numbers in the next cell'


def test_an_assembled_sentence_is_found():
    prose = 'The loss of the tail classes is {x} points and that of the head classes only {y}, ' * 2
    assert len(assembled_sentences(f"f'''{prose}'''")) == 1
    assert not assembled_sentences("f'{x} points'") and not assembled_sentences(f"raise ValueError(f'''{prose}''')")
    assert not assembled_sentences("f'mAP (%) of {x} networks. '" + " f'One caption of {y} short sentences. '"*9)


# The field's words

def coined(text: str) -> list[str]:
    "Words that only this project used, with what the field says instead."
    text = re.sub(r"derive_seed\('[^']*'", '', text)    # names of random streams stay as they are
    return [f'{m[0]!r} -> {better}' for pattern, better in COINED.items() for m in re.finditer(pattern, text)]


@pytest.mark.parametrize('page', [*NOTEBOOKS, *PAGES, *SCRIPTS], ids=where)
def test_the_words_are_those_of_the_field(page):
    text = page.read_text(encoding='utf-8')
    if page.suffix == '.ipynb':
        text = '\n'.join(source(c) for c in cells(page))
    found = coined(text)
    assert not found, '\n'.join(found)


def test_coined_words_are_found():
    assert coined('the cheap remedies won back a part') == ["'won back' -> gap recovered", "'remedies' -> baseline"]
    assert not coined('a class with a forward pass; benchmarks; the classes')
