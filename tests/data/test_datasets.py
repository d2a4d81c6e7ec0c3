"Folders with everything wrong in them, archives, the cache, and properties of retrieval splits."
import io
import os
import re
import struct
import subprocess
import sys
import tarfile
import urllib.error
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lthash.core.runtime import cache_dir
from lthash.data import datasets
from lthash.data.base import VAL, ImageSet, retrieval_split, shuffled
from lthash.data.datasets import DATASETS, SILK_VAL, SOURCES, load
from lthash.data.files import decode, files_of, layout
from lthash.data.silk import CLASSES, render

REAL = os.environ.get('LTHASH_DATA')

@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    "Neither the user's cache nor the user's data."
    monkeypatch.setenv('LTHASH_CACHE', str(tmp_path_factory.mktemp('cache')))
    monkeypatch.setenv('LTHASH_DATA', str(tmp_path_factory.mktemp('data')))

def encoded(image, kind='PNG', **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()

def solid(colour, size=16):
    return Image.new('RGB', (size, size), colour)

def folder(root: Path, files: dict) -> Path:
    for name, content in files.items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_bytes(content)
    return root

def quiet(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return load(*args, **kwargs)

NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
GOOD = {f'{c}/{i}.png': encoded(solid(colour)) for c, colour in (('red', 'red'), ('blue', 'blue')) for i in range(5)}

# ---------- pixels of files that can be read

def test_an_image_of_the_wanted_size_is_unchanged():
    assert (decode(encoded(NOISE), 16) == NOISE.transpose(2, 0, 1)).all()
    assert (decode(encoded(NOISE, 'WEBP', lossless=True), 16) == NOISE.transpose(2, 0, 1)).all()

def test_the_centre_square_is_kept_and_scaling_antialiases():
    thirds = np.concatenate([np.full((20, 20, 3), v, np.uint8) for v in (0, 90, 255)], 1)
    # scale the short side, then take the middle
    whole = np.asarray(Image.fromarray(thirds).resize((24, 8), Image.Resampling.BICUBIC)).astype(int)
    assert abs(decode(encoded(thirds), 8).transpose(1, 2, 0) - whole[:, 8:16]).max() <= 1
    assert abs(decode(encoded(thirds.swapaxes(0, 1)), 8).transpose(2, 1, 0) - whole[:, 8:16]).max() <= 1
    checker = np.indices((64, 64)).sum(0) % 2 * 255
    small = decode(encoded(checker.astype(np.uint8)), 8).astype(int)
    assert abs(small - 127).max() < 16                       # taking single pixels gives 0 or 255

def test_cmyk():
    ink = Image.new('CMYK', (16, 16), (0, 255, 255, 0))
    assert decode(encoded(ink, 'TIFF'), 16)[:, 0, 0].tolist() == [255, 0, 0]
    assert abs(decode(encoded(ink, 'JPEG', quality=95), 16)[:, 5, 5].astype(int) - [255, 0, 0]).max() < 8

@pytest.mark.parametrize('kind,order', [('PNG', '<u2'), ('TIFF', '<u2'), ('TIFF', '>u2')])
def test_16_bit_is_scaled_not_clipped(kind, order):
    deep = np.linspace(0, 65535, 256).astype(order).reshape(16, 16)
    image = Image.fromarray(deep) if order[0] == '<' else Image.frombytes('I;16B', (16, 16), deep.tobytes())
    assert (decode(encoded(image, kind), 16) == np.floor(deep/257 + .5)).all()

def test_transparency_is_composed_on_white():
    palette = Image.new('P', (16, 16))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(1, (0, 0, 16, 8))
    pixels = decode(encoded(palette, transparency=0), 16)
    assert pixels[:, 0, 0].tolist() == [0, 0, 255] and pixels[:, 15, 0].tolist() == [255, 255, 255]
    half_red = decode(encoded(Image.new('RGBA', (16, 16), (255, 0, 0, 128))), 16)[:, 0, 0].astype(int)
    assert abs(half_red - [255, 127, 127]).max() <= 1
    assert abs(decode(encoded(Image.new('LA', (16, 16), (0, 64))), 16)[:, 0, 0].astype(int) - 191).max() <= 1
    assert decode(encoded(solid('red'), transparency=(255, 0, 0)), 16).min() == 255

@pytest.mark.parametrize('kind', ['GIF', 'WEBP', 'TIFF', 'PNG'])
def test_the_first_frame_of_an_animation(kind):
    moving = encoded(solid('red'), kind, save_all=True, append_images=[solid('blue'), solid('green')])
    with Image.open(io.BytesIO(moving)) as image:
        assert image.n_frames == 3
    assert abs(decode(moving, 16)[:, 8, 8].astype(int) - [255, 0, 0]).max() < 6

@pytest.mark.parametrize('orientation,stand', [
    (1, lambda a: a), (2, lambda a: a[:, ::-1]), (3, lambda a: a[::-1, ::-1]), (4, lambda a: a[::-1]),
    (5, lambda a: a.swapaxes(0, 1)), (6, lambda a: np.rot90(a, -1)),
    (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)), (8, lambda a: np.rot90(a))])
def test_exif_orientation(orientation, stand):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (decode(encoded(NOISE, exif=exif), 16) == stand(NOISE).transpose(2, 0, 1)).all()

def test_damaged_exif_costs_nothing():
    assert (decode(encoded(NOISE, exif=b'Exif\0\0 and then nonsense'), 16) == NOISE.transpose(2, 0, 1)).all()

# ---------- files that cannot be read

def png_header(width, height) -> bytes:
    chunk = lambda kind, body: struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')

BAD = {
    'truncated.jpg': (encoded(Image.effect_noise((64, 64), 90), 'JPEG')[:1500], 'truncated'),
    'truncated.png': (encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))[:5000], 'truncated'),
    'truncated.webp': (encoded(Image.effect_noise((64, 64), 90), 'WEBP')[:300], 'damaged'),
    'only a header.png': (png_header(64, 64), 'damaged'),
    'empty.jpg': (b'', 'empty file'),
    'text.jpg': (b'not a picture', 'not an image'),
    'vector.jpg': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'not an image'),
    'bomb.png': (png_header(9_000, 9_000), 'refused before decoding'),
    'larger bomb.png': (png_header(100_000, 100_000), 'refused before decoding'),
    'float.tif': (encoded(Image.new('F', (16, 16)), 'TIFF'), 'no agreed range'),
    '32 bit.tif': (encoded(Image.fromarray(np.full((16, 16), 1 << 20, np.int32)), 'TIFF'), 'no agreed range'),
}

@pytest.mark.parametrize('name', BAD)
def test_each_bad_file_is_named_with_its_reason_and_the_rest_is_used(tmp_path, name):
    content, reason = BAD[name]
    folder(tmp_path/'set', {**GOOD, f'red/{name}': content})
    with pytest.warns(UserWarning, match='1 of its files'):
        data = load(f'folder:{tmp_path}/set', 16)
    (path, why), = data.skipped
    assert path == f'red/{name}' and reason in why and '0x' not in why
    assert sorted(data.ids) == sorted(GOOD)
    for image, label in zip(data.images, data.labels):   # though a file before it is missing
        assert image[:, 0, 0].tolist() == {'red': [255, 0, 0], 'blue': [0, 0, 255]}[data.classes[label]]

def test_all_bad_files_at_once(tmp_path):
    bad = {f'{c}/{n}': content for c in ('red', 'blue', 'green') for n, (content, _) in BAD.items()}
    folder(tmp_path/'set', GOOD | bad)
    data = quiet(f'folder:{tmp_path}/set', 16)
    assert len(data.skipped) == 3*len(BAD) and len(data) == len(GOOD)
    assert data.classes == ('blue', 'red')                    # green has no readable image and is no class

def test_links(tmp_path):
    root = folder(tmp_path/'set', GOOD)
    folder(tmp_path/'far', {'a.png': encoded(solid('green')), 'b.png': encoded(solid('green'))})
    (root/'green').symlink_to(tmp_path/'far')                 # another place: followed
    (root/'red'/'up').symlink_to(root)                        # loops: not
    (root/'blue'/'to red').symlink_to(root/'red')
    (root/'red'/'self').symlink_to(root/'red'/'self')
    (root/'red'/'gone.png').symlink_to(root/'nowhere.png')
    data = quiet(f'folder:{root}', 16)
    reasons = dict(data.skipped)
    assert data.classes == ('blue', 'green', 'red') and 'green/a.png' in data.ids
    assert 'leads back' in reasons['red/up/'] and 'leads back' in reasons['blue/to red/up/']
    assert 'symbolic links' in reasons['red/self'] and 'No such file' in reasons['red/gone.png']

def test_a_pipe_is_not_waited_for(tmp_path):
    root = folder(tmp_path/'set', GOOD)
    os.mkfifo(root/'red'/'pipe.png')
    assert dict(quiet(f'folder:{root}', 16).skipped) == {'red/pipe.png': 'not a regular file'}

def test_names_of_any_kind(tmp_path):
    names = 'red/with space.png', 'red/玫瑰 🌹.png', 'red/wrong suffix.txt'
    root = folder(tmp_path/'été 1', {**GOOD, 'red/.hidden': b'', **{name: encoded(NOISE) for name in names}})
    not_utf8 = Path(os.fsdecode(os.fsencode(root/'red') + b'/latin-\xe9.png'))
    not_utf8.write_bytes(encoded(NOISE))
    data = load(f'folder:{root}', 16)
    assert set(data.ids) - set(GOOD) == {*names, r'red/latin-\xe9.png'} and not data.skipped
    assert data.name == 'folder:été 1' and retrieval_split(data).hash

# ---------- layouts, and folders that are hopeless

def test_a_class_with_one_image_is_trained_on_and_not_queried(tmp_path):
    folder(tmp_path/'set', {**GOOD, 'lone/1.png': encoded(NOISE)})
    with pytest.warns(UserWarning, match='no image to query with: lone'):
        data = load(f'folder:{tmp_path}/set', 16)
    split, lone = retrieval_split(data), data.classes.index('lone')
    assert lone in data.labels[split.train]
    assert lone not in data.labels[split.query] and lone not in data.labels[split.validation]

def test_an_empty_class_is_listed_and_is_no_class(tmp_path):
    root = folder(tmp_path/'set', GOOD)
    (root/'empty').mkdir()
    data = quiet(f'folder:{root}', 16)
    assert data.skipped == (('empty/', 'empty folder'),) and data.classes == ('blue', 'red')

@pytest.mark.parametrize('files,message', [
    ({k: v for k, v in GOOD.items() if k.startswith('red')}, 'at least two classes with images; found only red'),
    ({**GOOD, **{k: b'' for k in GOOD if k.startswith('red')}}, 'at least two classes with images; found only blue'),
    ({'1.png': GOOD['red/1.png'], '2.png': GOOD['red/2.png']}, 'no readable image in a class folder'),
    ({'red/1.png': b'', 'blue/1.png': b'x'}, 'no readable image in a class folder'),
    ({}, 'no images'),
    ({f'val/{k}': v for k, v in GOOD.items()} | {f'test/{k}': v for k, v in GOOD.items()}, 'no train/')])
def test_hopeless_folders_stop(tmp_path, files, message):
    (tmp_path/'set').mkdir()
    with pytest.raises(ValueError, match=message):
        load(f'folder:{folder(tmp_path/"set", files)}', 16)

def test_hopeless_names_stop(tmp_path):
    folder(tmp_path, {'file': b''})
    with pytest.raises(FileNotFoundError, match='does not exist'):
        load(f'folder:{tmp_path}/nowhere')
    with pytest.raises(FileNotFoundError, match='is a file'):
        load(f'folder:{tmp_path}/file')
    with pytest.raises(ValueError, match='silk, imagenette, cifar10'):
        load('mnist')
    for wrong in (dict(size=0), dict(train_per_class=0), dict(val_per_class=-1)):
        with pytest.raises(ValueError, match='at least 1'):
            load('silk', **wrong)

@pytest.mark.parametrize('train,val', [
    ('train', 'val'), ('train', 'test'), ('database', 'query'), ('train', 'validation')])
def test_given_parts_are_kept(tmp_path, train, val):
    folder(tmp_path/'set', {f'{train}/{k}': v for k, v in GOOD.items()})
    folder(tmp_path/'set', {f'{val}/{k}': v for k, v in GOOD.items() if '/0' in k})
    data = load(f'folder:{tmp_path}/set', 16)
    assert {i for i, p in zip(data.ids, data.parts) if p == VAL} == {f'{val}/red/0.png', f'{val}/blue/0.png'}
    assert len(data) == 12

def test_undivided_folders_are_split_by_the_seed(tmp_path):
    folder(tmp_path/'set', {f'{c}/{i}.png': encoded(NOISE) for c in 'ab' for i in range(20)})
    parts = [load(f'folder:{tmp_path}/set', 16, seed=s).parts.tolist() for s in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    assert [sum(p[:20]) for p in parts] == [sum(p[20:]) for p in parts] == [4, 4, 4]

def test_layout_does_not_take_a_class_for_a_part():
    assert layout(['test/1.jpg', 'train/1.jpg']) == [('', 'test'), ('', 'train')]
    assert layout(['train/test/1.jpg', 'val/test/1.jpg']) == [('train', 'test'), ('val', 'test')]
    assert layout(['a/b/train/x/1.jpg', 'a/b/val/x/1.jpg', 'README']) == [('train', 'x'), ('val', 'x'), None]
    assert layout(['t/train/n1/images/1.jpg', 't/train/n2/images/2.jpg']) == [('', 'n1'), ('', 'n2')]

# ---------- the cache

def test_decoded_once_and_again_when_the_folder_changes(tmp_path, monkeypatch):
    root = folder(tmp_path/'set', GOOD)
    first, calls = load(f'folder:{root}', 16), []
    monkeypatch.setattr('lthash.data.files.decode', lambda *a: calls.append(a) or decode(*a))
    again = load(f'folder:{root}', 16)
    assert not calls and torch.equal(first.images, again.images) and first.ids == again.ids
    (root/'red'/'0.png').write_bytes(encoded(solid('white', 17)))
    assert load(f'folder:{root}', 16).images[first.ids.index('red/0.png')].min() == 255 and len(calls) == len(GOOD)

def test_writing_to_the_images_does_not_reach_the_disk(tmp_path):
    root = folder(tmp_path/'set', GOOD)
    load(f'folder:{root}', 16).images.fill_(7)
    assert not (load(f'folder:{root}', 16).images == 7).any()

def test_a_failed_decoding_leaves_no_entry(tmp_path, monkeypatch):
    root = folder(tmp_path/'set', GOOD)
    monkeypatch.setattr('lthash.data.files.decode', lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError):
        load(f'folder:{root}', 16)
    assert [f.suffix for f in (cache_dir()/'images').iterdir()] == ['.lock']
    monkeypatch.undo()

def test_a_killed_decoding_is_done_again_and_leaves_nothing(tmp_path):
    root = folder(tmp_path/('long name '*20), GOOD)
    script = ('import os; from lthash.data import files; from lthash.data.datasets import load; '
              f"files.decode = lambda *a: os.kill(os.getpid(), 9); load('folder:{root}', 16)")
    assert subprocess.run([sys.executable, '-c', script]).returncode == -9
    assert [f.suffix for f in (cache_dir()/'images').iterdir() if f.name.startswith('.')] == ['.bin']
    assert len(load(f'folder:{root}', 16)) == len(GOOD)
    assert sorted(f.suffix for f in (cache_dir()/'images').iterdir()) == ['.bin', '.json', '.lock']

def test_a_damaged_entry_is_refused(tmp_path):
    root = folder(tmp_path/'set', GOOD)
    load(f'folder:{root}', 16)
    entry, = (cache_dir()/'images').glob('*.bin')
    os.truncate(entry, 100)
    with pytest.raises(OSError, match='delete it'):
        load(f'folder:{root}', 16)

# ---------- named sets, from small archives of the same layout

def tar(path: Path, files: dict):
    with tarfile.open(path, 'w:' + path.suffix.strip('.').replace('tgz', 'gz')) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

def nette(kind, suffix, root='imagenette'):
    classes, parts = reversed(SOURCES['imagenette'].classes), (('train', 4), ('val', 2))
    names = [f'{root}/{part}/{c}/{c}_{i}.{suffix}' for c in classes for part, n in parts for i in range(n)]
    return {name: encoded(NOISE, kind) for name in names}

def test_an_archive_is_read_in_place(tmp_path):
    here = datasets.data_dir()
    tar(here/'imagenette-128.tar.xz', nette('WEBP', 'webp'))
    data = load('imagenette', 16)
    assert (len(data), data.classes[0], data.categories[1]) == (60, 'tench', 'dog')
    assert data.substitutes == 'ImageNette stored at 128 px WebP' and data.ids[0] == 'train/n01440764/n01440764_0'
    assert [p.name for p in here.iterdir()] == ['imagenette-128.tar.xz']           # nothing is unpacked beside it
    (here/'imagenette-128.tar.xz').unlink()
    folder(here, nette('JPEG', 'JPEG'))                                            # the originals, as a folder
    original = load('imagenette', 16)
    assert original.substitutes == ''
    assert retrieval_split(original).hash == retrieval_split(data).hash            # whatever the file format

def test_unsafe_and_broken_archives_are_refused(tmp_path):
    here = datasets.data_dir()
    path = here/'imagenette.tar.xz'
    tar(path, {**nette('PNG', 'png'), '../../escaped.png': encoded(NOISE)})
    with pytest.raises(ValueError, match='not a whole and safe archive.*outside'):
        load('imagenette', 16)
    assert not list(here.parent.parent.glob('escaped*'))
    tar(path, nette('PNG', 'png'))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match='not a whole'):
        load('imagenette', 16)
    tar(path, {k: v for k, v in nette('PNG', 'png').items() if 'n03888257' not in k})
    with pytest.raises(ValueError, match='missing or unexpected: n03888257'):
        load('imagenette', 16)

def test_cifar10_binary_version(tmp_path):
    rng = np.random.default_rng(0)
    names = [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']
    batches = {n: [(label, rng.integers(0, 256, (3, 32, 32), np.uint8)) for label in range(10)] for n in names}
    records = {n: b''.join(bytes([label]) + image.tobytes() for label, image in b) for n, b in batches.items()}
    tar(datasets.data_dir()/'cifar-10-binary.tar.gz', {f'cifar-10-batches-bin/{n}.bin': r for n, r in records.items()})
    data = load('cifar10', 32)
    assert (len(data), int(data.parts.sum()), data.substitutes) == (60, 10, '')
    for name, where in (('train/bird/0001', ('data_batch_2', 2)), ('val/truck/0000', ('test_batch', 9))):
        assert (data.images[data.ids.index(name)].numpy() == batches[where[0]][where[1]][1]).all()
    category = dict(zip(data.classes, data.categories))
    assert category['ship'] == 'vehicle' and category['frog'] == 'animal'

def test_tiny_imagenet_zip(tmp_path):
    with zipfile.ZipFile(datasets.data_dir()/'tiny-imagenet-200.zip', 'w') as archive:
        words = 'n1\tgoldfish, Carassius auratus\nn2\tbullfrog\nn3\tnot in it\n'
        archive.writestr('tiny-imagenet-200/words.txt', words)
        for c in ('n1', 'n2'):
            for i in range(10):
                archive.writestr(f'tiny-imagenet-200/train/{c}/images/{c}_{i}.JPEG', encoded(NOISE, 'JPEG'))
            archive.writestr(f'tiny-imagenet-200/train/{c}/{c}_boxes.txt', 'x')
        archive.writestr('tiny-imagenet-200/val/images/val_0.JPEG', encoded(NOISE, 'JPEG'))
    data = load('tiny-imagenet', 16)
    assert data.classes == ('goldfish', 'bullfrog') and data.ids[0] == 'n1/n1_0'
    assert len(data) == 20 and int(data.parts.sum()) == 4

@pytest.mark.parametrize('name,file', [('imagenette', 'imagenette2-160.tgz'), ('cifar10', 'cifar-10-binary.tar.gz'),
                                       ('tiny-imagenet', 'tiny-imagenet-200.zip')])
def test_what_cannot_be_downloaded_is_explained(monkeypatch, name, file):
    def offline(*args, **kwargs):
        raise urllib.error.URLError('no network')
    monkeypatch.setattr(datasets, 'download_url', offline)
    with pytest.raises(FileNotFoundError) as error:
        load(name, 64)
    for part in (file, 'http', str(datasets.data_dir()), 'LTHASH_DATA', 'no network'):
        assert part in str(error.value)

def test_the_smallest_original_that_is_large_enough_is_fetched(monkeypatch):
    fetched = []
    def fetch(url, root, md5):
        fetched.append((url.rsplit('/')[-1], md5))
        Path(root).mkdir(parents=True, exist_ok=True)
        tar(Path(root)/url.rsplit('/')[-1], nette('JPEG', 'JPEG', 'imagenette2'))
    monkeypatch.setattr(datasets, 'download_url', fetch)
    for size in (64, 200, 400):
        assert len(load('imagenette', size, 1, 1)) == 20
    assert [file for file, _ in fetched] == ['imagenette2-160.tgz', 'imagenette2-320.tgz', 'imagenette2.tgz']
    assert all(len(md5) == 32 for _, md5 in fetched)

def test_fewer_images_per_class(tmp_path):
    tar(datasets.data_dir()/'imagenette.tar.xz', nette('PNG', 'png'))
    ids = [set(load('imagenette', 16, n, 1, seed=s).ids) for n, s in ((2, 0), (3, 0), (2, 1))]
    assert [len(i) for i in ids] == [30, 40, 30] and ids[0] < ids[1] and ids[0] != ids[2]
    data = load('imagenette', 16, train_per_class=3)
    assert [torch.bincount(data.labels[data.parts == part]).tolist() for part in (0, 1)] == [[3]*10, [2]*10]

def test_silk():
    data, more = load('silk', 32, 2, 2), load('silk', 32, 3, 2)
    assert len(data) == 4*len(CLASSES) and set(data.ids) < set(more.ids)
    assert data.classes == tuple(c.name for c in CLASSES) and data.parts[:4].tolist() == [0, 0, 1, 1]
    assert (data.images[2].numpy() == render(0, SILK_VAL, size=32).transpose(2, 0, 1)).all()
    assert torch.equal(more.images[more.ids.index(data.ids[5])], data.images[5])
    assert not set(load('silk', 32, 2, 2, seed=1).ids) & set(data.ids)

def load_checks(size, train_per_class, val_per_class, seed):
    "A data set from outside the package: two classes of one image per part."
    labels, parts = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1], dtype=torch.int8)
    images = torch.full((4, 3, size, size), seed, dtype=torch.uint8)
    return ImageSet('mine', size, images, labels, parts, ('a', 'b', 'c', 'd'), ('one', 'two'), ('one', 'two'))

def test_a_data_set_is_added_in_one_line(monkeypatch):
    monkeypatch.setitem(DATASETS, 'mine', load_checks)       # DATASETS['mine'] = load_checks
    data = load('mine', 8, seed=7)
    assert data.name == 'mine' and data.images.shape == (4, 3, 8, 8) and data.images.max() == 7
    with pytest.raises(ValueError, match="or folder:PATH; found 'mime' .did you mean 'mine'"):
        load('mime')

@pytest.mark.parametrize('wrong,nearest', [('silks', 'silk'), ('cifar-10', 'cifar10'), ('Imagenette', 'imagenette'),
                                           ('tinyimagenet', 'tiny-imagenet'), ('nus-wide', 'nuswide')])
def test_a_wrong_name_lists_the_names_and_the_nearest(wrong, nearest):
    with pytest.raises(ValueError, match=f"silk, .*nuswide or folder:PATH; found '{wrong}' .did you mean '{nearest}'"):
        load(wrong)

# ---------- splits

def made_up(train: list[int], val: list[int]) -> ImageSet:
    labels = torch.tensor([c for counts in (train, val) for c, n in enumerate(counts) for _ in range(n)])
    parts = torch.tensor([0]*sum(train) + [1]*sum(val), dtype=torch.int8)
    names = tuple(map(str, range(len(train))))
    images, ids = torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), tuple(map(str, range(len(labels))))
    return ImageSet('made up', 1, images, labels, parts, ids, names, names)

sizes = st.lists(st.integers(1, 700), min_size=2, max_size=6)

@settings(max_examples=60, deadline=None)
@given(sizes, st.data(), st.integers(0, 9))
def test_splits_share_nothing_they_must_not(train, draw, seed):
    data = made_up(train, draw.draw(st.lists(st.integers(2, 50), min_size=len(train), max_size=len(train))))
    for name in ('paper', 'unseen'):
        s = retrieval_split(data, name, seed)
        t, v, q, d = (set(vars(s)[k].tolist()) for k in ('train', 'validation', 'query', 'database'))
        assert not (t & v or t & q or v & q or q & d) and t | v == set((data.parts == 0).nonzero()[:, 0].tolist())
        positions = (s.train, s.validation, s.query, s.database)
        assert all((p.diff() > 0).all() and p.dtype == torch.int64 for p in positions)
        counts = torch.bincount(data.labels[s.validation], minlength=len(train)).tolist()
        assert counts == [min(50, max(1, n//10), n - 1) for n in train]
        if name == 'paper':
            assert d == t | v and q == set((data.parts == 1).nonzero()[:, 0].tolist())
        else:
            halves = [torch.bincount(data.labels[p], minlength=len(train)) for p in (s.query, s.database)]
            assert not d & (t | v) and ((halves[1] - halves[0]) <= 1).all() and (halves[1] >= halves[0]).all()

def test_cifar10_protocol_is_the_published_one():
    split = retrieval_split(made_up([5000]*10, [1000]*10))
    assert [len(p) for p in (split.query, split.database, split.validation)] == [10_000, 50_000, 500]

def test_the_hash_names_the_split():
    data = made_up([20, 20], [4, 4])
    again, other, unseen = retrieval_split(data), retrieval_split(data, seed=1), retrieval_split(data, 'unseen')
    assert retrieval_split(data).hash == again.hash and len({again.hash, other.hash, unseen.hash}) == 3
    renamed = ImageSet(**{**vars(data), 'ids': ('another', *data.ids[1:])})
    assert retrieval_split(renamed).hash != again.hash and torch.equal(retrieval_split(renamed).train, again.train)

def test_splits_that_cannot_be_made():
    with pytest.raises(ValueError, match="'paper' or 'unseen'"):
        retrieval_split(made_up([2, 2], [2, 2]), 'papers')
    with pytest.raises(ValueError, match='no images for query'):
        retrieval_split(made_up([2, 2], [0, 0]))
    with pytest.raises(ValueError, match='no images for query'):
        retrieval_split(made_up([2, 2], [1, 1]), 'unseen')

def test_a_draw_is_part_of_a_larger_one_and_differs_between_classes():
    order = shuffled(torch.tensor([0, 1]*50), 'x', 0)
    assert sorted(order[0].tolist()) == list(range(0, 100, 2)) and (order[0]//2).tolist() != (order[1]//2).tolist()

# ---------- a real archive, where there is one

def test_a_real_archive():
    path = Path(REAL or 'LTHASH_DATA is not set')/'imagenette-128.tar.xz'
    if not path.exists():
        pytest.skip('needs imagenette-128.tar.xz in LTHASH_DATA')
    with files_of(path) as files:
        files = [f for f in files if re.search(SOURCES['imagenette'].wanted, f.path)]
        places = layout([f.path for f in files])
        assert Counter(p for p, _ in places) == {'train': 9469, 'val': 3925}
        assert {c for _, c in places} == set(SOURCES['imagenette'].classes)
        assert all(decode(f.read(), 32).std() > 5 for f in files[:20])
