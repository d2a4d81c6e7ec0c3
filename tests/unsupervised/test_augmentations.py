"Augmented views: torchvision's operations, with one number per image."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as V

from lthash.unsupervised.augmentations import VIEWS, augment, blur, brightness, contrast, hue, saturation


@pytest.mark.parametrize('own,theirs', [(brightness, V.adjust_brightness), (contrast, V.adjust_contrast),
                                        (saturation, V.adjust_saturation), (hue, V.adjust_hue)])
def test_colour_changes_are_torchvisions(own, theirs):
    x = torch.rand(6, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    x[0] = .5                                                       # grey: no hue
    factor = torch.linspace(-.4, .4, 6) if own is hue else torch.linspace(.5, 1.5, 6)
    expected = torch.stack([theirs(a, f) for a, f in zip(x, factor.tolist())])
    torch.testing.assert_close(own(x, factor), expected, atol=2e-6, rtol=0)


def test_blur_is_torchvisions():
    x, sigma = torch.rand(4, 3, 9, 7), torch.tensor([.1, .5, 1., 2.])
    expected = torch.stack([V.gaussian_blur(a, [3, 3], [s, s]) for a, s in zip(x, sigma.tolist())])
    torch.testing.assert_close(blur(x, sigma), expected, atol=1e-5, rtol=0)


@given(seed=st.integers(0, 99), name=st.sampled_from(list(VIEWS)))
@settings(max_examples=20, deadline=None)
def test_views_are_images(seed, name):
    torch.manual_seed(seed)
    x = augment(torch.randint(0, 256, (5, 3, 20, 20), dtype=torch.uint8), name, 16)
    assert x.shape == (5, 3, 16, 16) and x.min() >= 0 and x.max() <= 1 + 1e-5


def test_unknown_view():
    with pytest.raises(ValueError, match='views are drawn by'):
        augment(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 'moco', 8)
