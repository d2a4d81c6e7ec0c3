"Multi-label data sets: list files of every published form, broken ones, splits, and relevance down to the mAP."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lthash.data import label_lists
from lthash.data.base import VAL, ImageSet, retrieval_split
from lthash.data.datasets import load
from lthash.data.files import decode
from lthash.data.label_lists import COLLECTIONS, write_sample
from lthash.data.multilabel import PROTOCOLS, load_multilabel, multilabel_images, named_split, relevant_share
from lthash.evaluation.hamming import pack
from lthash.evaluation.metrics import mean_average_precision
from lthash.experiments.trials import run
from lthash.experiments.unsupervised_trials import UnsupervisedTrial
from lthash.unsupervised.features import FeatureConfig, feature_store


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('LTHASH_DATA', str(tmp_path/'data'))
    monkeypatch.setenv('LTHASH_CACHE', str(tmp_path/'cache'))
    (tmp_path/'data').mkdir()
    return tmp_path/'data'


@pytest.mark.parametrize('name', COLLECTIONS)
@pytest.mark.parametrize('form', ('makers', 'lists'))
def test_both_forms_of_both_collections_give_the_labels_written(folder, name, form):
    truth = write_sample(folder/name, name, 50, form)
    data = multilabel_images(name, 24)
    wanted = np.flatnonzero(truth.any(1)) if name == 'nuswide' else np.arange(50)
    if form == 'lists':                                                    # order of the lists: test, then database
        by_id = dict(zip(data.ids, data.labels.numpy()))
        lines = [(folder/name/f).read_text().splitlines() for f in ('test.txt', 'database.txt')]
        rows = {line.split()[0]: line.split()[1:] for line in lines[0] + lines[1]}
        assert set(by_id) <= set(rows) and len(by_id) == len(wanted)
        assert all((by_id[k] == np.array(rows[k], int)).all() for k in by_id)
    else:
        assert (data.labels.numpy() == truth[wanted]).all()
    assert data.images.shape == (len(wanted), 3, 24, 24) and data.labels.shape[1] == len(data.classes)


def test_the_two_label_sets_of_flickr(folder):
    write_sample(folder/'flickr25k', 'flickr25k', 40)
    annotations = folder/'flickr25k'/'annotations'
    with pytest.raises(FileNotFoundError, match='14 of 38'):
        multilabel_images('flickr25k', 16, labels=38)
    for c in label_lists.FLICKR38:
        if c.endswith('_r1'):
            (annotations/f'{c}.txt').write_text('\n'.join((annotations/f'{c[:-3]}.txt').read_text().split()[:1]))
    data = multilabel_images('flickr25k', 16, labels=38)
    potential, salient = data.classes.index('sky'), data.classes.index('sea_r1')
    assert len(data.classes) == 38 and data.labels[:, salient].sum() <= 1 <= data.labels[:, potential].sum()
    assert len(label_lists.FLICKR24) == 24 and len(label_lists.NUS21) == len(set(label_lists.NUS21)) == 21


def test_all_concepts_of_nuswide(folder):
    write_sample(folder/'nuswide', 'nuswide', 30)
    labels = folder/'nuswide'/'Groundtruth'/'AllLabels'
    (labels/'Labels_zebra.txt').write_text('1\n' + '0\n'*29)
    (labels/'Labels_zebra_Train.txt').write_text('1\n')                      # of TrainTestLabels: not a concept
    data = multilabel_images('nuswide', 16, labels=81)
    assert len(data.classes) == 22 and data.labels[0, data.classes.index('zebra')] == 1


def test_missing_and_broken_images_are_listed_with_a_reason(folder):
    write_sample(folder/'flickr25k', 'flickr25k', 40)
    images = folder/'flickr25k'/'mirflickr'
    (images/'im3.jpg').unlink()
    (images/'im5.jpg').write_bytes(b'not an image')
    (images/'im7.jpg').write_bytes(b'')
    data = multilabel_images('flickr25k', 16)
    reasons = dict(data.skipped)
    assert reasons.keys() == {'im3.jpg', 'im5.jpg', 'im7.jpg'} and 'not there' in reasons['im3.jpg']
    assert len(data) == 37 == len(data.images) and 'im4.jpg' in data.ids
    write_sample(folder/'other', 'flickr25k', 40)                            # pixels stay with their names
    for i in (0, 20, 36):
        assert (data.images[i].numpy() == decode((images/data.ids[i]).read_bytes(), 16)).all()


def test_images_are_found_in_any_folder_unless_two_have_the_name(folder):
    write_sample(folder/'flickr25k', 'flickr25k', 20, 'lists')
    root = folder/'flickr25k'
    (root/'deep'/'er').mkdir(parents=True)
    (root/'mirflickr'/'im1.jpg').rename(root/'deep'/'er'/'im1.jpg')
    assert not multilabel_images('flickr25k', 16).skipped
    (root/'deep'/'im2.jpg').write_bytes((root/'mirflickr'/'im3.jpg').read_bytes())
    assert dict(multilabel_images('flickr25k', 16).skipped).keys() == {'im2.jpg'}


def test_what_to_do_is_said(folder):
    with pytest.raises(FileNotFoundError, match='mirflickr25k_annotations_v080.zip'):
        multilabel_images('flickr25k')
    (folder/'nuswide').mkdir()
    with pytest.raises(FileNotFoundError, match='Groundtruth'):
        multilabel_images('nuswide')
    with pytest.raises(ValueError, match='flickr25k, nuswide'):
        multilabel_images('coco')
    write_sample(folder/'flickr25k', 'flickr25k', 20)
    for f in (folder/'flickr25k'/'mirflickr').iterdir():
        f.write_bytes(b'?')
    with pytest.raises(ValueError, match='no image of .* can be read'):
        multilabel_images('flickr25k')


@pytest.mark.parametrize('line, says', [
    ('im1.jpg', 'line 2: expected "path 0 1'), ('im1.jpg 0 2', 'line 2: expected'),
    ('im1.jpg 0 1', 'line 2: 2 labels where the lines before have 3'), ('im0.jpg 1 1 1', 'im0.jpg has other labels')])
def test_broken_list_lines_are_named(tmp_path, line, says):
    (tmp_path/'test.txt').write_text(f'im0.jpg 0 1 0\n{line}\n')
    (tmp_path/'database.txt').write_text('im2.jpg 0 0 1\n')
    with pytest.raises(ValueError, match=says):
        label_lists.read_lists(tmp_path)


def test_list_paths_may_have_spaces_and_backslashes(tmp_path):
    (tmp_path/'query.txt').write_text('my photos\\a 1.jpg 0 1\n\n')
    (tmp_path/'database.txt').write_text('b.jpg  1 0 \n')
    table = label_lists.read_lists(tmp_path)
    assert table.paths == ['my photos/a 1.jpg', 'b.jpg'] and 'train' not in table.lists
    assert table.labels.tolist() == [[False, True], [True, False]]
    (tmp_path/'database.txt').unlink()
    with pytest.raises(FileNotFoundError, match='no database.txt'):
        label_lists.read_lists(tmp_path)


def test_nuswide_lists_of_different_lengths(folder):
    write_sample(folder/'nuswide', 'nuswide', 30)
    path = next((folder/'nuswide').rglob('Labels_sky.txt'))
    for other in path.parent.iterdir():
        other.write_text(other.read_text()[:-2])
    with pytest.raises(ValueError, match='names 30 images, its label files have 29'):
        multilabel_images('nuswide')


def images_of(labels):
    n = len(labels)
    images, parts = torch.zeros(n, 3, 1, 1, dtype=torch.uint8), torch.zeros(n, dtype=torch.int8)
    return ImageSet('made up', 1, images, labels, parts, tuple(map(str, range(n))), (), ())


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(PROTOCOLS)), st.integers(40, 200), st.integers(0, 10**6), st.floats(.002, .02))
def test_splits_are_disjoint_complete_and_reproducible(name, n, seed, share):
    rng = np.random.default_rng(seed)
    rule = PROTOCOLS[name]
    single = rule.dataset == 'cifar10'
    labels = torch.from_numpy(rng.integers(0, 5, n) if single else (rng.random((n, 5)) < .3).astype(np.int64))
    data = images_of(labels)
    try:
        s = named_split(data, name, seed, share=share)
    except ValueError as e:
        assert 'leaves no images' in str(e)
        return
    query, database, train, validation = (set(v.tolist()) for v in (s.query, s.database, s.train, s.validation))
    assert not query & database and query | database == set(range(n))
    assert train | validation <= database and not train & validation
    if labels.ndim == 2:
        assert labels[s.query].any(1).all() and labels[s.validation].any(1).all()
    if rule.queries:
        labelled = int(labels.any(1).sum())                                  # an image without labels is no query
        assert len(query) == min(max(1, round(rule.queries*share)), labelled)
    elif labels.ndim == 1:
        wanted = max(1, round(rule.queries_per_label*share))
        assert all((labels[s.query] == c).sum() == min((labels == c).sum(), wanted) for c in labels.unique())
    else:
        assert all((labels[s.query][:, c]).sum() >= min(1, labels[:, c].sum()) for c in range(5))
    again = named_split(data, name, seed, share=share)
    assert again.hash == s.hash and torch.equal(again.train, s.train)


def test_each_label_takes_its_share_of_queries():
    labels = torch.from_numpy((np.random.default_rng(0).random((3000, 6)) < .2).astype(np.int64))
    s = named_split(images_of(labels), 'bscdh-nuswide', share=.2)   # 20 queries and 100 training images per label
    assert len(s.query) == 6*20 and len(s.train) == 6*100


def test_published_lists_are_a_split(folder):
    write_sample(folder/'flickr25k', 'flickr25k', 60, 'lists')
    data, split = load_multilabel('flickr25k', 16)
    names = lambda f: {line.split()[0] for line in (folder/'flickr25k'/f).read_text().splitlines()}
    assert split.name == 'lists' and {data.ids[i] for i in split.query} == names('test.txt')
    assert {data.ids[i] for i in split.database} == names('database.txt')
    assert {data.ids[i] for i in split.train} == names('train.txt') and (data.parts[split.query] == VAL).all()
    database, query = (folder/'flickr25k'/'database.txt'), (folder/'flickr25k'/'test.txt').read_text().splitlines()[0]
    database.write_text(f'{database.read_text()}{query}\n')
    with pytest.raises(ValueError, match='1 images of flickr25k are both query and database'):
        load_multilabel('flickr25k', 16)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6))
def test_relevant_share_counts_pairs_and_is_the_mean_precision_of_one_code(q, n, classes, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 2, (q, classes)), rng.integers(0, 2, (n, classes))
    expected = np.mean([[(x & y).any() for y in b] for x in a])
    assert np.isclose(relevant_share(torch.from_numpy(a), torch.from_numpy(b)), expected)
    c, d = rng.integers(0, 4, q), rng.integers(0, 4, n)
    assert np.isclose(relevant_share(torch.from_numpy(c), torch.from_numpy(d)), np.mean(c[:, None] == d))


def test_end_to_end_from_list_files_to_map(folder):
    write_sample(folder/'nuswide', 'nuswide', 220)
    data, split = load_multilabel('nuswide', 48)
    labels = data.labels.numpy()
    centres = [data.images[:, :, 8*(c//6) + 4, 8*(c % 6) + 4] for c in range(labels.shape[1])]
    detect = torch.stack([centre.float().amax(1) for centre in centres], 1) - 70     # is there a square?
    def score(codes):
        return mean_average_precision(codes[split.query], labels[split.query],
                                      codes[split.database], labels[split.database], k=50)
    random = score(pack(torch.randn(len(data), labels.shape[1], generator=torch.Generator().manual_seed(0))))
    base = relevant_share(data.labels[split.query], data.labels[split.database])
    assert score(pack(detect)) > random + .2 and abs(random - base) < .1


def test_a_method_trains_on_a_multi_label_folder(folder, monkeypatch):
    "List files, decoding, frozen features, views, training, mAP: the whole way of the unsupervised tables."
    monkeypatch.setenv('LTHASH_HOME', str(folder/'home'))
    write_sample(folder/'flickr25k', 'flickr25k', 120)
    config = FeatureConfig('flickr25k', 'alexnet-small', 'random', size=32, views=2)
    store = feature_store(config)
    assert store.labels.shape == (120, 24) and store.split.name == 'bscdh-flickr25k'
    for method, epochs in (('ITQ', 0), ('SDC', 2)):
        found = run(UnsupervisedTrial(method=method, bits=16, features=config, epochs=epochs, checks=1))
        assert 0 < found['mAP'] <= 1 and found['database'] == len(store.split.database)


@pytest.mark.parametrize('name', COLLECTIONS)
def test_known_by_name_like_any_data_set(folder, name):
    write_sample(folder/name, name, 40)
    data = load(name, 16)
    assert data.labels.ndim == 2 and data.name == name
    assert torch.equal(data.images, multilabel_images(name, 16).images)
    with pytest.raises(ValueError, match='several labels'):
        load(name, 16, train_per_class=3)
    with pytest.raises(ValueError, match='named_split'):
        retrieval_split(data)
    with pytest.raises(ValueError, match='flickr25k, nuswide or folder:PATH'):
        load('mnist')


@pytest.mark.parametrize('name,form', [('flickr25k', 'makers'), ('nuswide', 'lists')])
def test_from_a_folder_to_a_row(folder, monkeypatch, tmp_path, name, form):
    "List files and images in, mAP with multi-label relevance out, false negatives counted over several labels."
    monkeypatch.setenv('LTHASH_HOME', str(tmp_path/'home'))
    write_sample(folder/name, name, 100, form)
    trial = UnsupervisedTrial(
        method='BSCDH', bits=16, features=FeatureConfig(name, 'alexnet-small', 'random', size=32, views=2), epochs=2,
        options=dict(hidden=16, queue=8, suppressed=.25), recipe=dict(batch=4), checks=1)
    (row, _), result = trial.rows('table1'), run(trial)
    assert 0 < row['value'] < 1 and row['dataset'] == name and 0 < result['checks'][0]['base rate'] < 1
    assert len(result['class AP']) == len(next(iter(COLLECTIONS[name].labels.values())))
