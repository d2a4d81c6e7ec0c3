"The paired bootstrap: coverage, pairing, symmetry."
import numpy as np
import pytest

from lthash.evaluation.significance import paired_bootstrap


def test_bootstrap_covers_and_pairs():
    rng = np.random.default_rng(0)
    hard = rng.random(400)                                   # queries differ much, methods little
    found = paired_bootstrap(hard + .02 + .01*rng.standard_normal(400), hard)
    assert .015 < found['low'] < .02 < found['high'] < .025 and found['p'] < .01
    pairs = [(rng.standard_normal(80), rng.standard_normal(80)) for _ in range(100)]
    null = [paired_bootstrap(a, b, draws=1000, seed=i) for i, (a, b) in enumerate(pairs)]
    assert 88 <= sum(b['low'] <= 0 <= b['high'] for b in null) <= 100
    a, b = rng.random(30), rng.random(30)
    one, other = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert one['difference'] == -other['difference'] and abs(one['low'] + other['high']) < 1e-12
    for x, y in ((a, b[:-1]), ([], [])):
        with pytest.raises(ValueError, match='same queries'):
            paired_bootstrap(x, y)
