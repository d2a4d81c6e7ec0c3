"Costs of trials: what is shared is counted once, budgets are equal, and counts are those of the data."
from dataclasses import replace

import numpy as np
import pytest

from lthash.data.config import load_data, training_set
from lthash.experiments.augmented_trials import AugmentedTrial
from lthash.experiments.baseline_trials import BaselineTrial
from lthash.experiments.costs import (
    TRAINING_IMAGES,
    cost_lines,
    costs,
    encoded_images,
    expected_counts,
    feature_images,
    forecast,
    needs,
    plan_costs,
    unet_load,
)
from lthash.experiments.trials import Trial
from lthash.experiments.unsupervised_trials import UnsupervisedTrial
from lthash.models.training import TrainConfig
from lthash.unsupervised.features import FeatureConfig, load_images, training_images

TINY = Trial(size=32, train_per_class=12, val_per_class=2, imbalance='natural',
             recipe=TrainConfig(samples=64, batch=32, lr=2e-3, augmentation='none'))
QUICK = dict(method='textual inversion', scale=.003, shots=3, steps=2, batch=4, guidance=1.)
FRESH = FeatureConfig('cifar10', 'vgg16', 'imagenet', size=224, stored=32, views=0, train_images=5000)


def test_shared_concepts_and_images_are_counted_once():
    counts = np.array([48, 16, 2, 1])
    trial = replace(TINY, dataset='imagenette', train_per_class=None, val_per_class=None)
    long = replace(trial, bits=64)
    trials = [trial, AugmentedTrial.of(trial, dict(pretrain=10), **QUICK),
              AugmentedTrial.of(long, dict(pretrain=10), **QUICK), AugmentedTrial.of(long, dict(pretrain=30), **QUICK)]
    table = costs(trials, counts, 1e10)
    real, synthetic = 67, 4*10 + 3*48 - 19
    assert table['images'].tolist() == [4*48, *[real + synthetic]*2, real + synthetic + 80]
    hours, disk = table['generator or encoder (h)'], table['disk (GB)']
    assert hours[0] == hours[2] == disk[0] == disk[2] == 0 < hours[1]
    assert hours[3] == pytest.approx(80*2*unet_load('loom').flops/1e10/3600)
    assert disk[3] == pytest.approx(80*3*32**2/1e9)
    assert (table['training (h)'] == table['training (h)'][0]).all()          # equal budgets
    assert table['needs'][1].endswith(', data/loom') and 'imagenette2-160.tgz' in table['needs'][1]
    assert len(costs([trial, trial], counts, 1e10)) == 1


def test_expected_counts_are_those_of_the_data():
    _, counts = training_set(replace(TINY, train_set='long-tail'), load_data(TINY))
    assert (expected_counts(TINY) == counts).all()
    assert expected_counts(Trial(dataset='imagenette')).max() == 858 - 50
    assert {len(v) for v in TRAINING_IMAGES.values()} == {10, 20, 200}


@pytest.mark.parametrize('changes', [{}, {'train_images': 50}, {'imbalance_factor': 4.}])
def test_expected_training_images_are_those_of_the_data(changes):
    config = FeatureConfig(size=32, train_per_class=12, val_per_class=2, **changes)
    assert feature_images(config) == len(training_images(config, *load_images(config)))


def test_every_kind_of_trial_has_a_line():
    kinds = [TINY, BaselineTrial.of(TINY, 'mixup'), AugmentedTrial.of(TINY, dict(pretrain=10), **QUICK),
             UnsupervisedTrial(), UnsupervisedTrial('LSH'), UnsupervisedTrial(features=FRESH)]
    table = costs(kinds, None, 1e10)
    assert len(table) == len(kinds) and table.notna().all().all()
    assert 'mixup' in table.trial[1] and 'textual-inversion' in table.trial[2]
    assert table['training samples'].tolist()[4] == 0 and table['training (h)'][4] == 0      # LSH is not trained
    assert table['generator or encoder (h)'][4] == 0                    # its features are those of the line before
    assert 'VGG16' in needs(kinds[5])[1] and 'cifar-10' in needs(kinds[5])[0]


def test_views_drawn_anew_pass_through_the_encoder_at_every_step():
    assert encoded_images(UnsupervisedTrial(features=FRESH, epochs=2)) == (5000, 2*2*5000)
    assert encoded_images(UnsupervisedTrial(features=replace(FRESH, views=8), epochs=2)) == (9*5000, 0)
    assert encoded_images(UnsupervisedTrial('LSH', features=FRESH)) == (5000, 0)


def test_a_trial_stands_with_the_first_notebook_that_needs_it():
    long = replace(TINY, train_set='long-tail')
    table = forecast({'one': [TINY], 'other': [TINY, long]}, 1e10)
    assert table.notebook.tolist() == ['one', 'other']
    lines = list(cost_lines({'one': [TINY], 'other': [TINY, long]}))
    assert sum(TINY.title in line for line in lines) == 1 and lines[-1] == 'to be there: nothing'


def test_planned_hours_follow_the_assumed_rates():
    trial = UnsupervisedTrial(features=FRESH)
    tables = {'table1': [trial, replace(trial, method='LSH')], 'table4': [trial, replace(trial, bits=16)]}
    plan = plan_costs(tables)
    assert plan.table.tolist() == ['table1', 'table4'] and not plan.trial.duplicated().any()
    assert plan.hours.tolist() == pytest.approx([(2*200*5000/3000 + 200*5000/64*.004)/3600]*2)
    assert plan_costs(tables, images_per_second=300.).hours.sum() > 5*plan.hours.sum()
