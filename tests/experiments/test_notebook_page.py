"Executed notebooks as pages: every equation of the project becomes MathML, and pages need nothing from outside."
import json
import re
from pathlib import Path

import nbformat
import pytest

from lthash.experiments.jobs import notebook_paths
from lthash.experiments.notebook_page import markdown_to_html, mathml, notebook_page

ROOT = Path(__file__).parents[2]
NOTEBOOKS = notebook_paths(ROOT/'nbs', index=True)


def name(notebook: Path) -> str:
    return notebook.relative_to(ROOT/'nbs').with_suffix('').as_posix()


def equations(text: str) -> list[str]:
    "The LaTeX of a Markdown text, without what stands in code."
    text = re.sub(r'```.*?```|`[^`]*`', '', text, flags=re.S)
    return [a or b for a, b in re.findall(r'\$\$(.+?)\$\$|(?<![\\$])\$([^$\n]+?)\$', text, re.S)]


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=name)
def test_every_equation_is_converted(notebook):
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] == 'markdown':
            for latex in equations(''.join(cell['source'])):
                shown = mathml(latex)
                assert shown.startswith('<math') and not re.search(r'\\[a-zA-Z]+', shown), latex


def test_equations_that_cannot_be_converted_are_shown_as_they_are():
    assert mathml('x^a^b < 1') == '<code>x^a^b &lt; 1</code>'


def test_links_between_notebooks_lead_to_their_pages():
    shown = markdown_to_html('[a](../data/06_silk.ipynb#x) [b](https://example.org/a.ipynb) [c](other.html)')
    assert re.findall('href="(.+?)"', shown) == ['../data/06_silk.html#x', 'https://example.org/a.ipynb', 'other.html']


@pytest.fixture
def executed(tmp_path):
    "A notebook with set-up, long code, every kind of output, and a failure."
    output, cell = nbformat.v4.new_output, nbformat.v4.new_code_cell
    png = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='
    cells = [
        nbformat.v4.new_markdown_cell('# A title\n\n> A line.\n\nWith $x^2$ and\n\n$$\\boxed{y}$$'),
        cell('#| default_exp a.b'), cell('profile = "cpu"', metadata={'tags': ['parameters']}),
        cell('profile = "smoke"', metadata={'tags': ['injected-parameters']}),
        cell('#| export\nimport os'),
        cell('report = start("a/00_b", profile)', outputs=[output('stream', name='stdout', text='a/00_b | profile\n')]),
        cell('#| export\ndef f():\n    return 1',
             outputs=[output('stream', name='stderr', text='IProgress not found')]),
        cell('f()', outputs=[output('execute_result', data={'text/plain': '1', 'text/html': '<b>1</b>'}),
                             output('display_data', data={'image/png': png, 'text/plain': 'a picture'}),
                             output('display_data', data={'text/markdown': '**$z$**'})]),
        cell('1/0', outputs=[output('error', ename='ZeroDivisionError', evalue='division by zero',
                                    traceback=['ZeroDivisionError: division by zero'])])]
    path = tmp_path/'00_b.ipynb'
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_a_page_is_complete_and_opens_with_its_text(executed):
    page = notebook_page(executed, 'a/00_b')
    assert page.count('<math') == 3 and '$' not in page and '#|' not in page
    assert not re.search(r'<script|<link|@import|url\(|(?:src|href)="(?:https?:)?//', page)
    assert 'IProgress' not in page and 'ZeroDivisionError' in page and 'data:image/png' in page and '<b>1</b>' in page
    assert page.count('<details>') == page.count('</details>') == 1
    folded = page[page.index('<details>'):page.index('</details>')]
    assert 'import' in folded and 'smoke' in folded and 'a/00_b | profile' in folded and 'return' not in folded
    assert page.rstrip().endswith('</html>') and '<title>A title</title>' in page
