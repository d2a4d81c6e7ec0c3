"""loom-natural: words and captions, what its training set must not contain, its layout, and images of ImageNette."""
import io
import json
import zipfile
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lthash.core.runtime import project_data
from lthash.data import datasets
from lthash.data.base import TRAIN
from lthash.diffusion import photograph_model as natural
from lthash.diffusion.base_model import BaseRecipe, build_pipeline, build_tokenizer, save_pipeline
from lthash.diffusion.methods import METHODS
from lthash.diffusion.pipelines import image_size, load_pipeline, pipeline_networks, sample
from lthash.diffusion.quality import pixel_features
from lthash.diffusion.synthetic import IMAGENETTE, SyntheticConfig, synthetic_set

NAMES = list(dict.fromkeys(name for names in natural.KINDS.values() for name in names))
WORDS = {f'n{i:08d}': name for i, name in enumerate(NAMES)}      # the usual names only, under identifiers of our own
TINY = BaseRecipe(size=32, latent_channels=8, vae_width=8, widths=(16, 16, 32), heads=2, text_width=16, text_layers=1,
                  context=16, widen=False, vae_steps=3, vae_batch=4, steps=3, batch=4, warmup=1, cooldown=1)

def jpeg(seed: int, side: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, 'JPEG')
    return file.getvalue()

@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "A data folder with an original-like Tiny-ImageNet (64 pixels, five images per class) and a little ImageNette."
    folder = tmp_path_factory.mktemp('data')
    with zipfile.ZipFile(folder/'tiny-imagenet-200.zip', 'w') as archive:
        words = ''.join(f'{w}\t{n}\n' for w, n in WORDS.items()) + 'n99999999\tsomething else\n'
        archive.writestr('tiny-imagenet-200/words.txt', words)
        for c, wnid in enumerate(WORDS):
            for i in range(5):
                archive.writestr(f'tiny-imagenet-200/train/{wnid}/images/{wnid}_{i}.JPEG', jpeg(5*c + i, 64))
        archive.writestr('tiny-imagenet-200/val/images/val_0.JPEG', jpeg(0, 64))
    for c, wnid in enumerate(IMAGENETTE):
        for part, n in (('train', 6), ('val', 2)):
            (folder/'imagenette'/part/wnid).mkdir(parents=True)
            for i in range(n):
                (folder/'imagenette'/part/wnid/f'{part}{i}.jpg').write_bytes(jpeg(1000 + 10*c + i, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LTHASH_DATA', str(folder))
        patch.setenv('LTHASH_CACHE', str(folder/'cache'))
        yield folder

def test_every_class_has_a_kind_and_prompts_fit_the_context():
    subjects = natural.subjects(WORDS)
    assert len(subjects) == 200 and all(s.kinds for s in subjects.values())
    texts = [t.format(f'{name} {kind}') for t in set(natural.TEMPLATES) for s in subjects.values()
             for name in s.names for kind in s.kinds]
    tokenizer = build_tokenizer(texts, natural.NATURAL.context)
    assert max(map(len, tokenizer(texts).input_ids)) <= natural.NATURAL.context
    for _, word in IMAGENETTE.values():
        assert word in natural.KINDS and len(tokenizer.tokenize(word)) == 1, word

def test_latin_names_are_left_out_and_english_ones_kept():
    at = {name: wnid for wnid, name in WORDS.items()}
    fish, gown = at['goldfish'], at['academic gown']
    known = {fish: ('n01443537', 'goldfish, Carassius auratus'),
             gown: ('n02669723', "academic gown, academic robe, judge's robe")}
    words = dict(known.get(w, (w, n)) for w, n in WORDS.items())
    found = natural.subjects(words)
    assert found['n01443537'].names == ('goldfish',)
    assert found['n02669723'].names == ('academic gown', 'academic robe', 'judges robe')
    with pytest.raises(ValueError, match='goldfish'):
        natural.subjects({w: n for w, n in words.items() if w != 'n01443537'})

SHARE = st.floats(0, 1, exclude_max=True)

@given(SHARE, SHARE, SHARE)
@settings(max_examples=200, deadline=None)
def test_a_caption_names_its_class_or_its_kind_and_nothing_else(form, name, kind):
    s = natural.Subject(('school bus', 'yellow bus'), ('bus', 'vehicle'))
    words = natural.subject_words(s, form, name, kind)
    assert words in {*s.names, *s.kinds, 'school bus vehicle', 'yellow bus vehicle'}      # never 'school bus bus'
    assert words == 'school bus' or form >= .4

def test_captions_depend_on_seed_and_position_only():
    pairs, labels = (('tabby', 'cat'), ('pug', 'dog')), torch.arange(300) % 2
    subjects = [natural.Subject((w,), (k,)) for w, k in pairs]
    one = natural.captions(subjects, labels, 3, 7)
    assert one == natural.captions(subjects, labels, 3, 7) != natural.captions(subjects, labels, 3, 8)
    assert len(one) == 3 and all(len(draw) == 300 for draw in one) and one[0] != one[1]
    assert all(any(w in c for w in pairs[y]) for draw in one for c, y in zip(draw, labels.tolist()))

def test_a_class_of_imagenette_is_found_by_identifier_and_by_name():
    assert natural.shared_classes(WORDS) == []
    assert natural.shared_classes(WORDS | {'n03028079': 'something'}) == ['n03028079']
    assert natural.shared_classes(WORDS | {'n5': 'x, Dust-Cart, dustcart'}) == ['n03417042']
    assert natural.shared_classes({'n5': 'French horn player'}) == []                     # whole names only

@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 70), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_closest_is_what_the_whole_table_of_distances_says(n, m, chunk, seed):
    rng = torch.Generator().manual_seed(seed)
    a, b = torch.randn(n, 3, generator=rng), torch.randn(m, 3, generator=rng)
    distance, at = natural.closest(a, b, chunk)
    whole = torch.cdist(a, b)
    assert torch.allclose(distance, whole.amin(1), atol=1e-5)
    assert torch.allclose(whole[torch.arange(n), at], distance, atol=1e-5)

def test_a_planted_copy_is_the_closest():
    x = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    darker = (x[17].float()*.7).byte()[None]
    there = torch.cat([pixel_features(x), pixel_features(x.flip(-1))])
    distance, at = natural.closest(pixel_features(darker.flip(-1)), there, 16)
    assert at.item() == 50 + 17 and distance.item() < .05

def test_the_original_archive_gives_training_images_mirrors_and_captions(here):
    images, captions, data = natural.natural_data(draws=2)
    train = int((data.parts == TRAIN).sum())
    assert images.shape == (2*train, 3, 32, 32) and train == 800      # four of five images of each class
    assert torch.equal(images[train:], images[:train].flip(-1))
    assert len(captions) == 2 and all(len(c) == 2*train for c in captions)
    labels = data.labels[data.parts == TRAIN].tolist()
    subjects = list(natural.subjects(WORDS).values())
    named = [(*subjects[y].names, *subjects[y].kinds) for y in labels]
    assert all(any(w in text for w in words) for text, words in zip(captions[0], named))
    assert natural.at_hand('tiny-imagenet') and natural.at_hand('imagenette') and not natural.at_hand('cifar10')

def test_missing_data_and_missing_names_say_what_to_get(tmp_path, monkeypatch):
    monkeypatch.setenv('LTHASH_DATA', str(tmp_path))
    monkeypatch.setenv('LTHASH_CACHE', str(tmp_path/'cache'))
    def offline(*args, **options):
        raise OSError('no network')
    monkeypatch.setattr(datasets, 'download_url', offline)
    with pytest.raises(FileNotFoundError, match='tiny-imagenet-200.zip'):
        natural.natural_data()
    (tmp_path/'tiny-imagenet'/'train'/'n1').mkdir(parents=True)
    (tmp_path/'tiny-imagenet'/'train'/'n1'/'a.jpg').write_bytes(jpeg(0, 32))
    with pytest.raises(ValueError, match='classes.txt or words.txt'):
        natural.class_names()

@pytest.mark.parametrize('recipe', [natural.NATURAL, natural.NATURAL_GPU], ids=['shipped', 'gpu'])
def test_sixteen_cross_attentions_on_three_levels(recipe):
    with torch.device('meta'):                                       # shapes only
        pipe = build_pipeline(recipe, ['a photo of a dog'])
    blocks = (*pipe.unet.down_blocks, pipe.unet.mid_block, *pipe.unet.up_blocks)
    assert [len(b.attentions) for b in blocks] == [2, 2, 2, 1, 3, 3, 3]
    assert sum(k.endswith('attn2') for k, _ in pipe.unet.named_modules()) == 16
    assert image_size(pipe) == 32
    count = sum(p.numel() for network in pipeline_networks(pipe) for p in network.parameters())
    # what is shipped stays below 30 MB, words included
    assert 2*count < 29e6 if recipe is natural.NATURAL else 55e6 < count < 65e6

@pytest.fixture(scope='module')
def trained(here, tmp_path_factory):
    out = tmp_path_factory.mktemp('natural')/'generator'
    natural.train_natural(out, TINY, 'cpu')
    return out

def test_train_natural_leaves_a_generator_that_loads_and_says_what_it_saw(trained):
    about = json.loads((trained/'training.json').read_text())
    assert '800 photographs' in about['data'] and about['images'] == 1600
    assert about['recipe']['widths'] == [16, 16, 32]
    pipe = load_pipeline(str(trained), device='cpu')
    assert sum(k.endswith('attn2') for k, _ in pipe.unet.named_modules()) == 16
    assert all(len(pipe.tokenizer.tokenize(w)) == 1 for _, word in IMAGENETTE.values() for w in word.split())

def test_the_shipped_generator_is_what_its_card_says():
    folder = project_data()/'loom-natural'
    files = {f: f.stat().st_size for f in folder.rglob('*.safetensors')}
    assert max(files.values()) < 16e6 and sum(files.values()) < 30e6
    about = json.loads((folder/'training.json').read_text())
    assert about['recipe'] == json.loads(json.dumps(asdict(natural.NATURAL)))
    assert '80,000 photographs' in about['data'] and about['images'] == 160_000
    pipe = load_pipeline('loom-natural', device='cpu')
    assert all(len(pipe.tokenizer.tokenize(w)) == 1 for k in natural.KINDS for w in k.split())
    drawn = [sample(pipe, f'a photo of a {word}', range(6), steps=6, guidance=3.) for word in ('banana', 'seashore')]
    fruit, coast = (x.float().mean((0, 2, 3)) for x in drawn)
    assert fruit[0] - fruit[2] > coast[0] - coast[2] + 30            # yellow against blue, in grey levels

def test_a_large_unet_is_stored_in_parts_and_loads_again(tmp_path):
    pipe = build_pipeline(replace(TINY, widths=(64, 128, 128)), ['a photo of a dog'])
    save_pipeline(pipe, tmp_path/'g', {})
    files = sorted((tmp_path/'g').rglob('*.safetensors'))
    assert len([f for f in files if f.parent.name == 'unet']) > 1
    assert max(f.stat().st_size for f in files) < 16e6
    again = load_pipeline(str(tmp_path/'g'), device='cpu')
    for a, b in zip(pipe.unet.state_dict().values(), again.unet.state_dict().values()):
        assert torch.equal(a.half().float(), b)

@pytest.mark.parametrize('method', ['prompt', *METHODS['loom']])
def test_imagenette_is_personalised_and_drawn_at_32_pixels(trained, method):
    config = SyntheticConfig(dataset='imagenette', imbalance='exponential', imbalance_factor=4., generator=str(trained),
                             method=method, scale=.001, shots=2, steps=2, batch=2)
    data = synthetic_set(config, 2, [0, 9], progress=False)
    assert data.images.shape == (4, 3, 32, 32) and data.labels.tolist() == [0, 0, 9, 9]
    assert data.classes[9] == 'parachute'
