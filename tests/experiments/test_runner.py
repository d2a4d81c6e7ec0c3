"Notebooks run end to end, on tiny ones: refusals, failures, resuming, and real kills."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nbformat
import pytest

from lthash.cli.main import main
from lthash.experiments.jobs import survey

ROOT = Path(__file__).parents[2]
LTHASH = [sys.executable, '-c', 'import sys, lthash.cli.main as m; sys.exit(m.main())']
PARAMETERS = 'profile = "cpu"\nout = "reports"'
LOG = 'import os, time\ndef log(*words): print(*words, file=open("log", "a"), flush=True)\n'
KERNEL = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


class Project:
    "A folder with tiny notebooks, which write what they do to `log`."
    def __init__(self, folder: Path):
        self.folder, self.nbs, self.out = folder, folder/'nbs', folder/'reports'
        self.nbs.mkdir(parents=True)

    def notebook(self, name, *sources, tags=('parameters',), parameters=PARAMETERS):
        "Write 'place/NN_name'."
        cells = [nbformat.v4.new_markdown_cell(f'# {name}\n\n> What does it show?'),
                 nbformat.v4.new_code_cell(parameters, metadata={'tags': list(tags)})]
        cells += [nbformat.v4.new_code_cell(s) for s in (LOG + f'log("run", "{name}", profile)', *sources)]
        self.path(name).parent.mkdir(exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={'kernelspec': KERNEL}), self.path(name))

    def path(self, name) -> Path:
        return self.nbs/f'{name}.ipynb'

    def log(self) -> list[str]:
        path = self.folder/'log'
        return path.read_text().splitlines() if path.exists() else []

    def command(self, *more, name='reproduce') -> list[str]:
        return [name, '--profile', 'smoke', '--notebooks', str(self.nbs), *more]

    def start(self, *more) -> subprocess.Popen:
        def as_in_a_terminal():                       # also where the tests themselves run in the background
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen(LTHASH + self.command(*more), cwd=self.folder, stdout=subprocess.PIPE,
                                env=os.environ | {'LTHASH_HOME': str(self.folder)}, stderr=subprocess.STDOUT,
                                text=True, start_new_session=True, preexec_fn=as_in_a_terminal)

    def run(self, *more) -> tuple[int, str]:
        process = self.start(*more)
        said, _ = process.communicate(timeout=240)
        return process.returncode, said

    def states(self) -> dict[str, str]:
        return {j.name: j.state for j in survey(self.nbs, self.out, 'smoke')}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    monkeypatch.setenv('LTHASH_HOME', str(tmp_path))
    return Project(tmp_path)


def until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, 'it did not come to this point'
        time.sleep(.005)


def gone(pid: int, seconds: float = 5) -> bool:
    "Whether the process ends within `seconds` (one that only waits to be reaped has ended)."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = subprocess.run(['ps', '-o', 'stat=', '-p', str(pid)], capture_output=True, text=True)
        state = found.stdout.strip()
        if not state or state.startswith('Z'):
            return True
        time.sleep(.05)
    return False


def pids(project) -> list[int]:
    return [int(line.split()[1]) for line in project.log() if line.startswith('pid')]


def test_refused_before_anything_runs(project, capsys):
    project.notebook('core/01_good')
    wrong = (('core/10_untagged', dict(tags=()), 'core/10_untagged.ipynb: 0 cells are tagged'),
             ('core/11_unknown', dict(parameters='profile = "cpu"\noutt = "reports"'),
              'core/11_unknown.ipynb: its parameters cell does not set out'))
    for name, about, message in wrong:
        project.notebook(name, **about)
        assert main(project.command()) == 2
        assert message in capsys.readouterr().err
        project.path(name).unlink()
    twice = nbformat.read(project.path('core/01_good'), 4)
    twice.cells[2].metadata['tags'] = ['parameters']
    nbformat.write(twice, project.path('core/12_twice'))
    assert main(project.command()) == 2 and '12_twice.ipynb: 2 cells' in capsys.readouterr().err
    project.path('core/12_twice').write_text('{"cells": ')
    assert main(project.command()) == 2 and 'not a notebook' in capsys.readouterr().err
    project.path('core/12_twice').unlink()
    assert main(project.command('--only', 'godd')) == 2
    assert 'no notebook is called godd; the nearest are good' in capsys.readouterr().err
    assert main(project.command('--jobs', '0')) == 2
    project.out.write_text('a file')
    assert main(project.command()) == 2 and 'is a file' in capsys.readouterr().err
    assert main(['reproduce', '--notebooks', str(project.folder/'none')]) == 2
    assert 'git clone' in capsys.readouterr().err
    assert project.log() == []


def test_failures_are_named_and_the_others_run(project):
    project.notebook('papers/01_a1_fails', '1/0')
    project.notebook('papers/02_a2_dies', 'import signal; log("pid", os.getpid())',      # takes its runner with it
                     'os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)')
    project.notebook('core/00_works', 'x = 1')
    status, said = project.run()
    assert status == 1
    assert '01_a1_fails, cell 4: 1/0' in said and 'ZeroDivisionError: division by zero' in said
    assert '02_a2_dies, cell 5' in said and 'status -9' in said
    assert project.states() == {'papers/01_a1_fails': 'failed', 'papers/02_a2_dies': 'failed', 'core/00_works': 'done'}
    page = (project.out/'index.html').read_text()
    assert 'Failed in cell 4' in page and 'ZeroDivisionError' in page and '1 of 3 notebooks done' in page
    copy = project.out/'notebooks'/'papers'/'01_a1_fails.ipynb'
    assert 'ZeroDivisionError' in copy.read_text()                              # the copy shows where it stopped
    assert 'ZeroDivisionError' in copy.with_suffix('.html').read_text()
    assert gone(*pids(project))
    # once repaired, only those two run; the page forgets the failures
    project.notebook('papers/01_a1_fails', '1/1')
    project.notebook('papers/02_a2_dies', 'x = 2')
    assert project.run()[0] == 0
    assert Counter(line for line in project.log() if line.startswith('run')) == {
        'run papers/01_a1_fails smoke': 2, 'run papers/02_a2_dies smoke': 2, 'run core/00_works smoke': 1}
    assert 'Failed' not in (project.out/'index.html').read_text()


TABLE = ('from lthash.core.report import Report\nfrom pathlib import Path\nimport pandas as pd',
         'Report("core/01_table", profile, Path(out)).table(pd.DataFrame({"a": [1]}), "t", "A table.")')


def test_only_what_is_missing(project, capsys):
    project.notebook('core/01_table', *TABLE)
    project.notebook('data/10_plain')
    assert main(project.command('--dry-run')) == 0 and project.log() == [] and not project.out.exists()
    assert main(project.command('--only', 'table')) == 0
    assert project.log() == ['run core/01_table smoke']
    assert project.states() == {'core/01_table': 'done', 'data/10_plain': 'to do'}
    assert main(project.command()) == 0 and main(project.command()) == 0
    assert project.log() == ['run core/01_table smoke', 'run data/10_plain smoke']
    copies = project.out/'notebooks'
    assert sorted(p.relative_to(copies).as_posix() for p in copies.glob('*/[!.]*')) == [
        'core/01_table.html', 'core/01_table.ipynb', 'data/10_plain.html', 'data/10_plain.ipynb']
    capsys.readouterr()
    assert main(project.command(name='status')) == 0
    said = capsys.readouterr().out
    assert re.search(r'core/01_table +done +\d+ s +1 table', said) and '2 of 2 done' in said


def test_what_is_lost_or_changed_is_to_do(project):
    project.notebook('core/01_table', *TABLE)
    project.notebook('data/10_plain')
    assert main(project.command()) == 0
    artefact = project.out/'artefacts'/'core'/'01_table.json'
    kept = artefact.read_text()
    artefact.write_text(kept.replace('smoke', 'cpu'))
    assert project.states()['core/01_table'] == 'to do'
    artefact.write_text(kept)
    assert project.states()['core/01_table'] == 'done'
    (project.out/'tables'/'t.csv').unlink()
    assert project.states()['core/01_table'] == 'to do'
    nb = nbformat.read(project.path('data/10_plain'), 4)
    nb.cells[0].source = '# Another title'                      # a changed sentence is not a changed notebook
    nbformat.write(nb, project.path('data/10_plain'))
    assert project.states()['data/10_plain'] == 'done'
    nb.cells[-1].source += '\n1'
    nbformat.write(nb, project.path('data/10_plain'))
    assert project.states()['data/10_plain'] == 'to do'
    assert {j.state for j in survey(project.nbs, project.out, 'cpu')} == {'to do'}


def test_new_rows_on_record_outdate_the_notebooks_that_read_them(project, tmp_path, monkeypatch):
    rows = tmp_path/'real.csv'
    rows.write_text('value\n1\n')
    monkeypatch.setattr('lthash.experiments.jobs.RECORD', rows)
    project.notebook('core/01_reader', "name = 'real.csv'")
    project.notebook('core/02_other', 'def recorded(): pass\nrecorded()')
    project.notebook('core/03_third')
    assert main(project.command()) == 0 and set(project.states().values()) == {'done'}
    rows.write_text('value\n2\n')
    assert project.states() == {'core/01_reader': 'to do', 'core/02_other': 'to do', 'core/03_third': 'done'}


MEET = ('open(f"here{me}", "w").close()\nend = time.time() + 60\n'
        'while not os.path.exists(f"here{1 - me}") and time.time() < end: time.sleep(.05)\n'
        'assert os.path.exists(f"here{1 - me}")\nlog("threads", os.environ["NUMBA_NUM_THREADS"])')
ONE_CORE = pytest.mark.skipif(CORES < 2, reason='one notebook at a time on one core')


@pytest.mark.parametrize('options', [('--jobs', '2'), pytest.param(('--profile', 'cpu'), marks=ONE_CORE)])
def test_papers_run_side_by_side(project, options):
    "Two notebooks that wait for each other end only if both run at once; one of the library runs after them, alone."
    project.notebook('core/00_module', 'log("module ends")')
    project.notebook('papers/01_a1_one', 'me = 0', MEET, 'time.sleep(.5); log("study ends")')
    project.notebook('papers/02_a2_other', 'me = 1', MEET)
    assert project.run(*options)[0] == 0
    assert [line.rsplit(' ', 1)[0] for line in project.log()[-2:]] == ['run core/00_module', 'module']
    assert project.log().count(f"threads {os.environ.get('NUMBA_NUM_THREADS', max(1, CORES//2))}") == 2


def test_interrupted_and_locked(project, capsys):
    project.notebook('core/01_long', 'log("pid", os.getpid())', 'time.sleep(60)')
    process = project.start()
    until(lambda: pids(project), process)
    assert main(project.command()) == 2 and 'another `lthash reproduce`' in capsys.readouterr().err
    assert project.states() == {'core/01_long': 'running'}
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=40)
    assert process.returncode == 130 and 'Traceback' not in said and 'rerun the command to resume' in said
    assert gone(*pids(project)) and project.states() == {'core/01_long': 'interrupted'}
    assert 'interrupted' in (project.out/'index.html').read_text()


FIRST = '''
from lthash.core.report import Report
from lthash.core.runtime import derive_seed
from lthash.core.store import cached
import pandas as pd
from pathlib import Path
log("pid", os.getpid())
def compute(folder):
    log("begin a"); time.sleep(.6); log("end a")
    return {"value": derive_seed("a") / 2**63}
value = cached("toy", {"trial": "a"}, compute)["value"]
report = Report("papers/01_first", profile, Path(out))
report.rows([{"paper": "toy", "table": "t", "method": "first", "value": value}])
report.table(pd.DataFrame({"value": [value]}), "first", "The first trial.")
'''
LAST = '''
from lthash.core.report import Report
from lthash.core.runtime import derive_seed, write_json
from lthash.core.store import cached
import json, pandas as pd
from pathlib import Path
log("pid", os.getpid())
def train(folder):
    checkpoint = folder/"checkpoint.json"
    step, total = json.loads(checkpoint.read_text()) if checkpoint.exists() else (0, 0.)
    while step < 40:
        step += 1
        total += derive_seed("step", step) / 2**63
        log("step", step); time.sleep(.03)
        if step % 10 == 0: write_json(checkpoint, [step, total])
    return {"value": total}
value = cached("toy", {"trial": "b"}, train)["value"]
report = Report("papers/10_last", profile, Path(out))
report.rows([{"paper": "toy", "table": "t", "method": "last", "value": value}])
report.table(pd.DataFrame({"value": [value]}), "last", "The last trial.")
'''
LEFT = ('results.csv', 'tables/first.csv', 'tables/first.md', 'tables/last.csv', 'tables/last.md',
        'rows/papers/01_first.csv', 'rows/papers/10_last.csv', 'artefacts/papers/01_first.json',
        'artefacts/papers/10_last.json')


def kill_at(project: Project, moments: list) -> None:
    "Start a run and kill it, once at each moment."
    for moment in moments:
        process = project.start()
        until(moment, process)
        process.kill()
        process.wait()
        assert all(gone(pid) for pid in pids(project)), 'a kernel went on computing after its runner was killed'
        results = project.out/'results.csv'
        assert not results.exists() or results.read_text().startswith('paper,')
        assert (project.out/'index.html').read_text().rstrip().endswith('</html>')


def test_killed_at_any_moment(tmp_path, monkeypatch):
    """SIGKILL in the first trial, between two notebooks, and in a checkpointing loop.

    The end is that of an undisturbed run, and no finished work is done again.
    """
    undisturbed, killed = Project(tmp_path/'undisturbed'), Project(tmp_path/'killed')
    for p in (undisturbed, killed):
        p.notebook('papers/01_first', FIRST)
        p.notebook('papers/10_last', LAST)
    monkeypatch.setenv('LTHASH_HOME', str(killed.folder))
    kill_at(killed, [lambda: 'begin a' in killed.log(),
                     lambda: '"done"' in (killed.out/'state'/'papers'/'01_first.json').read_text(),
                     lambda: 'step 25' in killed.log()])
    steps = [line for line in killed.log() if line.startswith('step')]
    time.sleep(.3)
    assert [line for line in killed.log() if line.startswith('step')] == steps        # nobody is at work any more
    for p in (killed, undisturbed):
        monkeypatch.setenv('LTHASH_HOME', str(p.folder))
        status, said = p.run()
        assert status == 0, said
    for name in LEFT:
        assert (killed.out/name).read_bytes() == (undisturbed.out/name).read_bytes(), name
    count = Counter(killed.log())
    last = max(int(line.split()[1]) for line in steps)       # when it was killed
    assert 25 <= last < 40
    assert count['begin a'] == 2 and count['end a'] == 1
    assert count['run papers/01_first smoke'] == 2           # the notebook that was finished did not run again
    again = {s: 2 if last//10*10 < s <= last else 1 for s in range(1, 41)}
    assert {s: count[f'step {s}'] for s in range(1, 41)} == again
    once = Counter(line for line in undisturbed.log() if not line.startswith('pid'))
    assert once.most_common(1)[0][1] == 1
    done = killed.log()
    assert killed.run()[0] == 0 and killed.log() == done


def test_refresh_stores_clean_outputs(project, monkeypatch, capsys):
    shutil.copy(ROOT/'settings.ini', project.folder)
    monkeypatch.chdir(project.folder)
    project.notebook('core/01_prints', 'print("in", os.getcwd(), "at", profile)',
                     'import sys; print("noise", file=sys.stderr)', '"value"')
    path = project.path('core/01_prints')
    before = nbformat.read(path, 4)
    assert main(['refresh', 'prints', '--notebooks', str(project.nbs)]) == 0
    after = nbformat.read(path, 4)
    assert [(c.source, c.id) for c in after.cells] == [(c.source, c.id) for c in before.cells]
    assert [c.metadata for c in after.cells] == [{}, {'tags': ['parameters']}, {}, {}, {}, {}]
    assert after.cells[3].outputs[0].text == 'in . at cpu\n'
    assert after.cells[4].outputs == [] and after.cells[5].outputs[0].data['text/plain'] == "'value'"
    assert str(project.folder) not in path.read_text()
    assert json.loads(path.read_text())['cells'][3]['execution_count'] is None
