"The remedies against independent references, their controls, and the comparison's arithmetic."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from lthash import augmentation, baselines, hashing, studies, trials, verdicts
from lthash.baselines import TECHNIQUES, Baseline, Blended, LogitAdjusted, Selection, Views, Weighted, duplicated, effective_weights, resampled, smote
from lthash.verdicts import best_cheap, comparison_table, contrast, contrast_table, forest, paired_bootstrap, verdict
from lthash.training import Recipe, batch_indices

TINY = trials.Trial(size=32, recipe=Recipe(passes=64, batch=32, rate=2e-3, augmentation='none'), train_per_class=12, val_per_class=2, imbalance='natural', bits=32)
labels = st.lists(st.integers(1, 12), min_size=2, max_size=6).map(lambda counts: torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)))

@settings(max_examples=30, deadline=None)
@given(labels, st.integers(0, 3))
def test_copies_are_even_to_one(y, seed):
    at = duplicated(y, seed)
    assert (torch.bincount(y[at]) == torch.bincount(y).max()).all()
    for c in y.unique():
        times = torch.bincount(at, minlength=len(y))[y == c]
        assert times.max() - times.min() <= 1

def test_resampling_is_even_over_classes_and_within_them():
    y = torch.tensor([0]*9 + [1])
    shown = torch.bincount(resampled(y, 20_000), minlength=10)
    assert abs(int(shown[9]) - 10_000) < 400 and (abs(shown[:9] - 10_000/9) < 200).all()
    assert torch.equal(resampled(y, 50, 1), resampled(y, 50, 1)) and not torch.equal(resampled(y, 50, 1), resampled(y, 50, 2))

def test_a_selection_trains_as_the_copied_images_do():
    images, order = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8), torch.tensor([5, 0, 0, 3])
    index = batch_indices(4, 3, 1, 0)
    assert torch.equal(Selection(images, order).to('cpu')[index], images[order][index]) and len(Selection(images, order)) == 4

def test_effective_numbers_follow_the_formula():
    w = effective_weights(np.array([1, 10, 100]), .9)
    raw = np.array([.1/(1 - .9**n) for n in (1, 10, 100)])
    np.testing.assert_allclose(w, raw*3/raw.sum(), rtol=1e-5)
    np.testing.assert_allclose(effective_weights(np.array([1, 10, 100]), 0.), 1.)
    near_one = effective_weights(np.array([1, 10, 100]), .999999)
    np.testing.assert_allclose(near_one/near_one[0], [1, .1, .01], rtol=1e-3)       # beta to 1: the inverse count

@pytest.mark.parametrize('method', ['orthohash', 'csq', 'dpn'])
@pytest.mark.parametrize('multi', [False, True])
def test_weights_are_those_of_single_images_for_every_loss(method, multi):
    torch.manual_seed(0)
    _, loss = hashing.build(method, 'alexnet-small', 'random', 32, 5, 32)
    v, y = torch.tanh(torch.randn(9, 32)), torch.randint(0, 5, (9,))
    w = effective_weights(np.array([50, 20, 9, 3, 1]), .99)
    if multi: y = (torch.rand(9, 5) < .5).long().index_fill(1, torch.tensor([2]), 1)
    own = w[y] if not multi else (y*w).sum(1)/y.sum(1)
    each = torch.stack([loss(v[[i]], y[[i]]) for i in range(9)])
    torch.testing.assert_close(Weighted(loss, w)(v, y), (each*own).mean())
    torch.testing.assert_close(Weighted(loss, torch.ones(5))(v, y), loss(v, y))

def test_logit_adjustment_against_its_equation_and_where_it_does_not_exist():
    loss = hashing.OrthoHash(hashing.bernoulli_codebook(4, 16), margin=.2)
    v, y, counts = torch.randn(7, 16), torch.randint(0, 4, (7,)), np.array([40, 20, 5, 1])
    logits = loss.scale*(nn.functional.normalize(v)@nn.functional.normalize(loss.codebook).T - .2*nn.functional.one_hot(y, 4)) + torch.tensor(counts/counts.sum()).log().float()
    torch.testing.assert_close(LogitAdjusted(loss, counts)(v, y), nn.functional.cross_entropy(logits, y))
    with pytest.raises(ValueError, match='needs a loss with logits.*CSQ'): LogitAdjusted(hashing.CSQ(hashing.hadamard_codebook(4, 16)), counts)

class Mean(nn.Module):
    def forward(self, x): return x.flatten(1)

@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_blends_have_the_share_they_claim(kind):
    torch.manual_seed(3)
    x = torch.eye(8).reshape(8, 8, 1, 1).expand(8, 8, 16, 16)[:, :3].contiguous()      # image i is white in channel i
    views = Views(Mean(), kind).train()
    for _ in range(5):
        made = views(x).reshape(8, 3, 256)
        share, partner = views.mix
        torch.testing.assert_close(made.mean(2), share*x.mean((2, 3)) + (1 - share)*x[partner].mean((2, 3)), atol=1e-5, rtol=1e-4)
    assert torch.equal(views.eval()(x), x.flatten(1))                                  # nothing is changed when it encodes
    loss = lambda v, y: (v.mean(1)*y).mean()
    y, v = torch.rand(8), torch.rand(8, 4)
    torch.testing.assert_close(Blended(loss, views)(v, y), share*loss(v, y) + (1 - share)*loss(v, y[partner]))

def test_randaugment_keeps_range_and_differs_by_image():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 32, 32).expand(12, 3, 32, 32)
    made = Views(Mean(), 'randaugment').train()(x)
    assert 0 <= made.min() and made.max() <= 1 and len({m.numpy().tobytes() for m in made}) > 6

@settings(max_examples=30, deadline=None)
@given(labels, st.integers(0, 3))
def test_smote_stays_on_segments_of_its_class(y, seed):
    x = torch.randn(len(y), 3, generator=torch.Generator().manual_seed(seed))
    X, Y = smote(x, y, seed=seed)
    assert torch.equal(X[:len(x)], x) and (torch.bincount(Y) == torch.bincount(y).max()).all()
    for c in y.unique():
        own, new = x[y == c], X[len(x):][Y[len(x):] == c]
        assert (new >= own.amin(0) - 1e-5).all() and (new <= own.amax(0) + 1e-5).all()
        if len(own) == 2 and len(new): assert (torch.cdist(new, own).sum(1) - torch.dist(*own)).abs().max() < 1e-4

@pytest.mark.parametrize('technique', list(TECHNIQUES))
def test_every_technique_trains_within_the_budget_and_leaves_rows(technique, monkeypatch):
    shown, original = [], augmentation.train
    def count(net, loss, images, labels, recipe, *a, **k): shown.append(recipe.passes); return original(net, loss, images, labels, recipe, *a, **k)
    monkeypatch.setattr(augmentation, 'train', count); monkeypatch.setattr(baselines, 'train', count)
    cell = Baseline.of(replace(TINY, recipe=replace(TINY.recipe, passes=64 + list(TECHNIQUES).index(technique))), technique)
    rows = studies.run_cells([cell], 'baselines')
    assert sum(shown) == cell.recipe.passes
    assert len(rows) == 9 and [r['protocol'] for r in rows].count('validation') == 1 and {r['variant'] for r in rows} == {technique} and all(0 < r['value'] <= 100 for r in rows) and f'{cell.recipe.passes} image passes' in rows[0]['note']
    shown.clear()
    assert studies.run_cells([cell], 'baselines') == rows and not shown             # from disk
    assert len(studies.cell_codes(cell)) == len(trials.load_data(cell))

def test_frozen_features_do_not_move():
    cell = Baseline.of(TINY, 'decoupled re-training')
    data = trials.load_data(cell)
    chosen, counts = trials.training_set(cell, data)
    import tempfile, pathlib
    before, *_ = baselines._features_first(cell, data, chosen, counts)
    with tempfile.TemporaryDirectory() as folder: after, _ = TECHNIQUES[cell.technique](cell, data, chosen, counts, pathlib.Path(folder))
    for (name, a), b in zip(before.backbone.state_dict().items(), after.backbone.state_dict().values()): assert torch.equal(a, b), name
    assert any(not torch.equal(a, b) for a, b in zip(before.head.parameters(), after.head.parameters()))

def test_the_upper_bound_holds_the_long_tail(monkeypatch):
    seen = {}
    monkeypatch.setattr(baselines, 'in_turn', lambda t, net, loss, images, labels, *a: seen.update(images=images, labels=labels) or {'losses': [], 'seconds': 0., 'aborted': ''})
    data = trials.load_data(TINY)
    chosen, counts = trials.training_set(replace(TINY, regime='long-tail'), data)
    TECHNIQUES['extra real images'](Baseline.of(TINY, 'extra real images'), data, chosen, counts, None)
    assert (torch.bincount(seen['labels']) == counts.max()).all()
    have = {i.numpy().tobytes() for i in seen['images']}
    assert all(i.numpy().tobytes() in have for i in data.images[chosen])
    query = trials.datasets.retrieval_split(data, 'paper').query
    assert not any(i.numpy().tobytes() in have for i in data.images[query])

def test_bad_technique_is_named():
    with pytest.raises(ValueError, match='technique is one of duplicates.*found .magic.'): Baseline(technique='magic')

def test_bootstrap_covers_and_pairs():
    rng = np.random.default_rng(0)
    hard = rng.random(400)                                   # queries differ much, methods little
    found = paired_bootstrap(hard + .02 + .01*rng.standard_normal(400), hard)
    assert .015 < found['low'] < .02 < found['high'] < .025 and found['p'] < .01
    inside = sum(b['low'] <= 0 <= b['high'] for b in (paired_bootstrap(rng.standard_normal(80), rng.standard_normal(80), draws=1000, seed=i) for i in range(100)))
    assert 88 <= inside <= 100
    a, b = rng.random(30), rng.random(30)
    one, other = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert one['difference'] == -other['difference'] and abs(one['low'] + other['high']) < 1e-12
    with pytest.raises(ValueError, match='same queries'): paired_bootstrap(a, b[:-1])

def rows_of(values):
    return pd.DataFrame([dict(dataset='imagenette', method='OrthoHash', backbone='resnet20', initialisation='random', bits=64, variant=v, group=g, seed=s, value=x + s)
                         for v, x in values.items() for g in trials.GROUPS for s in (0, 1)])

def test_table_arithmetic_beside_the_paper():
    table = comparison_table(rows_of({'balanced': 60., 'long-tail': 20., 'attndreambooth': 50.}), 'table1', ['balanced', 'long-tail']).set_index('trained on')
    assert table.loc['attndreambooth', 'won back'] == '75 %' and table.loc['balanced', 'mAP (%)'] == '60.5 ± 0.7'
    paper = 100*(78.43 - 39.16)/(80.15 - 39.16)
    assert table.loc['attndreambooth', 'paper: won back'] == f'{paper:.0f} %' and table.loc['long-tail', 'paper'] == '39.2'
    nothing_lost = comparison_table(rows_of({'balanced': 20., 'long-tail': 20., 'attndreambooth': 50.}), 'table1').set_index('trained on')
    assert nothing_lost.loc['attndreambooth', 'won back'] == '–'

def test_verdict_words():
    line = lambda low, high: dict(claim='a before b', dataset='silk', comparison='x', difference=(low + high)/2, low=low, high=high, p=.5)
    for pair, word in (((1, 2), (3, 4)), 'holds'), (((1, 2), (-3, 4)), 'holds in part'), (((-1, 2), (-3, 4)), 'is not shown'), (((-2, -1), (-4, -3)), 'is reversed'):
        assert f'**{word}**' in verdict(pd.DataFrame([line(*p) for p in pair]))

def test_every_comparison_is_drawn_where_it_lies_and_every_claim_judged():
    told = pd.DataFrame([dict(claim='a before b', dataset='silk', comparison='x', difference=1.5, low=1., high=2., p=.01), dict(claim='a before b', dataset='silk', comparison='y', difference=0., low=-1., high=1., p=.9),
                         dict(claim='a before b', dataset='imagenette', comparison='x', difference=-3., low=-4., high=-2., p=.01)])
    axes = forest(told).axes
    drawn = [[(dots.get_xdata()[0], dots.get_color(), whiskers.get_segments()[0][:, 0].tolist()) for dots, _, (whiskers,) in axis.containers] for axis in axes]
    assert drawn == [[(1.5, '#0072B2', [1., 2.]), (0., '0.5', [-1., 1.])], [(-3., '#D55E00', [-4., -2.])]]
    assert [[t.get_text() for t in axis.texts] for axis in axes] == [['holds in part'], ['is reversed']]
    assert [axis.get_title() for axis in axes] == ['silk', 'imagenette'] and [t.get_text() for t in axes[0].get_yticklabels()] == ['a before b']

def test_the_cheap_remedy_is_chosen_on_validation_images_and_never_on_queries():
    queries = rows_of({'mixup': 30., 'SMOTE': 31., 'LTHNet': 70., 'extra real images': 90., 'duplicates': 80.}).assign(protocol='paper')
    held = rows_of({'mixup': 41., 'SMOTE': 40., 'LTHNet': 12., 'extra real images': 90., 'duplicates': 80.}).assign(protocol='validation')
    assert best_cheap(pd.concat([queries, held])) == 'mixup'
    with pytest.raises(ValueError, match='validation'): best_cheap(queries)

def test_validation_images_are_no_queries_and_their_measure_is_that_of_the_codes():
    cell = Baseline.of(replace(TINY, seed=3), 'duplicates')
    measured = cell.run()['validation']['mAP']
    data, codes = trials.load_data(cell), cell.codes()
    part, labels = trials.datasets.retrieval_split(data, 'paper'), data.labels.numpy()
    assert not set(part.validation.tolist()) & (set(part.query.tolist()) | set(part.train.tolist()))
    bits = lambda at: np.unpackbits(codes[at], axis=1).astype(int)
    distance = (bits(part.validation)[:, None] != bits(part.train)[None]).sum(2)
    def ap(d, relevant):                                       # ties in expectation, by brute force over random orders
        rng, found = np.random.default_rng(0), []
        for _ in range(300):
            hit = relevant[np.lexsort((rng.random(len(d)), d))]
            found.append((np.cumsum(hit)/np.arange(1, len(hit) + 1))[hit].mean())
        return np.mean(found)
    brute = np.mean([ap(d, labels[part.train] == y) for d, y in zip(distance, labels[part.validation])])
    assert abs(measured - brute) < .01

def test_a_comparison_goes_through_rows_and_back(tmp_path):
    a, b = ([replace(Baseline.of(TINY, name), seed=s) for s in (0, 1)] for name in ('duplicates', 'resampling'))
    for cell in (*a, *b): cell.run()
    rows = pd.DataFrame(contrast('copies are better', 'silk', a, b) + contrast('copies are worse', 'silk', b, a))
    rows.to_csv(tmp_path/'rows.csv', index=False)
    table = contrast_table(pd.read_csv(tmp_path/'rows.csv')).set_index('claim')
    mean = lambda cells: np.mean([verdicts.query_ap(c).mean() for c in cells])
    assert table.loc['copies are better', 'difference'] == pytest.approx(100*(mean(a) - mean(b)), abs=1e-3) == pytest.approx(-table.loc['copies are worse', 'difference'], abs=1e-3)
    assert (table.low <= table.difference).all() and (table.difference <= table.high).all() and table.p.between(0, 1).all()
    with pytest.raises(ValueError, match='as many seeds'): contrast('x', 'silk', a, b[:1])
