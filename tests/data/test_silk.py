"The embedded silk: same pixels everywhere, clear errors, and no shortcut through colour."
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lthash.data import shapes, silk

classes, indices, seeds = st.integers(0, 19), st.integers(0, 2**40), st.integers(0, 2**62)

# Mean red, green, blue of image 0 of each class at 64 pixels.
# A change of pixels shows here: raise silk.VERSION and renew the table.
MEANS = {3: [
    (130.48, 132.98, 148.08), (97.31, 85.33, 80.11), (161.48, 114.59, 105.0), (94.68, 79.05, 95.46),
    (77.66, 99.46, 101.31), (104.34, 121.63, 95.7), (92.66, 111.01, 94.77), (114.59, 72.1, 68.42),
    (124.72, 119.85, 143.1), (110.37, 122.71, 100.52), (82.39, 91.13, 81.95), (129.97, 129.94, 124.77),
    (142.29, 147.57, 137.05), (110.98, 139.36, 134.35), (149.26, 150.28, 145.43), (110.23, 124.16, 122.04),
    (143.89, 114.46, 134.9), (104.55, 109.43, 91.0), (152.42, 129.91, 100.34), (153.43, 112.37, 79.03)]}


def test_the_pixels_belong_to_the_version():
    means = silk.render_many(range(20), [0]*20).mean((1, 2))
    np.testing.assert_allclose(means, MEANS[silk.VERSION], atol=.2)


def test_classes():
    assert len(silk.CLASSES) == len({c.name for c in silk.CLASSES}) == len({c.chinese for c in silk.CLASSES}) == 20
    categories = [c.category for c in silk.CLASSES]
    assert 5 <= len(set(categories)) <= 7 and min(map(categories.count, categories)) >= 2   # each word is shared


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(classes, indices), min_size=1, max_size=4), seeds, st.integers(32, 80))
def test_alone_or_in_any_batch(pairs, seed, size):
    images = silk.render_many([c for c, _ in pairs], [i for _, i in pairs], seed, size)
    assert images.shape == (len(pairs), size, size, 3) and images.dtype == np.uint8
    for image, (c, i) in zip(images[::-1], pairs[::-1]):
        np.testing.assert_array_equal(image, silk.render(c, i, seed, size))


def test_the_same_bytes_in_a_fresh_process():
    code = ('import sys; from lthash.data import silk; silk.render(3, 3, size=100); '
            'sys.stdout.buffer.write(silk.render_many(range(20), range(20), 5, 40).tobytes())')
    there = subprocess.run([sys.executable, '-c', code], capture_output=True, check=True).stdout
    assert there == silk.render_many(range(20), range(20), 5, 40).tobytes()


@settings(max_examples=15, deadline=None)
@given(classes, indices, seeds)
def test_another_index_seed_or_class_is_another_cloth(cls, i, seed):
    here = silk.render(cls, i, seed, 32).astype(int)
    for other in ((cls, i + 1, seed), (cls, i, seed + 1), ((cls + 1) % 20, i, seed)):
        assert np.abs(here - silk.render(*other, 32)).mean() > 4


@pytest.mark.parametrize('size', [32, 33, 127, 512])
def test_sizes(size):
    assert silk.render(0, 0, size=size).shape == (size, size, 3)


@pytest.mark.parametrize('cls', range(20))
def test_patterns_are_float32_coverages(cls):
    "float64 anywhere would halve the speed; a coverage outside [0, 1] would make colours that no dye has."
    t = np.linspace(-3, 3, 96, dtype=np.float32)
    u, v = np.meshgrid(t, t)
    u.flags.writeable = v.flags.writeable = False   # a pattern leaves its coordinates alone
    for details in (.1, .9):
        for mask in silk.CLASSES[cls].pattern(u, v, .04, lambda lo, hi, at=details: lo + (hi - lo)*at):
            assert mask.dtype == np.float32 and mask.shape == u.shape and 0 <= mask.min() and mask.max() <= 1 + 1e-6
            assert mask.max() > .5   # each layer is used


@given(st.integers(-40, 40), st.integers(-40, 40), st.sampled_from([0., .5]))
def test_tiles_repeat(columns, rows, drop):
    "Two columns further (with a drop of a half) and any number of rows: the same place in another cell."
    t = np.linspace(-.99, .99, 12, dtype=np.float32) + np.float32(1/512)
    u, v = np.meshgrid(t, t)
    x, y, i, j = shapes.tile(u, v, drop)
    there = shapes.tile(u + 2*columns, v + rows, drop)
    for a, b in zip((x, y, i + 2*columns, j + rows + 2*drop*columns), there):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert np.abs([x, y]).max() <= .5


@pytest.mark.parametrize('shape', [
    lambda x, y: shapes.disc(x, y, .3, .1, -.2), lambda x, y: shapes.bar(x, y, .3, .1),
    lambda x, y: shapes.union(shapes.disc(x, y, .2), shapes.outline(shapes.bar(x, y, .4, .1), .02))])
def test_distances_never_grow_faster_than_the_way(shape):
    "The promise that makes coverage a soft edge of width w: |d(p) - d(q)| <= |p - q|."
    rng = np.random.default_rng(0)
    p, q = rng.uniform(-1, 1, (2, 2, 5000))
    assert (np.abs(shape(*p) - shape(*q)) <= np.hypot(*(p - q)) + 1e-9).all()


def test_every_image_is_a_picture():
    "Over many cloths: no image is nearly one flat tone, none is black or burnt out."
    images = silk.render_many(np.repeat(range(20), 25), np.tile(range(25), 20), 1, 48).astype(np.float32)
    assert images.std((1, 2)).max(1).min() > 8
    assert 25 < images.mean((1, 2, 3)).min() and images.mean((1, 2, 3)).max() < 235
    assert (images >= 254).all(-1).mean((1, 2)).max() < .2


@pytest.mark.parametrize('call, says', [
    (lambda: silk.render(20, 0), 'classes 0 to 19'), (lambda: silk.render(-1, 0), 'classes 0 to 19'),
    (lambda: silk.render(0, -1), 'count from 0'), (lambda: silk.render(0, 0, -1), 'count from 0'),
    (lambda: silk.render(0, 0, size=31), '32 to 512'), (lambda: silk.render(0, 0, size=513), '32 to 512'),
    (lambda: silk.render_many([], [], size=-4), '32 to 512'),
    (lambda: silk.render_many([0, 1], [0]), '2 and 1'), (lambda: silk.natural_counts(0), 'at least 1')])
def test_bad_arguments_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize('arguments', [(1.5, 0), ('0', 0), (0, 0, 0, 64.)])
def test_only_whole_numbers(arguments):
    with pytest.raises(TypeError):
        silk.render(*arguments)


def test_numpy_integers_are_integers():
    here = silk.render(np.int64(7), np.uint8(200), np.int32(1), np.int64(32))
    np.testing.assert_array_equal(here, silk.render(7, 200, 1, 32))


def test_colour_does_not_identify_the_class():
    "Nearest centroid on mean colour, contrast and histogram: chance is 5 %."
    n, which = 40, np.repeat(range(20), 40)
    train, val = (silk.render_many(which, np.tile(range(a, a + n), 20), size=32).reshape(20*n, -1, 3)
                  for a in (0, 100_000))

    def accuracy(feature):
        a, b = feature(train), feature(val)
        centres = np.stack([a[which == c].mean(0) for c in range(20)])
        return (((b[:, None] - centres)/(a.std(0) + 1e-9))**2).sum(-1).argmin(1).__eq__(which).mean()

    assert accuracy(lambda x: x.mean(1)) < .10
    assert accuracy(lambda x: np.stack([np.bincount(i, minlength=64) for i in (x >> 6).astype(int) @ [16, 4, 1]])) < .13


def test_no_class_has_a_scale_or_colour_of_its_own():
    "The distribution of what is drawn does not depend on the class."
    numbers = lambda k: (k.repeats, k.turn, k.gloss, k.threads, *k.colours[0])
    drawn = np.array([[numbers(silk.swatch(c, i)) for i in range(100)] for c in range(20)])
    spread = drawn.std((0, 1))
    assert (np.abs(drawn.mean(1) - drawn.mean((0, 1)))/spread < .45).all()   # 4.5 standard errors of a mean of 100


@given(st.integers(1, 10**6))
def test_natural_counts(largest):
    counts = silk.natural_counts(largest)
    assert counts.dtype == np.int64 and counts.shape == (20,) and counts.max() == largest and counts.min() >= 1
    assert (np.diff(counts[list(silk.ORDER)]) <= 0).all() and sorted(silk.ORDER) == list(range(20))
    if largest >= 100:
        assert 16 <= largest/counts.min() <= 25
