"Plans of augmentation as values: what they draw, what is refused, and labels of several classes."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lthash.augmentation import plan
from lthash.augmentation.plan import AblatedSyntheticConfig, AugmentConfig, as_labels, label_counts, mix
from lthash.diffusion.cas import CASFailed
from lthash.diffusion.synthetic import SyntheticConfig

COUNTS = st.lists(st.integers(1, 200), min_size=2, max_size=30)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(0, 50), st.one_of(st.none(), st.integers(1, 250)), st.floats(.05, 1.))
def test_a_plan_balances_and_draws_enough(counts, pretrain, balance, keep):
    config, counts = AugmentConfig(pretrain=pretrain, balance=balance, keep_fraction=keep), np.array(counts)
    wanted = config.wanted(counts)
    assert (wanted['pretrain'] == pretrain).all() and (wanted['balance'] >= 0).all()
    total, level = counts + wanted['balance'], counts.max() if balance is None else balance
    assert (total == np.maximum(counts, level)).all() and (balance is not None or len(set(total)) == 1)
    drawn = config.with_surplus(wanted['balance'])
    kept = np.array([max(1, round(keep*n)) if n else 0 for n in drawn])
    assert (kept >= wanted['balance']).all()


@pytest.mark.parametrize('bad, words', [
    (dict(pretrain=-1), 'counts'),
    (dict(pretrain_fraction=0.), 'pretrain_fraction'),
    (dict(keep_fraction=1.5), 'keep_fraction'),
    (dict(personalized=('rare',)), 'groups are'),
    (dict(pretrain=0, balance=0), 'plain Trial'),
])
def test_bad_plans_are_named(bad, words):
    with pytest.raises(ValueError, match=words):
        AugmentConfig(**bad)


def test_bad_ablations_are_named():
    with pytest.raises(ValueError, match='regulariser'):
        AblatedSyntheticConfig(regulariser='max')
    with pytest.raises(ValueError, match='has 3 stages'):
        AblatedSyntheticConfig(stages=4)


def test_regulariser_and_stages_change_the_recipe_only_where_they_say():
    full = AblatedSyntheticConfig(method='attndreambooth')
    assert full.recipe == SyntheticConfig(method='attndreambooth').recipe
    assert AblatedSyntheticConfig(stages=2).recipe.stages == full.recipe.stages[:2]
    assert {s.reduction for s in AblatedSyntheticConfig(regulariser='sum').recipe.stages} == {'sum'}
    off = AblatedSyntheticConfig(regulariser='off').recipe
    assert not any(s.regularised for s in off.stages)
    assert [s.steps for s in off.stages] == [s.steps for s in full.recipe.stages]


def test_the_same_images_by_other_words_have_one_identity():
    full = AblatedSyntheticConfig(method='attndreambooth')
    for same in (dict(stages=3), dict(regulariser='mean')):
        assert AblatedSyntheticConfig(method='attndreambooth', **same).identity == full.identity
    assert AblatedSyntheticConfig(stages=1, regulariser='sum').by_word.identity == full.by_word.identity


def test_labels_of_several_classes_are_counted_and_mixed():
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 0, 0], [0, 1, 1]])
    assert label_counts(labels, 3).tolist() == [4, 2, 2]
    assert label_counts(torch.tensor([2, 0, 2]), 4).tolist() == [1, 0, 2, 0]
    numbers = torch.tensor([1, 1, 2, 2])
    assert as_labels(numbers, labels).tolist() == [[0, 1, 0]]*2 + [[0, 0, 1]]*2
    real, made = torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.ones(4, 3, 8, 8, dtype=torch.uint8)
    x, y = mix(real, labels, made, numbers)
    assert y.sum(0).tolist() == [4, 4, 4] and y.shape == (9, 3) and len(x) == 9 and not x[:5].any() and x[5:].all()
    with pytest.raises(ValueError, match='one size'):
        mix(real, labels, made[..., :4], numbers)


def test_the_cas_test_leaves_out_what_cannot_be_tested(monkeypatch):
    images, labels = torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1, 2, 2])
    seen = []
    found = {'accuracy': 0., 'class accuracy': {}, 'confusion': (np.ones((2, 2))/2).tolist(), 'classes': [0, 1],
             'tested': 20, 'images': 4}
    monkeypatch.setattr(plan, 'cas', lambda x, y, *a, **k: seen.append(y.tolist()) or found)
    real, real_labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1])
    assert plan.tested(images, labels, real, real_labels, 0) is None                              # no test is wanted
    assert plan.tested(images, labels, real, torch.zeros(4, dtype=torch.int64), 64) is None   # one class only
    result = plan.tested(images, labels, real, real_labels, 64)
    assert seen == [[0, 0, 1, 1]] and not result.passed
    with pytest.raises(CASFailed):
        plan.tested(images, labels, real, real_labels, 64, required=True)
    assert len(seen) == 1                                                                    # from disk
