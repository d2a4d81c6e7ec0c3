"The index against brute force: order of ties, files, approximate kinds, faults."
import numpy as np
import pytest

from lthash.evaluation.hamming import noisy_codes, pack
from lthash.search.index import BinaryIndex


@pytest.mark.parametrize('bits', [5, 16, 64, 100])
def test_flat_index_orders_ties_by_id(bits, tmp_path):
    rng = np.random.default_rng(bits)
    d, q = pack(rng.normal(size=(2000, bits))), pack(rng.normal(size=(20, bits)))
    index = BinaryIndex(bits)
    for batch in np.array_split(d, 7):
        index.add(batch)
    assert len(index) == 2000
    distance = np.bitwise_count(q[:, None] ^ d[None]).sum(2, dtype=int)
    for k in (1, 10, 333, 5000):
        ids = np.argsort(distance, axis=1, kind='stable')[:, :k]
        found = index.search(q, k)
        assert (found[1] == ids).all() and (found[0] == np.take_along_axis(distance, ids, 1)).all()
    again = BinaryIndex.load(index.save(tmp_path/'x.index'))
    assert (again.search(q, 10)[1] == index.search(q, 10)[1]).all() and len(again.add(d)) == 4000


@pytest.mark.parametrize('kind', ['ivf', 'hnsw'])
def test_approximate_indexes_find_most(kind, tmp_path):
    labels = np.random.default_rng(0).integers(0, 50, 4050)
    codes = noisy_codes(labels, 64, .08)
    index = BinaryIndex(64, kind, lists=32, probes=8).add(codes[:4000])
    index = BinaryIndex.load(index.save(tmp_path/'x.index'))
    distances, ids = index.search(codes[4000:], 5)
    assert (labels[ids] == labels[4000:, None]).mean() > .95 and (np.diff(distances) >= 0).all()


def test_index_refuses_what_it_cannot_use(tmp_path):
    with pytest.raises(ValueError, match='kind'):
        BinaryIndex(64, 'tree')
    with pytest.raises(ValueError, match='empty'):
        BinaryIndex(64).search(np.zeros((1, 8), np.uint8), 1)
    with pytest.raises(ValueError, match='use pack'):
        BinaryIndex(64).add(np.zeros((1, 64)))
    with pytest.raises(ValueError, match='fewer lists'):
        BinaryIndex(64, 'ivf').add(np.zeros((10, 8), np.uint8))
    (tmp_path/'bad').write_bytes(b'not an index at all')
    with pytest.raises(ValueError, match='not a faiss binary index'):
        BinaryIndex.load(tmp_path/'bad')
    with pytest.raises(FileNotFoundError):
        BinaryIndex.load(tmp_path/'absent')
