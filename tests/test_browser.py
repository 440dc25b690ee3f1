"""A person's way through the tutorial: JupyterLab on loopback, headless Chromium, every cell run, the panel's buttons pressed."""
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[1]
CHROMIUM = os.environ.get('LAD_NB_CHROMIUM') or shutil.which('chromium') or '/usr/bin/chromium'
ARGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
TOKEN = 'lad-nb-tests'


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    """A JupyterLab with a copy of the tutorial, on loopback: its folder and address."""
    folder = tmp_path_factory.mktemp('lab')
    shutil.copy(ROOT/'nbs'/'tutorials'/'step_through_training.ipynb', folder/'tutorial.ipynb')
    for extension, setting in {'notebook-extension/tracker': '{"windowingMode": "none"}', 'apputils-extension/notification': '{"fetchNews": "false"}'}.items():  # all cells stay in the page, and nothing asks
        file = folder/'.settings'/'@jupyterlab'/f'{extension}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(setting)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    home = {f'JUPYTER_{n}_DIR': str(folder/f'.{n.lower()}') for n in ('CONFIG', 'RUNTIME')} | dict(IPYTHONDIR=str(folder/'.ipython'), JUPYTERLAB_SETTINGS_DIR=str(folder/'.settings'), JUPYTERLAB_WORKSPACES_DIR=str(folder/'.workspaces'))
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', f'--IdentityProvider.token={TOKEN}', f'--ServerApp.root_dir={folder}',
               '--LabApp.expose_app_in_browser=True', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate'] + (['--allow-root'] if getattr(os, 'geteuid', lambda: 1)() == 0 else [])
    log = open(folder/'lab.log', 'w')
    server = subprocess.Popen(command, cwd=folder, env=os.environ | home | dict(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])), stdout=log, stderr=log)
    try:
        for _ in range(120):
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api/status?token={TOKEN}', timeout=5).close(); break
            except OSError:
                assert server.poll() is None, (folder/'lab.log').read_text()[-2000:]
                time.sleep(.5)
        yield folder, f'http://127.0.0.1:{port}'
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope='module')
def chromium():
    playwright = pytest.importorskip('playwright.sync_api', reason='no playwright here: pip install playwright')
    if not Path(CHROMIUM).exists(): pytest.skip('no Chromium here: apt-get install chromium, or name one with LAD_NB_CHROMIUM')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


class Bench:
    """The panel, as read from the page."""
    def __init__(self, page): self.page, self.panel = page, page.locator('.jp-OutputArea-output .lad-nb.jupyter-widgets').first
    def step(self): return int(self.panel.locator('.lad-step').inner_text())
    def loss(self): return float(self.panel.locator('.lad-loss').inner_text())
    def state(self): return self.panel.locator('.lad-state').inner_text()
    def picture(self): return self.panel.locator('svg').first.inner_html()
    def button(self, name): return self.panel.locator('button', has_text=re.compile(f'^\\s*{name}\\s*$'))
    def press(self, name): self.button(name).click(timeout=10_000)
    def until(self, ready, seconds=60):
        end = time.time() + seconds
        while not ready():
            assert time.time() < end, f'after {seconds} s: update {self.step()}, {self.state()}'
            self.page.wait_for_timeout(50)


def picture_of(page, folder, name):
    """A screenshot, of a page or of a part, kept where LAD_NB_SCREENSHOTS says."""
    page.screenshot(path=str(folder/f'{name}.png'))
    if keep := os.environ.get('LAD_NB_SCREENSHOTS'):
        Path(keep).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder/f'{name}.png', keep)


def theme(page, name):
    page.evaluate("name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})", f'JupyterLab {name}')
    page.wait_for_selector(f'body[data-jp-theme-light="{str(name == "Light").lower()}"]', state='attached')
    page.wait_for_timeout(1000)


def opened(chromium, lab, name, said):
    """A notebook in the page, every cell run."""
    page = chromium.new_page(viewport=dict(width=1280, height=900))
    page.on('console', lambda m: said.append(m.text) if m.type == 'error' else None)
    page.on('pageerror', lambda e: said.append(f'pageerror: {e}'))
    page.goto(f'{lab[1]}/lab/tree/{name}?token={TOKEN}&reset')  # and no other notebook beside it
    page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=90_000)
    page.get_by_text('| Idle').wait_for(timeout=90_000)  # the kernel is there
    page.get_by_role('menuitem', name='Run', exact=True).first.click()
    page.get_by_role('menuitem', name='Run All Cells').first.click()
    page.wait_for_selector('.lad-nb.jupyter-widgets .lad-step', timeout=180_000)
    end = time.time() + 600
    while any('*' in t for t in page.locator('.jp-Notebook .jp-CodeCell .jp-InputPrompt').all_inner_texts()):
        assert time.time() < end, 'the cells are not through'
        page.wait_for_timeout(200)
    assert page.locator('.jp-Notebook [data-mime-type="application/vnd.jupyter.stderr"]').count() == 0, page.locator('.jp-Notebook [data-mime-type="application/vnd.jupyter.stderr"]').first.inner_text()
    return page


def ours(said): return [s for s in said if re.search(r'widget|lad-nb|comm|pageerror', s, re.I)]


def test_the_tutorial_in_a_real_jupyterlab(lab, chromium, tmp_path):
    said = []
    page = opened(chromium, lab, 'tutorial.ipynb', said)
    bench = Bench(page)
    bench.panel.scroll_into_view_if_needed()
    begun, seen = bench.step(), [bench.picture()]
    for i in (1, 2, 3):
        bench.press('Step')
        bench.until(lambda: bench.step() == begun + i and bench.state() == 'held')
        assert bench.loss() > 0
        seen.append(bench.picture())
    assert len(set(seen)) == 4, 'the picture did not change with every step'
    assert bench.panel.locator('table').count() >= 4 and '|' in bench.panel.locator('td.text').first.inner_text()
    picture_of(page, tmp_path, 'light_1280')
    picture_of(bench.panel, tmp_path, 'light_1280_whole')

    bench.press('Run')
    bench.until(lambda: bench.state() == 'running' and bench.step() >= begun + 5)
    page.locator('.jp-Notebook .jp-CodeCell').last.click()  # the kernel answers while the run goes on
    before = bench.step()
    answer = page.evaluate('''async () => { const k = (await (await fetch('/api/kernels?token=%s')).json())[0]; return k.execution_state }''' % TOKEN)
    assert answer == 'idle', f'the kernel is {answer} during a run: it would not answer'
    bench.until(lambda: bench.step() > before)
    bench.press('Pause')
    bench.until(lambda: bench.state() == 'held')
    paused = bench.step()
    page.wait_for_timeout(1500)
    assert bench.step() == paused > begun + 5 and bench.picture() not in seen

    theme(page, 'Dark')
    colour = lambda selector: page.evaluate('s => { const c = getComputedStyle(document.querySelector(s)).color.match(/[0-9.]+/g).map(Number); return (c[0] + c[1] + c[2])/3 }', selector)
    assert colour('.lad-nb.jupyter-widgets .lad-step') > 150, 'dark letters on a dark page'
    bench.panel.scroll_into_view_if_needed()
    picture_of(page, tmp_path, 'dark_1280')
    page.set_viewport_size(dict(width=800, height=900))
    page.wait_for_timeout(500)
    bench.panel.scroll_into_view_if_needed()
    room = page.evaluate('''() => { const p = document.querySelector('.lad-nb.jupyter-widgets'); return [...p.querySelectorAll('button, svg, td, .widget-html-content')].map(e => e.getBoundingClientRect().right).reduce((a, b) => Math.max(a, b)) - p.getBoundingClientRect().right }''')
    picture_of(page, tmp_path, 'dark_800')
    picture_of(bench.panel, tmp_path, 'dark_800_whole')
    assert room <= 1, f'the panel sticks out by {room} pixels in a narrow window'

    bench.press('Stop')
    bench.until(lambda: bench.state() == 'stopped')
    assert bench.button('Run').is_disabled() and bench.step() == paused
    theme(page, 'Light')
    bench.panel.scroll_into_view_if_needed()
    picture_of(page, tmp_path, 'light_800')
    assert not ours(said)
    page.close()


MANY = """import os, sys, time, warnings
import numpy as np
warnings.filterwarnings('ignore', message='.*no better than chance') # four updates teach a teacher nothing
from lad_nb.recipes import recipe_from_dict
from lad_nb.experiment import run
from lad_nb.panel import LiveView, panel as show_panel
from lad_nb.stepper import Stepper
recipe, root = recipe_from_dict(RECIPE), ROOT

watched, free = Stepper(recipe.replace(experiment='watched'), root), Stepper(recipe.replace(experiment='unwatched'), root)
for callback in (free._reader, free.trainer.callback_handler.callbacks[-1]): free.trainer.remove_callback(callback) # nothing but the place to wait
panel = show_panel(watched)
panel
%%
def timed(stepper, n=20): # seconds of the clock, and of this process' work: other processes disturb the first
    start = time.perf_counter(), time.process_time()
    stepper.step(n)
    return time.perf_counter() - start[0], time.process_time() - start[1]
watched.step(4), free.step(4)
times = np.array([(timed(watched), timed(free)) for _ in range(8)]) # pairs, watched and free, clock and work
free.stop()
print('overhead', *(times[:, 0].sum(0)/times[:, 1].sum(0) - 1).round(4), (times[:, 0, 1]/times[:, 1, 1] - 1).round(3).tolist())
%%
live, start = LiveView(every=10), time.perf_counter()
run(recipe.replace(experiment='live', total_step=120, warmup_step=10), root, progress=False, callbacks=[live])
print('live', round(live.spent/(time.perf_counter() - start), 4), len(live.history))"""


@pytest.mark.slow
def test_five_hundred_steps_through_the_panel(lab, chromium, tmp_path, experiments, lad):
    """Memory of kernel and page stays flat; a step costs at most a tenth over a free one, a live view at most 2 % of its training."""
    import nbformat
    from conftest import FEW
    from lad_nb.models import SMALL
    from lad_nb.experiment import run
    from lad_nb.run_books import run_books
    teacher = run_books['rte']['fine_tune'].replace(experiment='teacher_small', ptrain_ver=SMALL, lr=5e-5, **FEW)
    run(teacher, experiments, progress=False)  # a step as long as a real one: beside a tiny model any panel is dear
    recipe = lad.replace(teacher_exp='teacher_small', total_step=524, warmup_step=20, batch_size=8, ckpt_step=10_000, log_step=50)
    cells = MANY.replace('RECIPE', repr(recipe.to_dict())).replace('ROOT', repr(str(experiments))).split('\n%%\n')
    nbformat.write(nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, cells)], metadata=dict(kernelspec=dict(name='python3', display_name='python3'))), lab[0]/'many.ipynb')
    said = []
    page = opened(chromium, lab, 'many.ipynb', said)
    text = ' '.join(page.locator('.jp-OutputArea-output').all_inner_texts())
    clock, work, pairs = re.search(r'overhead (\S+) (\S+) (\[.*?\])', text).groups()
    live, drawn = float(re.search(r'live ([\d.]+) (\d+)', text)[1]), int(re.search(r'live ([\d.]+) (\d+)', text)[2])
    session = page.context.new_cdp_session(page)
    session.send('Performance.enable')
    kernels = [p for p in Path('/proc').glob('[0-9]*') if (p/'cmdline').exists() and b'ipykernel_launcher' in (p/'cmdline').read_bytes() and str(lab[0]).encode() in (p/'environ').read_bytes()]
    def memory():
        session.send('HeapProfiler.collectGarbage')
        m = {x['name']: x['value'] for x in session.send('Performance.getMetrics')['metrics']}
        resident = [int(re.search(r'VmRSS:\s+(\d+)', (p/'status').read_text())[1])/1024 for p in kernels if (p/'status').exists()]
        return m['JSHeapUsedSize']/2**20, m['Nodes'], max(resident, default=0.)
    bench, seen = Bench(page), []
    bench.panel.scroll_into_view_if_needed()
    bench.press('Run')
    for step in (200, 300, 400, 500):
        bench.until(lambda: bench.step() >= step, 300)
        seen.append((bench.step(), *memory()))
    bench.press('Pause')
    bench.until(lambda: bench.state() == 'held')
    print(f'\noverhead {clock} (clock), {work} (work), {pairs}\nlive {live}, drawn {drawn}\nstep, page MB, page nodes, kernel MB: {seen}')
    assert float(work) < .1
    assert live < .02 and drawn >= 3
    assert seen[-1][1] < seen[0][1] + 5 and seen[-1][2] < seen[0][2] + 500, seen   # page
    assert seen[-1][3] < seen[0][3] + 60, seen                                     # kernel
    assert not ours(said)
    page.close()
