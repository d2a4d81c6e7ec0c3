"Notebooks and package are in step, and the notebooks are fit to be committed."
import shutil
import subprocess
import sys

import pandas as pd
import papermill
import pytest
from conftest import ROOT
from lthash.code_tables import bias_verdict, methods_table
from lthash.generation import quality_table, ranking
from lthash.notebooks import read_cells, readme, source, tagged_cells
from lthash.runs import markdown
from lthash.tables import cost_table
from lthash.verdicts import by_claim, comparison_table, contrast_table, judged, on_record, verdict

NUMBERED = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
ALL = NUMBERED + sorted((ROOT/'nbs').glob('index.ipynb'))


def test_export_and_clean_change_nothing(tmp_path):
    for name in ('nbs', 'lthash'): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '.last_checked'))
    for name in ('settings.ini', 'setup.py'): shutil.copy(ROOT/name, tmp_path)
    state = lambda: {p.relative_to(tmp_path).as_posix(): p.read_text(encoding='utf-8') for kind in ('lthash/*.py', 'nbs/*.ipynb') for p in tmp_path.glob(kind)}
    before = state()
    for command in ('from nbdev.doclinks import nbdev_export as go', 'from nbdev.clean import nbdev_clean as go'):
        subprocess.run([sys.executable, '-c', f'import sys; sys.argv[1:] = []; {command}; go()'], cwd=tmp_path, check=True, capture_output=True)
        after = state()
        changed = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
        assert not changed, f'`nbdev_export && nbdev_clean` would change {", ".join(changed)}: run both and commit'


def test_a_hand_edit_is_noticed(tmp_path):
    "The check above can fail: an edit of an exported module is undone by the export."
    (tmp_path/'nbs').mkdir(), (tmp_path/'lthash').mkdir()
    for name in ('settings.ini', 'setup.py', 'lthash/__init__.py', 'lthash/report.py', 'nbs/08_report.ipynb'): shutil.copy(ROOT/name, tmp_path/name)
    edited = tmp_path/'lthash'/'report.py'
    edited.write_text(edited.read_text().replace('class Entry', 'class Other'))
    subprocess.run([sys.executable, '-c', 'import sys; sys.argv[1:] = []; from nbdev.doclinks import nbdev_export as go; go()'], cwd=tmp_path, check=True, capture_output=True)
    assert edited.read_text() == (ROOT/'lthash'/'report.py').read_text()


@pytest.mark.parametrize('notebook', ALL, ids=lambda p: p.stem)
def test_outputs_are_presentable(notebook):
    outputs = [o for c in read_cells(notebook) for o in c.get('outputs', [])]
    assert not [o['evalue'] for o in outputs if o['output_type'] == 'error']
    assert not [o['text'] for o in outputs if o.get('name') == 'stderr'], 'standard error is stored; `lthash refresh` drops it'
    assert str(ROOT) + '/' not in notebook.read_text(encoding='utf-8'), 'a path of this machine is stored; `lthash refresh` shortens it'


@pytest.mark.parametrize('notebook', NUMBERED, ids=lambda p: p.stem)
def test_one_parameters_cell(notebook):
    tagged = tagged_cells(read_cells(notebook))
    assert len(tagged) == 1, 'exactly one cell is tagged `parameters`'
    known = papermill.inspect_notebook(str(notebook))
    assert {'profile', 'out'} <= set(known)
    assert (known['profile']['default'], known['out']['default']) == ('"cpu"', '"reports"')
    written = [source(c) for i, c in enumerate(read_cells(notebook)) if i > tagged[0] and c['cell_type'] == 'code']
    assert not [s for s in written for line in s.splitlines() if line.startswith(('profile =', 'out ='))], 'a later cell overwrites a parameter'


def test_the_front_page_is_the_index_notebook():
    text, pictures = readme(ROOT/'nbs'/'index.ipynb', 'data/results/readme-')
    assert (ROOT/'README.md').read_text(encoding='utf-8') == text, 'README.md is made from nbs/index.ipynb: run `lthash refresh`'
    for name, content in pictures.items(): assert (ROOT/name).read_bytes() == content


def test_the_front_page_shows_the_rows_on_record():
    rows = pd.read_csv(ROOT/'data'/'results'/'real.csv').query("table == 'figure1b' and group == 'all' and protocol == 'paper'")
    assert markdown(cost_table(rows)) in (ROOT/'README.md').read_text(encoding='utf-8')


def test_the_front_page_shows_the_unsupervised_rows_on_record():
    rows = pd.read_csv(ROOT/'data'/'results'/'real.csv').query("paper == 'bscdh' and table == 'table1' and dataset == 'cifar10' and protocol == 'paper'")
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert bias_verdict(rows) in text
    assert markdown(methods_table(rows[rows.method.isin(['BSCDH', 'CIBH', 'DCL', 'DSCH', 'InfoNCE', 'ITQ', 'LSH'])])) in text


def test_the_front_page_shows_the_generated_images_on_record():
    rows = pd.read_csv(ROOT/'data'/'results'/'real.csv').query("paper == 'longtail' and table == 'generation' and dataset == 'silk'")
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert ranking(rows) in text
    assert markdown(quality_table(rows, ['CAS (%)', 'mAP (%)', 'KID', 'coverage', 'copies'])) in text


def test_the_front_page_shows_the_augmented_framework_on_record():
    rows = on_record('table1').query("protocol == 'paper' and metric == 'mAP (%)' and bits == 64")
    shown = comparison_table(rows, 'table1', ['balanced', 'long-tail', 'attndreambooth'])[['data set', 'network', 'trained on', 'mAP (%)', 'head', 'mid', 'tail', 'won back', 'paper', 'paper: won back']]
    told = contrast_table(pd.concat([on_record('table1'), on_record('verdict')]))
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert markdown(shown) in text
    for claim, name, own in by_claim(told): assert (verdict(own) in text) == (judged(own) != 'holds'), (claim, name)

    swept = on_record('ablations').query("dataset == 'silk' and protocol == 'paper' and group == 'all' and metric == 'mAP (%)'")
    means = swept[swept.variant.str.startswith('synthetic images: ')].groupby('variant').value.mean()
    assert len(means) == 7
    for variant, mean in means.items(): assert f"{variant.split(': ')[1]} give {mean:.1f} %" in text, variant


def test_the_card_of_loom_natural_shows_the_rows_on_record():
    table = on_record('loom-natural').pivot_table(index='variant', columns='metric', values='value').dropna(subset='KID')
    card = (ROOT/'data'/'loom-natural'/'README.md').read_text(encoding='utf-8')
    assert len(table) == 4
    for name, r in table.iterrows(): assert f"| {name} | {abs(r['KID']):.2f} | {r['top-1 agreement (%)']:.1f} % | {r['top-5 agreement (%)']:.1f} % |" in card, name
