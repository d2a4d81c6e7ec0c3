"The page and its parts: nothing that a notebook leaves can break them."
import csv
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lthash.core.report import ROW_COLUMNS, Report
from lthash.core.runtime import atomic_write
from lthash.experiments.artefacts import STATES, Entry, duration, embed, read_table, write_results
from lthash.experiments.page import write_page

VOID = {'meta', 'img', 'br', 'link'}
CHARACTERS = st.characters(codec='utf-8', exclude_characters='\x00')
HOSTILE = ['<script>alert(1)</script>', '"><img src=x onerror=y>', '{{ 7*7 }}', '{% raw %}', '</figure>',
           "' onload='x"]


class Skeleton(HTMLParser):
    "Tags and attribute names of a page, and a check that every tag is closed in order."
    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.links, self.ids = [], [], [], []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, *(name for name, _ in attributes)))
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ('href', 'src')]
        self.ids += [value for name, value in attributes if name == 'id']

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(folder, *entries):
    return write_page(folder, list(entries), 'smoke').read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def left(tmp_path_factory):
    "What one notebook left: a headline figure, a table with a column of the paper's numbers, and rows."
    folder = tmp_path_factory.mktemp('out')
    report = Report('papers/01_a1_toy', 'smoke', folder)
    figure, axes = plt.subplots()
    axes.plot(range(3))
    report.figure(figure, 'line', 'A line.', headline=True)
    frame = pd.DataFrame({'method': ['CSQ', 'a, "b"\nc'], 'mAP': ['90.1 ± 0.2', '7'], 'paper': [80., np.nan],
                          'comment': ['x', '']})
    report.table(frame, 'numbers', 'Some numbers.')
    report.rows([{'paper': 'toy', 'value': 1/3, 'note': 'é, "q"\nsecond line'}])
    return folder, report


def test_self_contained_and_well_formed(left):
    folder, report = left
    error = {'cell': 4, 'source': 'f()', 'message': 'E: no', 'traceback': 'T'}
    entries = [Entry(f'papers/{10 + i}_b{i}_toy', state=s, items=report.items if s == 'done' else [],
                     error=error if s == 'failed' else None) for i, s in enumerate(STATES)]
    text = page(folder, *entries, Entry('data/06_silk', state='failed', error=error))
    skeleton = Skeleton(text)
    assert len(set(skeleton.ids)) == len(skeleton.ids)
    assert {f'#{name}' for name in skeleton.ids} >= {link for link in skeleton.links if link.startswith('#')}
    outside = [link for link in skeleton.links if re.match('[a-z]+:|//', link)]
    assert all(link.startswith('data:image/') for link in outside)
    assert not re.search(r'@import|url\(|<script|<link|\son[a-z]+=', text)
    for link in skeleton.links:
        if not link.startswith(('#', 'data:', 'results.csv')):
            assert (folder/link).exists(), link
    assert 'Failed in cell 4' in text and 'cell 4: <code>E: no</code>' in text
    headings = [int(tag[0][1]) for tag in skeleton.tags if re.fullmatch('h[1-6]', tag[0])]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(headings, headings[1:]))
    for tag in skeleton.tags:
        assert tag[0] != 'img' or 'alt' in tag
        assert tag[0] != 'th' or 'scope' in tag


def test_headline_results_come_first_and_notebooks_last(left):
    folder, report = left
    library = Entry('data/06_silk', 'Silk', state='failed', error={'cell': 1, 'source': '', 'message': 'no',
                                                                   'traceback': ''})
    a, b = Entry('papers/01_a1_toy', 'Toy A', state='done', items=report.items), Entry('papers/07_b1_x', 'Toy B')
    b.state, b.error = library.state, library.error
    text = page(folder, a, b, library)
    ids = Skeleton(text).ids
    order = ['headlines', 'figure-line', 'paper-a', 'papers/01_a1_toy', 'table-numbers', 'paper-b', 'papers/07_b1_x',
             'library', 'data/06_silk', 'notebooks']
    assert [i for i in ids if i in order] == order
    assert text.count('<img ') == 1 and text.count('<details>') >= 2
    assert 'id="headlines"' not in page(folder, b)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hostile=st.text(CHARACTERS, min_size=1) | st.sampled_from(HOSTILE))
def test_nothing_a_notebook_says_becomes_markup(left, hostile):
    folder, report = left

    def tags(words):
        items = [{**i, 'caption': words} for i in report.items]
        error = {'cell': 1, 'source': words, 'message': words, 'traceback': words}
        entry = Entry('papers/01_a1_toy', words, words, 'failed', 1., words, error, items)
        return Skeleton(page(folder, entry)).tags
    assert tags(hostile) == tags('plain')


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(st.text(st.characters(codec='utf-8', exclude_characters='\x00\r')), min_size=2,
                              max_size=2), max_size=5))
def test_tables_are_read_as_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp('t')/'t.csv'
    with path.open('w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([['a', 'paper'], *rows])
    table = read_table(path)
    assert table['rows'] == rows and [c['name'] for c in table['columns']] == ['a', 'paper']


@pytest.mark.parametrize('cell, number', [
    ('1', True), ('-0.5', True), ('80.15 ± 0.3', True), ('1,234', True), ('3.2e-05', True), ('12 %', True),
    ('34x', True), ('+2.8 [+2.1, -3.5]', True), ('64 bits', False), ('resnet56', False), ('1-2', False),
    ('2026-11-22', False)])
def test_what_counts_as_a_number(tmp_path, cell, number):
    with (tmp_path/'t.csv').open('w') as file:
        csv.writer(file).writerows([['ours', 'paper'], [cell, cell], ['', '–']])
    columns = read_table(tmp_path/'t.csv')['columns']
    assert [c['number'] for c in columns] == [number]*2
    assert [c['paper'] for c in columns] == [False, number]


def test_figures_take_the_better_file(left, tmp_path):
    folder, _ = left
    assert embed(folder, 'line').startswith('data:image/svg+xml;base64,')
    (tmp_path/'figures').mkdir()
    for suffix, size in (('svg', 400_000), ('png', 50_000)):
        (tmp_path/'figures'/f'big.{suffix}').write_bytes(bytes(size))
    assert embed(tmp_path, 'big').startswith('data:image/png')
    (tmp_path/'figures'/'big.png').unlink()
    assert embed(tmp_path, 'big').startswith('data:image/svg')


def test_results_keep_every_character_and_the_order(left, tmp_path):
    folder, _ = left
    other = Report('data/02_first', 'smoke', folder)
    other.rows([{'paper': 'first', 'value': 0.1 + 0.2, 'bits': 64}])
    path = write_results(folder, ['data/02_first', 'data/07_none', 'papers/01_a1_toy'])
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert list(frame.columns) == ROW_COLUMNS
    assert frame.paper.tolist() == ['first', 'toy']
    assert frame.value.tolist() == ['0.30000000000000004', '0.3333333333333333'] and frame.bits[0] == '64'
    assert frame.note[1] == 'é, "q"\nsecond line'
    assert len(pd.read_csv(write_results(tmp_path, []))) == 0


def test_a_foreign_column_is_an_error_not_a_silent_loss(tmp_path):
    atomic_write(tmp_path/'rows'/'papers'/'10_toy.csv', 'paper,valeu\nx,1\n')
    with pytest.raises(ValueError, match='valeu'):
        write_results(tmp_path, ['papers/10_toy'])


@pytest.mark.parametrize('seconds, text', [
    (0, '0 s'), (59.4, '59 s'), (59.6, '1 min 00 s'), (3599.7, '1 h 00 min'), (7260, '2 h 01 min')])
def test_duration(seconds, text):
    assert duration(seconds) == text
