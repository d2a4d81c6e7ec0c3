"`lthash reproduce` end to end, on tiny notebooks: guards, failures, resuming, and real kills."
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

from lthash.reproduce import main, survey

LTHASH = [sys.executable, '-c', 'import sys, lthash.reproduce as r; sys.exit(r.main())']
PARAMETERS = 'profile = "cpu"\nout = "reports"'
LOG = 'import os, time\ndef log(*words): print(*words, file=open("log", "a"), flush=True)\n'


class Project:
    "A folder with tiny notebooks, which write what they do to `log`."
    def __init__(self, folder: Path):
        self.folder, self.nbs, self.out = folder, folder/'nbs', folder/'reports'
        self.nbs.mkdir(parents=True)

    def notebook(self, name, *sources, tags=('parameters',), parameters=PARAMETERS):
        cells = [nbformat.v4.new_markdown_cell(f'# {name}\n\n> What does it show?'), nbformat.v4.new_code_cell(parameters, metadata={'tags': list(tags)})]
        cells += [nbformat.v4.new_code_cell(s) for s in (LOG + f'log("run", "{name}", profile)', *sources)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}), self.nbs/f'{name}.ipynb')

    def log(self) -> list[str]:
        path = self.folder/'log'
        return path.read_text().splitlines() if path.exists() else []

    def command(self, *more, name='reproduce') -> list[str]: return [name, '--profile', 'smoke', '--notebooks', str(self.nbs), *more]

    def start(self, *more) -> subprocess.Popen:
        return subprocess.Popen(LTHASH + self.command(*more), cwd=self.folder, env=os.environ | {'LTHASH_HOME': str(self.folder)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))   # as in a terminal, also where the tests themselves run in the background

    def run(self, *more) -> tuple[int, str]:
        process = self.start(*more)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said

    def states(self) -> dict[str, str]: return {j.name: j.state for j in survey(self.nbs, self.out, 'smoke')}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    monkeypatch.setenv('LTHASH_HOME', str(tmp_path))
    return Project(tmp_path)


def until(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, 'it did not come to this point'
        time.sleep(.005)


def gone(pid: int, seconds: float = 3) -> bool:
    "Whether the process ends within `seconds` (one that only waits to be reaped has ended)."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = subprocess.run(['ps', '-o', 'stat=', '-p', str(pid)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith('Z'): return True
        time.sleep(.05)
    return False


def pids(project) -> list[int]: return [int(line.split()[1]) for line in project.log() if line.startswith('pid')]


def test_refused_before_anything_runs(project, capsys):
    project.notebook('01_good')
    for name, about, message in (('10_untagged', dict(tags=()), '10_untagged.ipynb: 0 cells are tagged'),
                                 ('11_unknown', dict(parameters='profile = "cpu"\noutt = "reports"'), '11_unknown.ipynb: its parameters cell does not set out')):
        project.notebook(name, **about)
        assert main(project.command()) == 2
        assert message in capsys.readouterr().err
        (project.nbs/f'{name}.ipynb').unlink()
    twice = nbformat.read(project.nbs/'01_good.ipynb', 4)
    twice.cells[2].metadata['tags'] = ['parameters']
    nbformat.write(twice, project.nbs/'12_twice.ipynb')
    assert main(project.command()) == 2 and '12_twice.ipynb: 2 cells' in capsys.readouterr().err
    (project.nbs/'12_twice.ipynb').write_text('{"cells": ')
    assert main(project.command()) == 2 and 'not a notebook' in capsys.readouterr().err
    (project.nbs/'12_twice.ipynb').unlink()
    assert main(project.command('--only', '77')) == 2 and 'no notebook is called 77' in capsys.readouterr().err
    assert main(project.command('--jobs', '0')) == 2
    project.out.write_text('a file')
    assert main(project.command()) == 2 and 'is a file' in capsys.readouterr().err
    assert main(['reproduce', '--notebooks', str(project.folder)]) == 2 and 'git clone' in capsys.readouterr().err
    assert project.log() == []


def test_failures_are_named_and_the_others_run(project):
    project.notebook('01_fails', '1/0')
    project.notebook('02_dies', 'import signal; log("pid", os.getpid())', 'os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)')     # takes its runner with it
    project.notebook('10_works', 'x = 1')
    status, said = project.run()
    assert status == 1
    assert '01_fails, cell 4: 1/0' in said and 'ZeroDivisionError: division by zero' in said and '02_dies, cell 5' in said and 'status -9' in said
    assert project.states() == {'01_fails': 'failed', '02_dies': 'failed', '10_works': 'done'}
    page = (project.out/'index.html').read_text()
    assert 'Failed in cell 4' in page and 'ZeroDivisionError' in page and '1 of 3 done' in page
    assert 'ZeroDivisionError' in (project.out/'notebooks'/'01_fails.ipynb').read_text()        # the copy shows where it stopped
    assert gone(*pids(project))
    # once repaired, only those two run; the page forgets the failures
    project.notebook('01_fails', '1/1')
    project.notebook('02_dies', 'x = 2')
    assert project.run()[0] == 0
    assert Counter(line for line in project.log() if line.startswith('run')) == {'run 01_fails smoke': 2, 'run 02_dies smoke': 2, 'run 10_works smoke': 1}
    assert 'Failed' not in (project.out/'index.html').read_text()


def test_only_what_is_missing(project, capsys):
    project.notebook('01_table', 'from lthash.runs import Report\nfrom pathlib import Path\nimport pandas as pd', 'Report("01_table", profile, Path(out)).table(pd.DataFrame({"a": [1]}), "t", "A table.")')
    project.notebook('10_plain')
    assert main(project.command('--dry-run')) == 0 and project.log() == [] and not project.out.exists()
    assert main(project.command('--only', '1')) == 0
    assert project.log() == ['run 01_table smoke'] and project.states() == {'01_table': 'done', '10_plain': 'to do'}
    assert main(project.command()) == 0 and main(project.command()) == 0
    assert project.log() == ['run 01_table smoke', 'run 10_plain smoke']
    assert sorted(p.name for p in (project.out/'notebooks').glob('[!.]*')) == ['01_table.html', '01_table.ipynb', '10_plain.html', '10_plain.ipynb']
    capsys.readouterr()
    assert main(project.command(name='status')) == 0
    said = capsys.readouterr().out
    assert re.search(r'01_table +done +\d+ s +1 table', said) and '2 of 2 done' in said
    # a lost or overwritten artefact is missing, a changed cell is, a changed sentence is not
    artefact = project.out/'artefacts'/'01_table.json'
    kept = artefact.read_text()
    artefact.write_text(kept.replace('smoke', 'cpu'))
    assert project.states()['01_table'] == 'to do'
    artefact.write_text(kept)
    assert project.states()['01_table'] == 'done'
    (project.out/'tables'/'t.csv').unlink()
    assert project.states()['01_table'] == 'to do'
    nb = nbformat.read(project.nbs/'10_plain.ipynb', 4)
    nb.cells[0].source = '# Another title'
    nbformat.write(nb, project.nbs/'10_plain.ipynb')
    assert project.states()['10_plain'] == 'done'
    nb.cells[-1].source += '\n1'
    nbformat.write(nb, project.nbs/'10_plain.ipynb')
    assert project.states()['10_plain'] == 'to do'
    assert {j.state for j in survey(project.nbs, project.out, 'cpu')} == {'to do'}


def test_new_rows_of_profile_real_outdate_the_notebooks_that_read_them(project, tmp_path, monkeypatch):
    rows = tmp_path/'real.csv'
    rows.write_text('value\n1\n')
    monkeypatch.setattr('lthash.reproduce.RECORD', rows)
    project.notebook('01_reader', "name = 'real.csv'")
    project.notebook('02_other')
    assert main(project.command()) == 0 and set(project.states().values()) == {'done'}
    rows.write_text('value\n2\n')
    assert project.states() == {'01_reader': 'to do', '02_other': 'done'}


CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()

@pytest.mark.parametrize('options', [('--jobs', '2'), pytest.param(('--profile', 'cpu'), marks=pytest.mark.skipif(CORES < 2, reason='one notebook at a time on one core'))])
def test_jobs_run_side_by_side(project, options):
    "Two notebooks that wait for each other can only end if both run at once, asked for or by default at profile cpu; a module runs before them, alone."
    meet = 'open(f"here{me}", "w").close()\nend = time.time() + 40\nwhile not os.path.exists(f"here{1 - me}") and time.time() < end: time.sleep(.05)\nassert os.path.exists(f"here{1 - me}")\nlog("threads", os.environ["NUMBA_NUM_THREADS"])'
    project.notebook('01_module', 'time.sleep(.5); log("module ends")')
    project.notebook('10_one', 'me = 0', meet)
    project.notebook('11_other', 'me = 1', meet)
    assert project.run(*options)[0] == 0
    assert [line.rsplit(' ', 1)[0] for line in project.log()[:2]] == ['run 01_module', 'module']
    assert project.log().count(f"threads {os.environ.get('NUMBA_NUM_THREADS', max(1, CORES//2))}") == 2


def test_interrupted_and_locked(project, capsys):
    project.notebook('01_long', 'log("pid", os.getpid())', 'time.sleep(60)')
    process = project.start()
    until(lambda: pids(project), process)
    assert main(project.command()) == 2 and 'another `lthash reproduce`' in capsys.readouterr().err
    assert project.states() == {'01_long': 'running'}
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and 'Traceback' not in said and 'the same command goes on' in said
    assert gone(*pids(project)) and project.states() == {'01_long': 'interrupted'}
    assert 'interrupted' in (project.out/'index.html').read_text()


FIRST = '''
from lthash.runs import Report, cached, derive_seed, write_json
import json, pandas as pd
from pathlib import Path
log("pid", os.getpid())
def compute(folder):
    log("begin a"); time.sleep(.6); log("end a")
    return {"value": derive_seed("a") / 2**63}
value = cached("toy", {"trial": "a"}, compute)["value"]
report = Report("01_first", profile, Path(out))
report.rows([{"paper": "toy", "table": "t", "method": "first", "value": value}])
report.table(pd.DataFrame({"value": [value]}), "first", "The first trial.")
'''
LAST = '''
from lthash.runs import Report, cached, derive_seed, write_json
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
report = Report("10_last", profile, Path(out))
report.rows([{"paper": "toy", "table": "t", "method": "last", "value": value}])
report.table(pd.DataFrame({"value": [value]}), "last", "The last trial.")
'''


def test_killed_at_any_moment(tmp_path, monkeypatch):
    "SIGKILL in the first trial, between two notebooks, and in a checkpointing loop: the end is that of an undisturbed run, and no finished work is done again."
    undisturbed, killed = Project(tmp_path/'undisturbed'), Project(tmp_path/'killed')
    for p in (undisturbed, killed):
        p.notebook('01_first', FIRST)
        p.notebook('10_last', LAST)
    monkeypatch.setenv('LTHASH_HOME', str(killed.folder))
    moments = [lambda: 'begin a' in killed.log(),
               lambda: '"done"' in (killed.out/'state'/'01_first.json').read_text(),
               lambda: 'step 25' in killed.log()]
    for moment in moments:
        process = killed.start()
        until(moment, process)
        process.kill()
        process.wait()
        assert all(gone(pid) for pid in pids(killed)), 'a kernel went on computing after its driver was killed'
        assert not (killed.out/'results.csv').exists() or (killed.out/'results.csv').read_text().startswith('paper,')
        assert (killed.out/'index.html').read_text().rstrip().endswith('</html>')
    steps = [line for line in killed.log() if line.startswith('step')]
    time.sleep(.3)
    assert [line for line in killed.log() if line.startswith('step')] == steps        # nobody is at work any more
    for p in (killed, undisturbed):
        monkeypatch.setenv('LTHASH_HOME', str(p.folder))
        status, said = p.run()
        assert status == 0, said
    for name in ('results.csv', 'tables/first.csv', 'tables/first.md', 'tables/last.csv', 'tables/last.md', 'rows/01_first.csv', 'rows/10_last.csv', 'artefacts/01_first.json', 'artefacts/10_last.json'):
        assert (killed.out/name).read_bytes() == (undisturbed.out/name).read_bytes(), name
    count = Counter(killed.log())
    last = max(int(line.split()[1]) for line in steps)       # when it was killed
    assert 25 <= last < 40
    assert count['begin a'] == 2 and count['end a'] == 1 and count['run 01_first smoke'] == 2       # the notebook that was finished did not run again
    assert {s: count[f'step {s}'] for s in range(1, 41)} == {s: 2 if last//10*10 < s <= last else 1 for s in range(1, 41)}
    assert Counter(line for line in undisturbed.log() if not line.startswith('pid')).most_common(1)[0][1] == 1
    done = killed.log()
    assert killed.run()[0] == 0 and killed.log() == done


def test_refresh_stores_clean_outputs(project, monkeypatch, capsys):
    shutil.copy(Path(__file__).parent.parent/'settings.ini', project.folder)
    monkeypatch.chdir(project.folder)
    project.notebook('01_prints', 'print("in", os.getcwd(), "at", profile)', 'import sys; print("noise", file=sys.stderr)', '"value"')
    before = nbformat.read(project.nbs/'01_prints.ipynb', 4)
    assert main(['refresh', '01', '--notebooks', str(project.nbs)]) == 0
    after = nbformat.read(project.nbs/'01_prints.ipynb', 4)
    assert [(c.source, c.id) for c in after.cells] == [(c.source, c.id) for c in before.cells]
    assert [c.metadata for c in after.cells] == [{}, {'tags': ['parameters']}, {}, {}, {}, {}]
    assert after.cells[3].outputs[0].text == 'in . at cpu\n'
    assert after.cells[4].outputs == [] and after.cells[5].outputs[0].data['text/plain'] == "'value'"
    assert str(project.folder) not in (project.nbs/'01_prints.ipynb').read_text()
    assert json.loads((project.nbs/'01_prints.ipynb').read_text())['cells'][3]['execution_count'] is None


@pytest.mark.parametrize('command', [['status'], ['reproduce', '--dry-run'], ['--help']])
def test_the_command_line_answers_without_torch(project, command):
    project.notebook('01_any')
    more = [] if command == ['--help'] else ['--notebooks', str(project.nbs)]
    code = f'import sys, lthash.reproduce as r\ntry: r.main({command + more})\nexcept SystemExit: pass\nassert not set(sys.modules) & {{"torch", "papermill", "nbconvert"}}, "slow imports"'
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, env=os.environ | {'LTHASH_HOME': str(project.folder)})
