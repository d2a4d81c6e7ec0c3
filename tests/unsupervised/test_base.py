"Training of unsupervised methods: validation without labels, exact resume, several optimisers, clear errors."
from dataclasses import replace

import numpy as np
import pytest
import torch

from lthash.models.training import TrainConfig
from lthash.unsupervised.base import UnsupervisedMethod, fit_codes, make_method, validation_map
from lthash.unsupervised.bscdh import BSCDH
from lthash.unsupervised.contrastive import CIBH, DCL, InfoNCE
from lthash.unsupervised.features import Features
from lthash.unsupervised.methods import unsupervised_method

OPTIONS = {CIBH: dict(hidden=16), InfoNCE: dict(hidden=16, queue=24), DCL: dict(hidden=16, queue=24),
           BSCDH: dict(hidden=16, queue=24, suppressed=.25)}
RECIPE = TrainConfig(samples=8*40, batch=8, optimizer='sgd', lr=.01, schedule='constant')


class Killed(Exception):
    "The end of a process."


@pytest.mark.parametrize('kind', OPTIONS)
def test_learns_and_validates_without_labels(kind, small):
    data = small()
    net = make_method(kind, 12, 16, seed=1, **OPTIONS[kind])
    recipe = replace(kind.recipe, samples=60*15, batch=8)
    result = fit_codes(net, data, recipe, checks=3)
    assert len(result['checks']) == 3 and result['best'] in [c['epoch'] for c in result['checks']]
    rng = np.random.default_rng(0)
    noise = [replace(data, clean=torch.from_numpy(rng.normal(size=data.clean.shape)).half()) for _ in range(3)]
    random = np.mean([validation_map(make_method(kind, 12, 16, seed=s, **OPTIONS[kind]), noise[s]) for s in range(3)])
    assert max(c['validation'] for c in result['checks']) > random + .15
    shuffled = replace(data, labels=data.labels[torch.randperm(len(data.labels))])     # other labels, same training
    again = make_method(kind, 12, 16, seed=1, **OPTIONS[kind])
    assert fit_codes(again, shuffled, recipe, checks=0)['losses'] == result['losses']


@pytest.mark.parametrize('kind', OPTIONS)
def test_killed_and_resumed_is_the_same(kind, tmp_path, small):
    data, calls = small(), []
    whole = make_method(kind, 12, 16, seed=2, **OPTIONS[kind])
    expected = fit_codes(whole, data, RECIPE, seed=5, checks=4)

    class Dying(Features):
        def pair(self, index):
            calls.append(1)
            if len(calls) == 27:
                raise Killed
            return super().pair(index)

    dying = Dying(**{name: vars(data)[name] for name in data.__dataclass_fields__})
    net = make_method(kind, 12, 16, seed=2, **OPTIONS[kind])
    with pytest.raises(Killed):
        fit_codes(net, dying, RECIPE, seed=5, checks=4, folder=tmp_path, checkpoint_seconds=0)
    net = make_method(kind, 12, 16, seed=99, **OPTIONS[kind])                           # all state is in the checkpoint
    resumed = fit_codes(net, data, RECIPE, seed=5, checks=4, folder=tmp_path, checkpoint_seconds=0)
    assert {**resumed, 'seconds': 0} == {**expected, 'seconds': 0}
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), whole.state_dict().values()))


def test_two_players_move_only_their_own_weights(small):
    class Game(UnsupervisedMethod):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(12, 8), torch.nn.Linear(8, 1)

        def forward(self, f):
            return self.a(f)

        def optimizers(self, config):
            return [torch.optim.SGD(self.a.parameters(), .1), torch.optim.SGD(self.b.parameters(), .1)]

        def losses(self, batch):
            value = self.b(self.a(batch.clean)).mean()
            return [value, -value]

    net = Game()
    a, b, bias = net.a.weight.detach().clone(), net.b.weight.detach().clone(), net.a.bias.detach().clone()
    f = small().clean[:60].float()
    fit_codes(net, small(), TrainConfig(samples=60, batch=60, schedule='constant'), checks=0)
    assert torch.allclose(net.a.weight, a - .1*b.T @ f.mean(0, keepdim=True), atol=1e-5)
    assert torch.allclose(net.b.weight, b + .1*(f.mean(0) @ a.T + bias), atol=1e-5)


def test_clear_errors(small):
    with pytest.raises(ValueError, match='queue=30 or less'):
        fit_codes(make_method(InfoNCE, 12, 8, queue=40), small(), RECIPE)
    with pytest.raises(ValueError, match='method is one of .*BSCDH'):
        unsupervised_method('BSDCH')
    with pytest.raises(ValueError, match='does not take'):
        make_method(DCL, 12, 8, tau=3)
    with pytest.raises(FloatingPointError, match='lower the rate'):
        fit_codes(make_method(CIBH, 12, 8, hidden=16), small(), replace(RECIPE, lr=1e30))
