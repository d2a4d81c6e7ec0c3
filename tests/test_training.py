"The training loop: exact resume after real kills, guards, the order of images, several processes; and the identity of a trial."
import os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn

from lthash import trials
from lthash.backbones import save_weights
from lthash.training import AUGMENTATIONS, OPTIMIZERS, SCHEDULES, Recipe, batch_indices, encode, train
from lthash.trials import Trial

IMAGES = torch.randint(0, 256, (96, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(96) % 3

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.3), nn.Flatten(), nn.Linear(392, 8))
    def forward(self, x): return self.layers(x)

@given(n=st.integers(1, 70), batch=st.integers(1, 40), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_every_epoch_shows_every_image_once(n, batch, seed):
    epochs = 3
    steps = -(-epochs*n // batch)
    order = torch.cat([batch_indices(n, batch, s, seed) for s in range(steps)])
    assert len(order) == steps*batch
    for e in range(epochs): assert torch.equal(order[e*n:(e + 1)*n].sort().values, torch.arange(n))

def test_augmentation_differs_between_images_of_a_batch_and_repeats_with_the_seed():
    same = IMAGES[:1].repeat(6, 1, 1, 1)
    torch.manual_seed(3); a = AUGMENTATIONS['crop-flip'](same)
    torch.manual_seed(3); b = AUGMENTATIONS['crop-flip'](same)
    assert torch.equal(a, b) and a.shape == same.shape and 0 <= a.min() and a.max() <= 1
    assert len(torch.unique(a.flatten(1), dim=0)) == 6

def test_crop_of_the_whole_area_is_the_image_or_its_mirror():
    from lthash.training import RandomCropFlip
    x = AUGMENTATIONS['none'](IMAGES)
    y = RandomCropFlip(area=1.)(x)
    mirrored = [torch.allclose(b, a.flip(-1), atol=1e-5) for a, b in zip(x, y)]
    assert all(m or torch.allclose(a, b, atol=1e-5) for m, a, b in zip(mirrored, x, y)) and 20 < sum(mirrored) < 76

@pytest.mark.parametrize('name', SCHEDULES)
def test_schedules_start_at_one_and_never_rise(name):
    values = [SCHEDULES[name](t/100) for t in range(100)]
    assert values[0] == 1 and all(a >= b for a, b in zip(values, values[1:]))

KILLED = '''
import sys, time, torch; sys.path.insert(0, {tests!r})
from test_training import *
torch.set_num_threads(1)
class Slow(nn.CrossEntropyLoss):
    def forward(self, v, y): time.sleep(.02); return super().forward(v, y)
net = Net()
train(net, Slow(), IMAGES, LABELS, Recipe(passes=32*80, batch=32), folder=Path({folder!r}), checkpoint_seconds=.05)
save_weights(net, {folder!r} + '/final.safetensors')
'''

@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_every_optimiser_resumes_exactly(tmp_path, optimizer):
    class Dies(nn.CrossEntropyLoss):
        left = 7
        def forward(self, v, y):
            self.left -= 1
            if self.left < 0: raise KeyboardInterrupt
            return super().forward(v, y)
    recipe, straight, resumed = Recipe(passes=32*12, batch=32, optimizer=optimizer, rate=1e-3), Net(), Net()
    train(straight, nn.CrossEntropyLoss(), IMAGES, LABELS, recipe)
    with pytest.raises(KeyboardInterrupt): train(Net(), Dies(), IMAGES, LABELS, recipe, folder=tmp_path, checkpoint_seconds=0)
    nn.init.zeros_(resumed.layers[5].weight)
    train(resumed, nn.CrossEntropyLoss(), IMAGES, LABELS, recipe, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values()))

def test_a_killed_training_ends_with_the_same_bits(tmp_path):
    def start(folder):
        folder.mkdir(exist_ok=True)
        return subprocess.Popen([sys.executable, '-c', KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))], env={**os.environ, 'TQDM_DISABLE': '1'})
    assert start(tmp_path/'straight').wait(120) == 0
    saved, kills = tmp_path/'killed'/'checkpoint.safetensors', 0
    while kills < 2:
        process, before = start(tmp_path/'killed'), saved.stat().st_mtime_ns if saved.exists() else 0
        while process.poll() is None and (not saved.exists() or saved.stat().st_mtime_ns == before): time.sleep(.005)
        time.sleep(.1)                                    # somewhere behind a checkpoint
        process.send_signal(signal.SIGKILL); process.wait(); kills += 1
        assert saved.exists() and not (tmp_path/'killed'/'final.safetensors').exists()
    assert start(tmp_path/'killed').wait(120) == 0
    straight, killed = (load_file(tmp_path/f/'final.safetensors') for f in ('straight', 'killed'))
    assert straight.keys() == killed.keys() and all(torch.equal(straight[k], killed[k]) for k in straight)

def test_a_loss_that_is_not_a_number_stops_with_the_step():
    class Bad(nn.Module):
        def forward(self, v, y): return v.sum()*float('nan')
    with pytest.raises(FloatingPointError, match='step 1 of 10.*lower the rate'):
        train(Net(), Bad(), IMAGES, LABELS, Recipe(passes=320, batch=32))

def test_a_hopeless_run_is_stopped_aloud():
    class Flat(nn.Module):
        def forward(self, v, y): return 1. + 0*v.sum()
    with pytest.warns(UserWarning, match='hopeless'):
        history = train(Net(), Flat(), IMAGES, LABELS, Recipe(passes=4*300, batch=4))
    assert 'hopeless' in history['aborted'] and len(history['losses']) == 33

def test_learning_really_learns_and_encoding_matches_signs():
    labels = (IMAGES.float().mean((1, 2, 3)) > IMAGES.float().mean()).long()
    net = Net()
    history = train(net, nn.CrossEntropyLoss(), IMAGES, labels, Recipe(passes=32*100, batch=32, rate=3e-3, augmentation='none'))
    assert history['losses'][-1] < .5*history['losses'][0]
    codes = encode(net, IMAGES, batch=13)
    with torch.no_grad(): v = net.eval()(IMAGES.float()/255)
    assert np.array_equal(np.unpackbits(codes, axis=1)[:, :8], (v > 0).numpy())

PARALLEL = '''
import sys; sys.path.insert(0, {tests!r})
from test_training import *
from accelerate import Accelerator
seen = []
class Spy(nn.CrossEntropyLoss):
    def forward(self, v, y): seen.append(len(y)); return super().forward(v, y)
torch.set_num_threads(1)
net = Net().eval(); net.layers[1].eval()
train(net, Spy(), IMAGES, LABELS, Recipe(passes=64, batch=32, augmentation='none'))
assert seen == [16, 16], seen
rank = Accelerator(cpu=True).process_index
save_weights(net, {folder!r} + f'/{{rank}}.safetensors')
'''

def test_two_processes_share_each_batch_and_stay_equal(tmp_path):
    script = tmp_path/'parallel.py'
    script.write_text(PARALLEL.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script)], capture_output=True, text=True, timeout=180,
                          env={**os.environ, 'TQDM_DISABLE': '1', 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = (load_file(tmp_path/f'{r}.safetensors') for r in (0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a if 'running' not in k)      # batch statistics are each process's own

def test_trials_are_told_apart_by_every_field():
    base = Trial()
    changed = [replace(base, **{k: v}) for k, v in dict(dataset='cifar10', regime='long-tail', method='CSQ', preset='x', backbone='resnet20', initialisation='cifar10', bits=64, seed=1, size=64,
               recipe=Recipe(passes=1), imbalance='step', imbalance_factor=10., order_seed=1, train_per_class=5, val_per_class=5).items()]
    assert set(vars(base)) == {f for t in changed for f in vars(t) if getattr(t, f) != getattr(base, f)}
    from lthash.runs import digest
    assert len({digest(t) for t in [base, *changed]}) == len(changed) + 1

def test_an_unknown_regime_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('LTHASH_HOME', str(tmp_path))
    with pytest.raises(ValueError, match="'balanced' or 'long-tail'.*'wide-tail'"):
        trials.run(Trial(regime='wide-tail', train_per_class=8, val_per_class=4, recipe=Recipe(passes=64), imbalance='step', imbalance_factor=2.))
