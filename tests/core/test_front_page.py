"The front page: made from its notebook, true to the code, and the same in both languages."
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import lthash as lh
from lthash.diffusion.methods import METHODS as PERSONALISATION
from lthash.experiments.notebooks import readme
from lthash.supervised.methods import METHODS as SUPERVISED
from lthash.supervised.rebalancing import GENERATOR_FREE
from lthash.unsupervised.methods import METHODS as UNSUPERVISED

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = (ROOT/name for name in ('README.md', 'README.zh.md'))


def text(path: Path) -> str:
    return path.read_text(encoding='utf-8')


def blocks(page: str, language: str) -> list[str]:
    "The fenced code of one language."
    return re.findall(rf'^```{language}\n(.*?)^```', page, re.M | re.S)


def prose(page: str) -> str:
    "The page without code blocks."
    return re.sub(r'^```.*?^```', '', page, flags=re.M | re.S)


def test_it_is_the_index_notebook():
    page, pictures = readme(ROOT/'nbs'/'index.ipynb', 'data/results/readme-')
    assert text(ENGLISH) == page, 'README.md is made from nbs/index.ipynb: run `lthash refresh`'
    for name, content in pictures.items():
        assert (ROOT/name).read_bytes() == content
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT/'data'/'results').glob('readme-*')} == set(pictures)


def test_it_takes_two_screens():
    assert len(text(ENGLISH).splitlines()) <= 140


@pytest.mark.parametrize('page', ['README.md', 'README.zh.md', 'CONTRIBUTING.md', 'CHANGELOG.md'])
def test_links_lead_somewhere(page):
    links = re.findall(r'\]\(([^)\s]+)\)', text(ROOT/page))
    missing = [link for link in links if not link.startswith('http') and not (ROOT/link.split('#')[0]).exists()]
    assert not missing


def test_all_notebooks_of_the_papers_are_listed():
    listed = re.findall(r'^\| \[.*?\]\((nbs/papers/.*?)\)', text(ENGLISH), re.M)
    assert listed == sorted(p.relative_to(ROOT).as_posix() for p in (ROOT/'nbs'/'papers').glob('*.ipynb'))


def test_all_methods_are_listed_with_their_modules():
    section = text(ENGLISH).split('\n## Methods\n')[1].split('\n## ')[0]
    rows = [line.strip('| ').split(' | ') for line in section.splitlines() if line.startswith('| ')][1:]
    listed = {name.strip().lower() for row in rows for name in row[0].split(',')}
    known = {*SUPERVISED, *UNSUPERVISED, *GENERATOR_FREE, *PERSONALISATION['matched']}
    assert listed == {name.lower() for name in known}
    for row in rows:
        place = re.match(r'`(\w+)\.', row[2])[1]
        for module in re.findall(r'`(?:\w+\.)?(\w+)`', row[2]):
            assert (ROOT/'lthash'/place/f'{module}.py').exists(), row[2]


def test_all_environment_variables_are_listed():
    used = {v for p in (ROOT/'lthash').glob('**/*.py') for v in re.findall(r"environ\S*?['\"](LTHASH_\w+)", text(p))}
    assert set(re.findall(r'^\| `(LTHASH_\w+)`', text(ENGLISH), re.M)) == used


def test_the_quick_start_does_what_it_says(tmp_path, monkeypatch, capsys):
    "Exactly the lines of the page, on a folder of four classes."
    code, = blocks(text(ENGLISH), 'python')
    assert len(code.splitlines()) <= 12
    silk = lh.load('silk', size=64, train_per_class=12, val_per_class=1)
    for image, label, name in zip(silk.images.numpy(), silk.labels.tolist(), silk.ids):
        if label < 4:
            folder = tmp_path/'photos'/silk.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = image if image.dtype == np.uint8 else (255*image).round().astype(np.uint8)
            Image.fromarray(pixels.transpose(1, 2, 0)).save(folder/f'{Path(name).stem}.png')
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert .3 < float(re.search(r'mAP (0\.\d+|1\.000)', capsys.readouterr().out)[1]) <= 1
    assert names['neighbours'].shape == (len(names['query']), 10) and names['codes'].shape[1] == 4


# The two languages

def outline(page: str) -> list[int]:
    "Levels of the headings, in order."
    return [len(marks) for marks in re.findall(r'^(#+) ', prose(page), re.M)]


def numbers(page: str) -> Counter:
    "All numbers outside of code, addresses and words."
    plain = re.sub(r'\]\([^)]*\)|`[^`]*`|https?://\S+', ' ', prose(page))
    return Counter(re.findall(r'(?<![\w.])\d+(?:[.,]\d+)*(?![\w.]*[A-Za-z_])', plain))


@pytest.mark.parametrize('part', [outline, numbers, lambda p: [blocks(p, k) for k in ('bash', 'python', 'bibtex')],
                                  lambda p: re.findall(r'\]\(([^)]+)\)', p.replace('README.zh.md', 'README.md')),
                                  lambda p: Counter(re.findall(r'`[^`\n]+`', prose(p)))],
                         ids=['headings', 'numbers', 'commands', 'links', 'names'])
def test_the_chinese_page_is_in_step(part):
    assert part(text(CHINESE)) == part(text(ENGLISH))


def test_a_stale_translation_is_noticed():
    page = text(ENGLISH)
    assert numbers(page) != numbers(page.replace('19.3 %', '19.4 %'))
    assert outline(page) != outline(page.replace('\n## Results', '\n### Results'))


def test_the_citation_file_names_both_papers():
    cited = yaml.safe_load(text(ROOT/'CITATION.cff'))
    assert cited['cff-version'] == '1.2.0' and cited['version'] == lh.__version__
    assert {'title', 'message', 'authors', 'license'} <= set(cited)
    paper_a, paper_b = cited['references']
    assert paper_a['doi'] == '10.12677/csa.2025.152030' and 'doi' not in paper_b
    for title in (paper_b['title'], paper_a['doi']):
        assert title in text(ENGLISH)
