"What a notebook leaves: rows with every column, tables, figures; and the papers' own numbers."
import json

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lthash.core.report import ROW_COLUMNS, Report, markdown, read_rows, reported, row_frame, start


def test_columns_are_named_once_and_facts_have_one_each():
    assert len(set(ROW_COLUMNS)) == len(ROW_COLUMNS)
    assert {'setting', 'factor', 'level', 'weights', 'claim', 'epochs', 'samples', 'cas_passed', 'seed', 'device',
            'versions', 'substitutes'} <= set(ROW_COLUMNS)


def test_rows_come_back_as_they_were_written(tmp_path):
    report = Report('papers/00_toy', 'smoke', tmp_path)
    given = [{'paper': 'toy', 'value': .1 + .2, 'seed': 0, 'factor': 'queue', 'level': 256, 'cas_passed': True},
             {'paper': 'toy', 'value': 1/3, 'note': 'é, "q"\nsecond line', 'seed': None}]
    frame = report.rows(given)
    path = tmp_path/'rows'/'papers'/'00_toy.csv'
    again = read_rows(path)
    assert list(frame) == list(again) == ROW_COLUMNS
    assert again.value.tolist() == [.1 + .2, 1/3] and again.note[1] == 'é, "q"\nsecond line'
    assert again['level'].tolist() == frame['level'].tolist() == ['256', ''] and set(again.profile) == {'smoke'}
    assert again.cas_passed[0] and pd.isna(again.seed[1]) and again.claim.tolist() == ['', '']
    text = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert text.seed.tolist() == ['0', '']           # a whole number stays one beside a missing value


def test_rows_of_a_frame_are_written_like_rows_of_dicts(tmp_path):
    report = Report('papers/00_toy', 'cpu', tmp_path)
    one = report.rows([{'method': 'CSQ', 'bits': 64, 'value': .5}])
    other = report.rows(one)
    pd.testing.assert_frame_equal(one, other)
    report.rows(row_frame([{'seed': 0, 'epochs': 40., 'kept_epoch': 34.995, 'value': 1.}, {'value': 2.}]))
    text = pd.read_csv(tmp_path/'rows'/'papers'/'00_toy.csv', dtype=str, keep_default_na=False)
    assert text[['profile', 'seed', 'epochs', 'kept_epoch', 'value']].values.tolist() \
        == [['cpu', '0', '40', '34.995', '1.0'], ['cpu', '', '', '', '2.0']]
    assert len(report.rows([])) == 0 and list(read_rows(tmp_path/'rows'/'papers'/'00_toy.csv')) == ROW_COLUMNS


@given(st.text(st.characters(codec='ascii', categories=['Ll']), min_size=1))
def test_an_unknown_column_is_an_error_that_names_it(name):
    if name in ROW_COLUMNS:
        return
    with pytest.raises(ValueError, match=name):
        row_frame([{name: 1}])


def test_artefacts_are_registered_once_in_the_order_made(tmp_path):
    import matplotlib.pyplot as plt
    report = Report('papers/00_toy', 'smoke', tmp_path)
    figure, axes = plt.subplots()
    axes.plot(range(3))
    report.figure(figure, 'line', 'A line.')
    for caption in ('first', 'again'):
        report.table(pd.DataFrame({'a|b': ['x|y']}), 'numbers', caption)
    kept = json.loads((tmp_path/'artefacts'/'papers'/'00_toy.json').read_text())
    assert [(i['kind'], i['name'], i['caption']) for i in kept['items']] \
        == [('figure', 'line', 'A line.'), ('table', 'numbers', 'again')]
    for path in ('figures/line.svg', 'figures/line.png', 'tables/numbers.csv', 'tables/numbers.md'):
        assert (tmp_path/path).stat().st_size
    assert markdown(pd.DataFrame({'a|b': ['x|y']})) == '| a\\|b |\n|---|\n| x\\|y |'


def test_the_same_figure_is_the_same_file(tmp_path):
    import matplotlib.pyplot as plt
    written = []
    for folder in ('one', 'other'):
        figure, axes = plt.subplots()
        axes.plot([1, 3, 2])
        Report('papers/00_toy', 'smoke', tmp_path/folder).figure(figure, 'line', 'A line.')
        written.append([(tmp_path/folder/'figures'/f'line.{s}').read_bytes() for s in ('svg', 'png')])
    assert written[0] == written[1]


def test_a_notebook_starts_with_its_circumstances(capsys, lthash_home):
    report = start('papers/00_toy', 'smoke', 'there', seed=3)
    said = capsys.readouterr().out
    assert 'papers/00_toy' in said and 'profile smoke' in said and 'seed 3' in said and 'torch' in said
    assert report.out == lthash_home/'there'
    with pytest.raises(ValueError, match='profile'):
        start('papers/00_toy', 'tiny')


def test_the_numbers_of_both_papers():
    assert len(reported('longtail')) == 66 and len(reported('bscdh')) == 111
    cell = reported(table='table1', dataset='imagenette', backbone='ResNet50', bits=64).set_index('setting').value
    assert cell.to_dict() == {'balanced': 80.15, 'long-tail': 39.16, 'attndreambooth': 78.43}
    varied = reported('bscdh', table='table4', dataset='cifar10')
    assert set(varied.factor) == {'hp_s'} and set(varied['level']) == {'0.5', '0.6', '0.7', '0.8', '0.9'}
    assert set(reported('bscdh', table='table3')['level']) == {'50', '100', '150'}
    assert set(reported()) <= set(ROW_COLUMNS)
