"The rows on record: complete, as they were measured, and with every fact in a column of its own."
import csv
import hashlib
import re
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from lthash.core.report import ROW_COLUMNS, read_rows

ROOT = Path(__file__).parents[2]
RECORD = ROOT/'data'/'results'/'real.csv'
KEPT = ('paper', 'table', 'dataset', 'method', 'backbone', 'bits', 'metric', 'value', 'seed', 'profile', 'protocol',
        'group', 'size', 'seconds', 'device', 'versions', 'substitutes', 'weights')
# column: (rows that have it, their sum), read from the sentences in which the first version of the file kept them
FACTS = {
    'images': (6074, 26_503_929), 'classes': (1312, 20_630), 'samples': (3840, 103_320_000), 'epochs': (524, 78_880),
    'kept_epoch': (488, 71_456.132), 'views': (488, 3_856), 'hidden': (482, 438_272), 'queue': (420, 430_592),
    'guidance': (292, 1_248), 'steps': (232, 2_470), 'synthetic_images': (1782, 10_298_205),
    'pretrain_samples': (1782, 23_436_000), 'personalization_scale': (1782, 1_255.5), 'cas': (1782, 366.876),
    'cas_threshold': (1782, 232.038), 'cas_passed': (1782, 1_593), 'cas_images': (1782, 5_135_562),
    'cas_classes': (1782, 30_078), 'cas_tested': (1782, 763_560), 'cas_seeds': (1782, 1_782),
}
COMPARED = ('mAP difference (points)', 'mAP difference, lower end', 'mAP difference, upper end', 'p of the difference')


@pytest.fixture(scope='module')
def lines() -> list[dict]:
    "The file as text, nothing interpreted."
    with RECORD.open(newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def rows() -> pd.DataFrame:
    "The file as the project reads it."
    return read_rows(RECORD)


def blake(rows: list[str]) -> str:
    return hashlib.blake2b('\n'.join(rows).encode(), digest_size=16).hexdigest()


def test_every_measured_number_is_there_and_unchanged(lines):
    assert len(lines) == 6278 and list(lines[0]) == ROW_COLUMNS
    kept = sorted(tuple(r[c] for c in KEPT) for r in lines)
    assert blake(['\t'.join(t) for t in kept]) == '0f5b65bab493b975666d06a10cd5e9f1'


@pytest.mark.parametrize('fact', FACTS)
def test_no_fact_of_the_sentences_was_lost(rows, fact):
    found = rows[fact].dropna().astype(float)
    assert (len(found), found.sum()) == (FACTS[fact][0], pytest.approx(FACTS[fact][1], abs=1e-6))


def test_every_fact_stands_beside_its_number(lines):
    def text(fact: str, value: str) -> str:
        return value and format(float({'True': 1, 'False': 0}.get(value, value)), '.10g')
    identity = ('paper', 'dataset', 'backbone', 'bits', 'metric', 'value', 'protocol', 'group')
    found = ['\t'.join([*(r[c] for c in identity), *(text(f, r[f]) for f in FACTS)]) for r in lines]
    assert blake(sorted(found)) == '39012b913046f8d9633fae10f20425c2'


def test_settings_factors_and_claims(rows):
    settings = Counter(rows[rows.table.isin(['table2', 'table3', 'baselines', 'generation'])
                            & (rows.paper == 'longtail')].setting)
    assert settings['attndreambooth'] == 486 and settings['balanced'] == settings['long-tail'] == 432
    assert settings['AttnDreamBooth'] == settings['prompt only'] == 226 and settings['long-tailed real'] == 138
    for technique in ('duplicates', 'resampling', 'class-balanced loss', 'logit adjustment', 'decoupled re-training',
                      'RandAugment', 'mixup', 'CutMix', 'SMOTE', 'LTHNet', 'extra real images', 'prompt'):
        assert settings[technique] == 54
    factors = Counter(rows[(rows.table == 'ablations') & (rows.claim == '')].factor)
    assert factors == {'synthetic images': 189, 'modules': 105, 'stages': 81, 'formula (1)': 81, 'real images': 81,
                       'guidance': 81, 'filter': 54, 'personalized': 54}
    assert Counter(rows[rows.factor == 'epoch']['level']) == {str(epoch): 12 for epoch in range(10, 201, 10)}
    assert Counter(rows[rows.personalized != ''].personalized) == {'head, mid, tail': 1107, 'tail': 675}


def test_claims_stand_in_comparisons_only(rows):
    compared = rows.metric.isin(COMPARED)
    assert (compared == (rows.claim != '')).all() and compared.sum() == 204 and rows[compared].claim.nunique() == 17
    assert sorted(Counter(rows[compared].claim).values()) == [4]*7 + [8]*6 + [16]*2 + [48]*2


def test_the_cas_test_agrees_with_its_numbers(rows):
    tested = rows.dropna(subset=['cas'])
    assert ((tested.cas > tested.cas_threshold) == tested.cas_passed.astype(bool)).all()
    assert (tested.cas_threshold > 1/tested.cas_classes).all()
    assert (tested.pretrain_samples <= tested.samples).all()


def test_a_note_holds_only_what_has_no_column(lines):
    assert sum(bool(r['note']) for r in lines) == 6
    assert not [r for r in lines if re.search(r'training|passes|epochs|gate|budget|seed', r['note'])]


@pytest.mark.parametrize('path', sorted([*(ROOT/'lthash').rglob('*.py'), *(ROOT/'nbs').rglob('*.ipynb')]),
                         ids=lambda path: f'{path.parent.name}/{path.name}')
def test_no_code_reads_a_fact_out_of_a_sentence(path):
    parsed = r"""\bnote(?:["']\])?\.(?:str|split|partition|startswith|endswith|removeprefix|strip|find|iloc)\b"""
    found = re.findall(rf'{parsed}|\bre\.\w+\([^)\n]*\bnote\b', path.read_text(encoding='utf-8'))
    assert not found
