"Tables follow from rows: means, spreads, substitutes, the papers' numbers beside ours, and the page of results."
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.container import BarContainer

from lthash.core.report import markdown, read_rows, reported
from lthash.experiments.results import level_table, results_page, unsupervised_tables
from lthash.experiments.tables import (
    ablation_table,
    best_setting,
    cost_table,
    difference_verdicts,
    differences,
    longtail_claims,
    methods_table,
    name_verdict,
    networks,
    plus_minus,
    pretrained_on_target,
    quality_ranking,
    quality_table,
    setting_bars,
    substitutes,
    summarise,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def record() -> pd.DataFrame:
    "The rows on record."
    return read_rows(ROOT/'data'/'results'/'real.csv')


def scores(values: dict, dataset='cifar10', bits=(64,), protocol='paper') -> pd.DataFrame:
    "Rows of {method: [value of seed 0, 1, ...]}, the same at every code length."
    return pd.DataFrame([dict(dataset=dataset, method=m, bits=b, seed=s, value=v, protocol=protocol)
                         for (m, of_seeds), b in product(values.items(), bits) for s, v in enumerate(of_seeds)])


def trained(values: dict, weights='random', dataset='imagenette', bits=(64,)) -> pd.DataFrame:
    "Rows of {setting: [value of seed 0, 1, ...]} of one network."
    return pd.DataFrame([dict(dataset=dataset, backbone='resnet20', weights=weights, setting=setting, bits=b, seed=s,
                              value=v, substitutes='a for b; c for d')
                         for (setting, of_seeds), b in product(values.items(), bits) for s, v in enumerate(of_seeds)])


@given(st.lists(st.floats(0, 100), min_size=2, max_size=6))
@settings(max_examples=30, deadline=None)
def test_mean_and_spread_by_hand(values):
    found = summarise(trained({'balanced': values}), ['setting'])
    assert found['mean'][0] == pytest.approx(np.mean(values), abs=1e-9)
    assert found.spread[0] == pytest.approx(np.std(values, ddof=1), abs=1e-9) and found.seeds[0] == len(values)


def test_digits_and_single_seeds():
    assert plus_minus(61.349, .82) == '61.3 ± 0.8' and plus_minus(.6129, .0042, digits=3) == '0.613 ± 0.004'
    assert plus_minus(61.349, float('nan')) == '61.3'


def test_every_substitute_is_named_once():
    assert substitutes(pd.DataFrame({'substitutes': ['b for a; d for c', 'd for c', '', None]})) == 'b for a; d for c'
    assert substitutes(pd.DataFrame({'substitutes': ['', None]})) == 'none'


@pytest.mark.parametrize('dataset, weights, known', [
    ('imagenette', 'imagenet', True), ('imagenette', 'cifar10', False), ('cifar10', 'cifar10', True),
    ('cifar10', 'imagenet', False), ('silk', 'imagenet', False), ('silk', 'silk', True), ('silk', 'random', False),
    ('imagenette', '/some/weights.safetensors', False)])
def test_what_weights_were_trained_on_is_decided_per_data_set(dataset, weights, known):
    assert pretrained_on_target(dataset, weights) is known


def test_networks_pretrained_on_the_target_classes_come_first():
    rows = pd.concat([trained({'balanced': [1.]}, w) for w in ('random', 'cifar10', 'imagenet')])
    assert networks(rows)[0] == ('imagenette', 'resnet20', 'imagenet') and len(networks(rows)) == 3


def test_the_cost_of_a_long_tail_and_the_paper_beside_it():
    rows = trained({'balanced': [80., 82.], 'long-tail': [41., 40.]}, 'cifar10')
    line = cost_table(rows).iloc[0]
    assert (line['drop (points)'], line['relative drop (%)'], line.seeds) == ('40.5', '50', 2)
    assert (line['paper: balanced'], line['paper: long-tail'], line['paper: drop (points)']) == (80.15, 39.16, '41.0')
    assert line['pretrained on the target classes'] == 'no'
    assert cost_table(rows.assign(dataset='silk')).iloc[0]['paper: balanced'] == '–'
    pictured = cost_table(rows.assign(weights='imagenet')).iloc[0]
    assert pictured['paper: drop (points)'] == 'picture only, "small"'
    assert cost_table(rows[rows.setting == 'balanced']).empty


@pytest.mark.parametrize('weights, tail, word', [
    ('random', (50., 50.), 'supported'), ('random', (95., 95.), 'not supported'),
    ('random', (50., 95.), 'mixed: 1 of 2'), ('imagenet', (95., 95.), 'supported'),
    ('imagenet', (50., 50.), 'not supported')])
def test_verdicts_on_the_cost_of_a_long_tail(weights, tail, word):
    rows = pd.concat([trained({'balanced': [100.], 'long-tail': [value]}, weights, bits=(bits,))
                      for bits, value in zip((32, 64), tail)])
    assert longtail_claims(rows).verdict.tolist() == [word]


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))
def test_verdicts_count_every_comparison(positive, negative, rest):
    word = name_verdict(positive, negative, positive + negative + rest)
    if word.startswith('mixed'):
        assert sum(int(part.split()[0]) for part in word.removeprefix('mixed: ').split(', ')) \
            == positive + negative + rest
    else:
        assert [positive, negative, rest].count(0) >= 2
        assert word == ('supported' if positive else 'reversed' if negative else 'not significant')


def test_a_bar_for_every_setting_and_a_panel_for_every_network():
    rows = pd.concat([trained({'balanced': [60., 61.], 'long-tail': [30., 31.]}, w, bits=(32, 64))
                      for w in ('random', 'imagenet')])
    figure = setting_bars(rows)
    bars = [[c for c in axis.containers if isinstance(c, BarContainer)] for axis in figure.axes]
    assert [[len(c) for c in panel] for panel in bars] == [[2, 2], [2, 2]]
    assert 'not pretrained' not in figure.axes[0].get_title() and 'not pretrained' in figure.axes[1].get_title()


@pytest.mark.parametrize('rival, word', [([.60, .61, .62], 'supported'), ([.80, .81, .82], 'reversed'),
                                         ([.70, .71, .715], 'not significant')])
def test_the_verdict_follows_from_the_rows(rival, word):
    table = difference_verdicts(scores({'BSCDH': [.70, .71, .72], 'InfoNCE': rival}, bits=(16, 64)))
    assert table.verdict.tolist() == [word] and table.claim.tolist() == ['BSCDH outperforms InfoNCE']
    assert {'16 bits', '64 bits'} <= set(table)


def test_verdicts_of_code_lengths_that_disagree_and_of_one_seed():
    ours = [.7, .71]
    def verdict(at_16, at_64):
        return difference_verdicts(pd.concat([scores({'BSCDH': ours, 'CIBH': theirs}, bits=(b,))
                                              for b, theirs in ((16, at_16), (64, at_64))])).verdict[0]
    assert verdict([.6, .61], [.8, .81]) == 'mixed: 1 positive, 1 negative'
    assert verdict([.6, .61], [.7, .71]) == 'mixed: 1 positive, 1 not significant'
    assert difference_verdicts(scores({'BSCDH': [.9], 'CIBH': [.1]})).verdict[0] == 'undetermined: one seed'


@given(ours=st.lists(st.floats(0, 1), min_size=2, max_size=5), theirs=st.lists(st.floats(0, 1), min_size=2, max_size=5))
@settings(max_examples=30, deadline=None)
def test_differences_by_hand(ours, theirs):
    n = min(len(ours), len(theirs))                                # seeds that only one has do not count
    found = differences(scores({'BSCDH': ours, 'DCL': theirs}))
    assert len(found) == 1 and found.seeds[0] == n
    assert found.difference[0] == pytest.approx(np.mean(ours[:n]) - np.mean(theirs[:n]), abs=1e-12)
    pooled = np.sqrt((np.var(ours[:n], ddof=1) + np.var(theirs[:n], ddof=1))/2)
    assert found.spread[0] == pytest.approx(pooled, abs=1e-9)


def test_options_are_never_chosen_on_queries():
    frame = scores({'BSCDH': [.7, .8]}).assign(setting=['a', 'b'], level=['2', '1'])
    with pytest.raises(ValueError, match='validation'):
        best_setting(frame)
    held = frame.assign(protocol='validation')
    assert best_setting(held) == 'b' and best_setting(held, 'level') == '1'


def test_the_papers_numbers_stand_beside_ours():
    table = methods_table(scores({'BSCDH': [.30, .32], 'ITQ': [.2, .2]}, bits=(16, 64))).set_index('method')
    paper = reported('bscdh', table='table1', dataset='cifar10').set_index(['method', 'bits']).value
    assert table.loc['BSCDH', 'cifar10 16 bits'] == '0.310 ± 0.014'
    assert table.loc['BSCDH', 'paper cifar10 64'] == f"{paper['BSCDH', 64]:.3f}"
    assert table.loc['ITQ', 'paper cifar10 16'] == '–' and table.loc['ITQ', 'seeds'] == 2
    for method in ('DDCH', 'S2H', 'UDTrHash'):
        assert table.loc[method, 'seeds'] == 'reported, not run' and table.loc[method, 'cifar10 16 bits'] == '–'


def test_epochs_are_shown_where_methods_differ_in_them():
    rows = scores({'BSCDH': [.3], 'SSDH': [.2], 'ITQ': [.1]})
    same = methods_table(rows.assign(epochs=[200, 200, 0]))
    assert 'epochs' not in same
    table = methods_table(rows.assign(epochs=[200, 40, 0])).set_index('method')
    assert table.loc[['BSCDH', 'SSDH', 'ITQ'], 'epochs'].tolist() == ['200', '40', '–']


def test_an_ablation_has_a_line_per_level():
    rows = pd.DataFrame([dict(dataset='silk', factor='queue', level=level, group=g, protocol='paper', metric='mAP (%)',
                              value=v + s) for level, v in (('256', 10.), ('1024', 20.))
                         for g in ('all', 'head', 'mid', 'tail') for s in (0, 1)])
    table = ablation_table(rows)
    assert table['level'].tolist() == ['256', '1024'] and table['all'].tolist() == ['10.5 ± 0.7', '20.5 ± 0.7']


# What is on record.

def test_figure_1b_on_record(record):
    rows = record[(record.table == 'figure1b') & (record.group == 'all') & (record.protocol == 'paper')]
    table = cost_table(rows).set_index(['weights', 'bits'])['relative drop (%)']
    assert table.to_dict() == {('imagenet', 32): '29', ('imagenet', 64): '27', ('cifar10', 32): '35',
                               ('cifar10', 64): '37', ('random', 32): '21', ('random', 64): '22'}
    assert longtail_claims(rows).verdict.tolist() == ['mixed: 2 of 4', 'not supported']


def test_generated_images_on_record(record):
    rows = record[(record.table == 'generation') & (record.dataset == 'silk')]
    table = quality_table(rows, ['CAS (%)', 'KID', 'copies']).set_index('images')
    assert table.loc['AttnDreamBooth'].tolist() == ['20.0 ± 1.5', '14.22', '0.01']
    assert table.loc['real', 'copies'] == '–'
    assert quality_ranking(rows).verdict.tolist() == ['not significant', 'not significant', 'supported', 'reversed']


def test_unsupervised_rows_on_record(record):
    rows = record[(record.paper == 'bscdh') & (record.table == 'table1') & (record.protocol == 'paper')]
    assert difference_verdicts(rows).verdict.tolist() \
        == ['supported', 'supported', 'mixed: 1 negative, 2 not significant']
    assert methods_table(rows).set_index('method').loc['BSCDH', 'cifar10 64 bits'] == '0.414 ± 0.002'


def test_options_of_bscdh_on_record(record):
    rows = record[(record.table == 'lambda_b')]
    assert best_setting(rows[rows.protocol == 'validation'], 'level') == 'none'
    table = level_table(rows).set_index('level')
    assert table.loc['printed', 'mAP@5000'] == '0.338 ± 0.100' and set(table.seeds) == {3}
    hp_s = next(t for t in unsupervised_tables() if t.title.startswith('Table 4')).frame.set_index('hp_s')
    assert hp_s.loc['0.7', 'paper cifar10'] == '0.696' and hp_s.loc['0.7', 'mAP@5000'] == '0.394'


def test_the_card_of_the_photograph_generator_shows_the_rows_on_record(record):
    rows = record[(record.table == 'loom-natural') & (record.metric != 'diversity')]
    card = (ROOT/'data'/'loom-natural'/'README.md').read_text(encoding='utf-8')
    table = rows.pivot_table(index=['setting', 'guidance'], columns='metric', values='value', dropna=False)
    table = table.dropna(subset=['KID', 'top-1 agreement (%)'])
    assert len(table) == 4
    for _, r in table.iterrows():
        numbers = f"| {abs(r['KID']):.2f} | {r['top-1 agreement (%)']:.1f} % | {r['top-5 agreement (%)']:.1f} % |"
        assert numbers in card


def test_the_page_of_results_is_made_from_the_rows_on_record(record):
    page = (ROOT/'RESULTS.md').read_text(encoding='utf-8')
    assert page == results_page(), \
        "python -c \"from lthash.experiments.results import *; open('RESULTS.md', 'w').write(results_page())\""
    rows = record[(record.table == 'figure1b') & (record.group == 'all') & (record.protocol == 'paper')]
    assert markdown(cost_table(rows)) in page
    for table in page.split('\n### ')[1:]:
        assert 'Substitutes: ' in table, table.splitlines()[0]
