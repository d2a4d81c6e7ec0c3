"The training loop: exact resume after real kills, guards, the order of images, several processes."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from lthash.models.training import (
    AUGMENTATIONS,
    OPTIMIZERS,
    SCHEDULES,
    RandomCropFlip,
    Task,
    TrainConfig,
    batch_indices,
    encode,
    fit,
    run_task,
)

IMAGES = torch.randint(0, 256, (96, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(96) % 3
IMPORTS = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_training import IMAGES, LABELS, Net, Path, TrainConfig, fit, nn, torch
from lthash.models.backbones import save_weights
torch.set_num_threads(1)
"""                                        # the start of scripts that are run in processes of their own


class Net(nn.Module):
    "A small network with batch statistics and dropout."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.3), nn.Flatten(),
                                    nn.Linear(392, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@given(n=st.integers(1, 70), batch=st.integers(1, 40), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_every_epoch_shows_every_image_once(n, batch, seed):
    epochs = 3
    steps = -(-epochs*n//batch)
    order = torch.cat([batch_indices(n, batch, s, seed) for s in range(steps)])
    assert len(order) == steps*batch
    for e in range(epochs):
        assert torch.equal(order[e*n:(e + 1)*n].sort().values, torch.arange(n))


def test_augmentation_differs_between_images_of_a_batch_and_repeats_with_the_seed():
    same = IMAGES[:1].repeat(6, 1, 1, 1)
    torch.manual_seed(3)
    a = AUGMENTATIONS['crop-flip'](same)
    torch.manual_seed(3)
    b = AUGMENTATIONS['crop-flip'](same)
    assert torch.equal(a, b) and a.shape == same.shape and 0 <= a.min() and a.max() <= 1
    assert len(torch.unique(a.flatten(1), dim=0)) == 6


def test_crop_of_the_whole_area_is_the_image_or_its_mirror():
    torch.manual_seed(0)
    x = AUGMENTATIONS['none'](IMAGES)
    y = RandomCropFlip(area=1.)(x)
    mirrored = [torch.allclose(b, a.flip(-1), atol=1e-5) for a, b in zip(x, y)]
    assert all(m or torch.allclose(a, b, atol=1e-5) for m, a, b in zip(mirrored, x, y))
    assert 20 < sum(mirrored) < 76


@pytest.mark.parametrize('name', SCHEDULES)
def test_schedules_start_at_one_and_never_rise(name):
    values = [SCHEDULES[name](t/100) for t in range(100)]
    assert values[0] == 1 and all(a >= b for a, b in zip(values, values[1:]))


def test_steps_are_samples_over_batch():
    assert TrainConfig(samples=640, batch=64).steps == 10 and TrainConfig(samples=1, batch=64).steps == 1


class Dies(nn.CrossEntropyLoss):
    "Cross-entropy that is interrupted at its eighth call."
    left = 7

    def forward(self, v: Tensor, y: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().forward(v, y)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_every_optimiser_resumes_exactly(tmp_path, optimizer):
    config = TrainConfig(samples=32*12, batch=32, optimizer=optimizer, lr=1e-3)
    straight, resumed = Net(), Net()
    fit(straight, nn.CrossEntropyLoss(), IMAGES, LABELS, config)
    with pytest.raises(KeyboardInterrupt):
        fit(Net(), Dies(), IMAGES, LABELS, config, folder=tmp_path, checkpoint_seconds=0)
    nn.init.zeros_(resumed.layers[5].weight)
    fit(resumed, nn.CrossEntropyLoss(), IMAGES, LABELS, config, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values()))


KILLED = IMPORTS + '''
class Slow(nn.CrossEntropyLoss):
    def forward(self, v, y):
        time.sleep(.02)
        return super().forward(v, y)
net = Net()
config = TrainConfig(samples=32*80, batch=32)
fit(net, Slow(), IMAGES, LABELS, config, folder=Path({folder!r}), checkpoint_seconds=.05)
save_weights(net, {folder!r} + '/final.safetensors')
'''


def test_a_killed_training_ends_with_the_same_bits(tmp_path, root):
    def start(folder: Path) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        return subprocess.Popen([sys.executable, '-c', KILLED.format(folder=str(folder))], cwd=root,
                                env={**os.environ, 'TQDM_DISABLE': '1'})
    assert start(tmp_path/'straight').wait(120) == 0
    saved, final = tmp_path/'killed'/'checkpoint.safetensors', tmp_path/'killed'/'final.safetensors'
    for _ in range(2):
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        process = start(tmp_path/'killed')
        while process.poll() is None and (not saved.exists() or saved.stat().st_mtime_ns == before):
            time.sleep(.005)
        time.sleep(.1)                                    # somewhere behind a checkpoint
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert saved.exists() and not final.exists()
    assert start(tmp_path/'killed').wait(120) == 0
    straight, killed = (load_file(tmp_path/f/'final.safetensors') for f in ('straight', 'killed'))
    assert straight.keys() == killed.keys() and all(torch.equal(straight[k], killed[k]) for k in straight)


def test_a_loss_that_is_not_a_number_stops_with_the_step():
    with pytest.raises(FloatingPointError, match='step 1 of 10.*lower the rate'):
        fit(Net(), lambda v, y: v.sum()*float('nan'), IMAGES, LABELS, TrainConfig(samples=320, batch=32))


def test_a_loss_that_does_not_move_stops_the_training_with_a_warning():
    with pytest.warns(UserWarning, match='the loss did not improve'):
        history = fit(Net(), lambda v, y: 1. + 0*v.sum(), IMAGES, LABELS, TrainConfig(samples=4*300, batch=4))
    assert 'after a third of the steps' in history['stopped_early'] and len(history['losses']) == 33


def test_learning_really_learns_and_encoding_matches_signs():
    labels = (IMAGES.float().mean((1, 2, 3)) > IMAGES.float().mean()).long()
    net = Net()
    config = TrainConfig(samples=32*100, batch=32, lr=3e-3, augmentation='none')
    history = fit(net, nn.CrossEntropyLoss(), IMAGES, labels, config)
    assert history['losses'][-1] < .5*history['losses'][0] and not history['stopped_early']
    codes = encode(net, IMAGES, batch=13)
    with torch.no_grad():
        v = net.eval()(IMAGES.float()/255)
    assert np.array_equal(np.unpackbits(codes, axis=1)[:, :8], (v > 0).numpy())


def test_a_transform_changes_what_the_network_sees_and_only_in_training():
    seen = []
    net = Net()
    net.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach().clone()))
    config = TrainConfig(samples=32, batch=32, augmentation='none')
    fit(net, nn.CrossEntropyLoss(), IMAGES, LABELS, config, transform=lambda x: 0*x + .5)
    encode(net, IMAGES[:4])
    assert (seen[0] == .5).all() and torch.equal(seen[1], AUGMENTATIONS['none'](IMAGES[:4]))


class TwoLosses(Task):
    "Two vectors with a loss and an optimiser each; 'validation' is best at the second of four checks."
    examples = 8

    def __init__(self):
        self.net = nn.ParameterDict({'a': torch.zeros(3), 'b': torch.zeros(3)})
        self.values, self.kept = iter((.1, .9, .3, .2)), []

    def optimizers(self, config: TrainConfig) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD([self.net[k]], config.lr) for k in 'ab']

    def losses(self, index: Tensor, step: int, progress: float) -> list[Tensor]:
        both = self.net['a'].sum() + self.net['b'].sum()
        return [both, -2*both]                             # each optimiser follows its own only

    def validate(self) -> dict[str, float]:
        self.kept.append({k: v.clone() for k, v in self.net.state_dict().items()})
        return {'validation': next(self.values)}


def test_each_optimiser_follows_its_own_loss_and_the_best_weights_are_kept():
    task = TwoLosses()
    found = run_task(task, TrainConfig(samples=32, batch=4, lr=.1, schedule='constant'), checks=4)
    torch.testing.assert_close(task.net['a'].data, torch.full((3,), -.4))      # four of eight steps down its gradient
    torch.testing.assert_close(task.net['b'].data, torch.full((3,), .8))
    assert all(torch.equal(v, task.kept[1][k]) for k, v in task.net.state_dict().items())
    assert found['best'] == 2. and [c['epoch'] for c in found['checks']] == [1., 2., 3., 4.]


PARALLEL = IMPORTS + '''
from accelerate import Accelerator
seen = []
class Spy(nn.CrossEntropyLoss):
    def forward(self, v, y):
        seen.append(len(y))
        return super().forward(v, y)
net = Net().eval()
fit(net, Spy(), IMAGES, LABELS, TrainConfig(samples=64, batch=32, augmentation='none'))
assert seen == [16, 16], seen
rank = Accelerator(cpu=True).process_index
save_weights(net, {folder!r} + f'/{{rank}}.safetensors')
'''


def test_two_processes_share_each_batch_and_stay_equal(tmp_path, root):
    script = tmp_path/'parallel.py'
    script.write_text(PARALLEL.format(folder=str(tmp_path)))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script)]
    own = {'TQDM_DISABLE': '1', 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': '1', 'PYTHONPATH': str(root)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env={**os.environ, **own})
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = (load_file(tmp_path/f'{r}.safetensors') for r in (0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a if 'running' not in k)      # batch statistics are each process's own
