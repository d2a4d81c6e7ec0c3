"Comparisons, verdicts and the table beside the paper's numbers."
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lthash.core.report import read_rows, row_frame
from lthash.data.base import retrieval_split
from lthash.data.config import load_data
from lthash.evaluation.metrics import mean_average_precision
from lthash.experiments.trials import GROUPS, Trial
from lthash.experiments.verdicts import (
    COMPARED,
    best_baseline,
    by_claim,
    compare,
    comparison_table,
    comparisons_table,
    forest_plot,
    judge,
    query_ap,
    recorded,
    verdict_table,
)
from lthash.models.training import TrainConfig

ROOT = Path(__file__).parents[2]


def rows_of(values: dict) -> pd.DataFrame:
    "Rows of {setting: mAP}, two seeds one point apart, the same for every group of classes."
    return pd.DataFrame([dict(dataset='imagenette', method='OrthoHash', backbone='resnet20', weights='random', bits=64,
                              setting=setting, group=group, seed=seed, value=value + seed)
                         for setting, value in values.items() for group in GROUPS for seed in (0, 1)])


def comparison(low: float, high: float, claim='a before b', dataset='silk', bits=32) -> dict:
    return dict(claim=claim, dataset=dataset, method='OrthoHash', backbone='alexnet-small', bits=bits, setting='',
                difference=(low + high)/2, low=low, high=high, p=.5)


def test_table_arithmetic_beside_the_paper():
    rows = rows_of({'balanced': 60., 'long-tail': 20., 'attndreambooth': 50.})
    table = comparison_table(rows, 'table1', ['balanced', 'long-tail']).set_index('setting')
    assert table.loc['attndreambooth', 'gap recovered (%)'] == '75' and table.loc['balanced', 'mAP (%)'] == '60.5 ± 0.7'
    paper = 100*(78.43 - 39.16)/(80.15 - 39.16)
    assert table.loc['attndreambooth', 'paper: gap recovered (%)'] == f'{paper:.0f}'
    assert table.loc['long-tail', 'paper'] == '39.2' and set(table["paper's network"]) == {'ResNet50'}
    nothing_lost = comparison_table(rows_of({'balanced': 20., 'long-tail': 20., 'attndreambooth': 50.}), 'table1')
    assert nothing_lost.set_index('setting').loc['attndreambooth', 'gap recovered (%)'] == '–'
    assert not [c for c in comparison_table(rows) if c.startswith('paper')]


def test_table_2_takes_the_papers_gap_from_its_other_tables():
    rows = rows_of({'balanced': 60., 'long-tail': 20., 'dreambooth': 30.})
    table = comparison_table(rows, 'table2').set_index('setting')
    assert table.loc['long-tail', 'paper'] == '–' and table.loc['dreambooth', 'paper: gap recovered (%)'] != '–'


@pytest.mark.parametrize('intervals, word', [
    (((1, 2), (3, 4)), 'supported'), (((-2, -1), (-4, -3)), 'reversed'), (((-1, 2), (-3, 4)), 'not significant'),
    (((1, 2), (-3, 4)), 'mixed: 1 positive, 1 not significant'), (((1, 2), (-3, -1)), 'mixed: 1 positive, 1 negative')])
def test_verdict_words(intervals, word):
    comparisons = pd.DataFrame([comparison(*i, bits=bits) for bits, i in zip((32, 64), intervals)])
    assert judge(comparisons) == word
    line = verdict_table(comparisons).iloc[0]
    assert (line.verdict, line.comparisons, line['data set']) == (word, 2, 'silk')


def test_every_comparison_is_drawn_where_it_lies_and_every_claim_judged():
    comparisons = pd.DataFrame([comparison(1., 2.), comparison(-1., 1., bits=64),
                                comparison(-4., -2., dataset='imagenette')])
    axes = forest_plot(comparisons).axes
    drawn = [[(dots.get_xdata()[0], dots.get_color(), whiskers.get_segments()[0][:, 0].tolist())
              for dots, _, (whiskers,) in axis.containers] for axis in axes]
    assert drawn == [[(1.5, '#0072B2', [1., 2.]), (0., '0.5', [-1., 1.])], [(-3., '#D55E00', [-4., -2.])]]
    assert [[t.get_text().replace('\n', ' ') for t in axis.texts] for axis in axes] \
        == [['mixed: 1 positive, 1 not significant'], ['reversed']]
    assert [axis.get_title() for axis in axes] == ['silk', 'imagenette']
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ['a before b']


def test_the_baseline_is_chosen_on_validation_images_and_never_on_queries():
    queries = rows_of({'mixup': 30., 'SMOTE': 31., 'LTHNet': 70., 'extra real images': 90., 'duplicates': 80.})
    held = rows_of({'mixup': 41., 'SMOTE': 40., 'LTHNet': 12., 'extra real images': 90., 'duplicates': 80.})
    queries, held = queries.assign(protocol='paper'), held.assign(protocol='validation')
    assert best_baseline(pd.concat([queries, held])) == 'mixup'
    assert best_baseline(held, ['SMOTE', 'duplicates']) == 'duplicates'
    with pytest.raises(ValueError, match='validation'):
        best_baseline(queries)


def test_comparisons_are_found_among_other_rows():
    empty = comparisons_table(row_frame([{'metric': 'mAP (%)', 'value': 3.}]))
    assert empty.empty and 'claim' in empty and verdict_table(empty).empty
    wanted = dict(zip(COMPARED, (2., 1., 3., .01)))
    rows = row_frame([dict(claim='x', dataset='silk', method='CSQ', bits=32, metric=m, value=wanted[k])
                      for k, m in COMPARED.items()] + [{'metric': 'mAP (%)', 'value': 3.}])
    assert comparisons_table(rows)[list(COMPARED)].iloc[0].to_dict() == wanted


def test_a_comparison_goes_through_rows_and_back(tmp_path):
    tiny = dict(imbalance='natural', train_per_class=12, val_per_class=2, bits=16,
                recipe=TrainConfig(samples=64, batch=32, lr=2e-3, augmentation='none'))
    a, b = ([Trial(train_set=name, seed=seed, **tiny) for seed in (0, 1)] for name in ('balanced', 'long-tail'))
    rows = row_frame(compare('balanced is better', a, b) + compare('balanced is worse', b, a, setting='long-tail'))
    rows.to_csv(tmp_path/'rows.csv', index=False)
    table = comparisons_table(read_rows(tmp_path/'rows.csv')).set_index('claim')
    def mean(trials):
        return np.mean([query_ap(trial).mean() for trial in trials])
    difference = table.loc['balanced is better', 'difference']
    assert difference == pytest.approx(100*(mean(a) - mean(b)), abs=1e-3)
    assert difference == pytest.approx(-table.loc['balanced is worse', 'difference'], abs=1e-3)
    assert (table.low <= table.difference).all() and (table.difference <= table.high).all()
    assert table.p.between(0, 1).all()
    assert table.setting.tolist() == ['', 'long-tail']
    data, codes = load_data(a[0]), a[0].codes()
    part, labels = retrieval_split(data, 'paper'), data.labels.numpy()
    whole = mean_average_precision(codes[part.query], labels[part.query], codes[part.database], labels[part.database])
    assert query_ap(a[0]).mean() == pytest.approx(whole, abs=1e-12)
    with pytest.raises(ValueError, match='as many seeds'):
        compare('x', a, b[:1])


# What is on record.

def test_claims_on_record():
    found = comparisons_table(pd.concat([recorded('table1'), recorded('verdict'), recorded('ablations')]))
    verdicts = {(claim, dataset): judge(own) for claim, dataset, own in by_claim(found)}
    assert len(found) == 51 and len(verdicts) == 27
    assert verdicts['AttnDreamBooth images improve long-tailed hashing', 'silk'] == 'mixed: 4 positive, 2 negative'
    assert verdicts['AttnDreamBooth images improve long-tailed hashing', 'imagenette'] \
        == 'mixed: 2 positive, 4 negative'
    assert verdicts['AttnDreamBooth outperforms DreamBooth', 'imagenette'] == 'supported'
    assert verdicts['augmentation improves every hashing method', 'imagenette'] == 'reversed'
    for dataset in ('silk', 'imagenette'):
        assert verdicts['diffusion augmentation outperforms the best generator-free baseline', dataset] == 'reversed'
        assert verdicts['extra real images outperform diffusion augmentation', dataset] == 'supported'


def test_table_1_on_record():
    rows = recorded('table1')
    rows = rows[(rows.protocol == 'paper') & (rows.metric == 'mAP (%)') & (rows.bits == 64)]
    table = comparison_table(rows, 'table1').set_index(['data set', 'network', 'setting'])
    assert table.loc[('silk', 'resnet20', 'attndreambooth'), 'gap recovered (%)'] == '13'
    assert table.loc[('imagenette', 'resnet20', 'attndreambooth'), 'gap recovered (%)'] == '-20'
    assert table.loc[('imagenette', 'resnet20', 'attndreambooth'), 'paper: gap recovered (%)'] == '96'
    assert table.loc[('imagenette', 'vit-small', 'attndreambooth'), 'gap recovered (%)'] == '–'   # no gap to recover


def test_rows_are_recorded_by_table_paper_and_setting():
    assert len(recorded('baselines')) == 798 and len(recorded('lambda_b', 'bscdh')) == 24
    assert recorded('lambda_b').empty and recorded('figure1b', needs='attndreambooth').empty
    assert len(recorded('table1', needs='attndreambooth')) == 948
