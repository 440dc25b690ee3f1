"""A person's way through the tutorial: JupyterLab, headless Chromium, every cell run, buttons pressed."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from conftest import FEW

from lad_nb.experiment import run
from lad_nb.models import SMALL
from lad_nb.pages import replay_html
from lad_nb.pictures import example_record
from lad_nb.run_books import run_books
from lad_nb.stepper import Stepper

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[1]
CHROMIUM = os.environ.get('LAD_NB_CHROMIUM') or shutil.which('chromium') or '/usr/bin/chromium'
ARGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
        '--disable-background-networking', '--disable-component-update']
TOKEN = 'lad-nb-tests'
SETTINGS = {'notebook-extension/tracker': '{"windowingMode": "none"}',       # all cells stay in the page,
            'apputils-extension/notification': '{"fetchNews": "false"}'}     # and nothing asks


def write_settings(folder):
    for extension, setting in SETTINGS.items():
        file = folder/'@jupyterlab'/f'{extension}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(setting)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def start_lab(folder, port, log):
    """A JupyterLab on loopback: settings, kernels and notebooks, in their small form, are in the folder."""
    write_settings(folder/'.settings')
    home = {f'JUPYTER_{n}_DIR': str(folder/f'.{n.lower()}') for n in ('CONFIG', 'RUNTIME')}
    home |= dict(IN_TEST='1', IPYTHONDIR=str(folder/'.ipython'),
                 JUPYTERLAB_SETTINGS_DIR=str(folder/'.settings'),
                 JUPYTERLAB_WORKSPACES_DIR=str(folder/'.workspaces'),
                 PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}',
               '--ServerApp.port_retries=0', f'--ServerApp.root_dir={folder}',
               f'--IdentityProvider.token={TOKEN}', '--LabApp.expose_app_in_browser=True',
               '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    if getattr(os, 'geteuid', lambda: 1)() == 0: command.append('--allow-root')
    return subprocess.Popen(command, cwd=folder, env=os.environ | home, stdout=log, stderr=log)


def wait_for_lab(server, port, log):
    for _ in range(120):
        try:
            urllib.request.urlopen(f'http://127.0.0.1:{port}/api/status?token={TOKEN}', timeout=5).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(.5)


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    """A JupyterLab with a copy of the tutorial, on loopback: its folder and address."""
    folder = tmp_path_factory.mktemp('lab')
    tutorial = (ROOT/'nbs'/'tutorials'/'step_through_training.ipynb').read_text()
    long = tutorial.replace('total_step=200, warmup_step=4', 'total_step=9000, warmup_step=4')
    assert long.count('total_step=9000') == 1  # the tiny model of tests would be through before Pause
    (folder/'tutorial.ipynb').write_text(long)
    port = free_port()
    with open(folder/'lab.log', 'w') as log: server = start_lab(folder, port, log)
    try:
        wait_for_lab(server, port, folder/'lab.log')
        yield folder, f'http://127.0.0.1:{port}'
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope='module')
def chromium():
    playwright = pytest.importorskip('playwright.sync_api', reason='pip install playwright')
    if not Path(CHROMIUM).exists():
        pytest.skip('no Chromium here: apt-get install chromium, or name one with LAD_NB_CHROMIUM')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


class Bench:
    """The panel, as read from the page."""
    def __init__(self, page):
        self.page, self.panel = page, page.locator('.jp-OutputArea-output .lad-nb.jupyter-widgets').first

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
    change = "name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})"
    page.evaluate(change, f'JupyterLab {name}')
    page.wait_for_selector(f'body[data-jp-theme-light="{str(name == "Light").lower()}"]', state='attached')
    page.wait_for_timeout(1000)


def opened(chromium, lab, name, said):
    """A notebook in the page, every cell run."""
    page = chromium.new_page(viewport=dict(width=1280, height=900))
    page.on('console', lambda m: said.append(m.text) if m.type == 'error' else None)
    page.on('pageerror', lambda e: said.append(f'pageerror: {e}'))
    alone = f'{lab[1]}/lab/tree/{name}?token={TOKEN}&reset'  # no other notebook beside it
    page.goto(alone, timeout=90_000)
    page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=90_000)
    page.get_by_text('| Idle').wait_for(timeout=90_000)  # the kernel is there
    page.get_by_role('menuitem', name='Run', exact=True).first.click()
    page.get_by_role('menuitem', name='Run All Cells').first.click()
    page.wait_for_selector('.lad-nb.jupyter-widgets .lad-step', timeout=180_000)
    end = time.time() + 600
    prompts = page.locator('.jp-Notebook .jp-CodeCell .jp-InputPrompt')
    while any('*' in t for t in prompts.all_inner_texts()):
        assert time.time() < end, 'the cells are not through'
        page.wait_for_timeout(200)
    errors = page.locator('.jp-Notebook [data-mime-type="application/vnd.jupyter.stderr"]')
    assert errors.count() == 0, errors.first.inner_text()
    return page


def ours(said): return [s for s in said if re.search(r'widget|lad-nb|comm|pageerror', s, re.I)]


KERNEL_STATE = f"""async () => {{
    const kernels = await (await fetch('/api/kernels?token={TOKEN}')).json()
    return kernels[0].execution_state
}}"""
BRIGHTNESS = """selector => {
    const c = getComputedStyle(document.querySelector(selector)).color.match(/[0-9.]+/g).map(Number)
    return (c[0] + c[1] + c[2])/3
}"""
STICKS_OUT = """() => {
    const panel = document.querySelector('.lad-nb.jupyter-widgets')
    const parts = [...panel.querySelectorAll('button, svg, td, .widget-html-content')]
    const right = parts.map(e => e.getBoundingClientRect().right).reduce((a, b) => Math.max(a, b))
    return right - panel.getBoundingClientRect().right
}"""


def saved_panel(page, notebook, step, seconds=60):
    """What the notebook's file stores of the panel, once that is of this step, with its picture."""
    end, data = time.time() + seconds, {}
    while f'class="lad-step">{step}<' not in data.get('text/html', '') or 'image/png' not in data:
        assert time.time() < end, f'after {seconds} s: {[*data]}, {data.get("text/plain", "")[:60]}'
        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        page.wait_for_timeout(1000)
        outputs = [o for c in nbformat.read(notebook, as_version=4).cells for o in c.get('outputs', [])]
        found = [o.data for o in outputs if 'lad-saved-' in o.get('data', {}).get('text/html', '')]
        data = found[0] if found else {}
    return data


def shown_without_a_kernel(chromium, notebook):
    """The step that the notebook shows as a page made by nbconvert."""
    command = [sys.executable, '-m', 'nbconvert', '--to', 'html', str(notebook)]
    subprocess.run(command, check=True, timeout=300)
    context = chromium.new_context(offline=True)
    page = context.new_page()
    page.goto(notebook.with_suffix('.html').as_uri())
    saved = page.locator('div[class^="lad-saved-"]')
    assert saved.is_visible() and saved.locator('svg').count() >= 2 and saved.locator('table').count() >= 4
    step, state = saved.locator('.lad-step').inner_text(), saved.locator('.lad-state').inner_text()
    context.close()
    return int(step), state


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
    assert bench.panel.locator('table').count() >= 4
    assert '|' in bench.panel.locator('td.text').first.inner_text()
    picture_of(page, tmp_path, 'light_1280')
    picture_of(bench.panel, tmp_path, 'light_1280_whole')

    assert not page.locator('div[class^="lad-saved-"]').first.is_visible(), 'shown twice'
    at_first = saved_panel(page, lab[0]/'tutorial.ipynb', bench.step())

    bench.press('Run')
    bench.until(lambda: bench.state() == 'working' and bench.step() >= begun + 5)
    page.locator('.jp-Notebook .jp-CodeCell').last.click()  # the kernel answers while the run goes on
    before = bench.step()
    answer = page.evaluate(KERNEL_STATE)
    assert answer == 'idle', f'the kernel is {answer} during a run: it would not answer'
    bench.until(lambda: bench.step() > before)
    bench.press('Pause')
    bench.until(lambda: bench.state() == 'held')
    paused = bench.step()
    page.wait_for_timeout(1500)
    assert bench.step() == paused > begun + 5 and bench.picture() not in seen
    saved = saved_panel(page, lab[0]/'tutorial.ipynb', paused)
    assert '>held<' in saved['text/html'] and f'>{bench.loss():.4g}<' in saved['text/html']
    assert saved['image/png'] != at_first['image/png']
    assert shown_without_a_kernel(chromium, lab[0]/'tutorial.ipynb') == (paused, 'held')

    theme(page, 'Dark')
    assert page.evaluate(BRIGHTNESS, '.lad-nb.jupyter-widgets .lad-step') > 150, 'dark letters on a dark page'
    bench.panel.scroll_into_view_if_needed()
    picture_of(page, tmp_path, 'dark_1280')
    page.set_viewport_size(dict(width=800, height=900))
    page.wait_for_timeout(500)
    bench.panel.scroll_into_view_if_needed()
    too_wide = page.evaluate(STICKS_OUT)
    picture_of(page, tmp_path, 'dark_800')
    picture_of(bench.panel, tmp_path, 'dark_800_whole')
    assert too_wide <= 1, f'the panel sticks out by {too_wide} pixels in a narrow window'

    bench.press('Stop')
    bench.until(lambda: bench.state() == 'stopped')
    assert bench.button('Run').is_disabled() and bench.step() == paused
    bench.press('Resume')
    bench.until(lambda: bench.state() == 'held')
    assert bench.step() == paused and bench.panel.locator('.lad-folder').inner_text().endswith('lad_bert_toy')
    bench.press('Step')
    bench.until(lambda: bench.step() == paused + 1 and bench.state() == 'held')
    bench.press('Score')
    bench.until(lambda: bench.panel.locator('.lad-score').count() == 1)
    theme(page, 'Light')
    bench.panel.scroll_into_view_if_needed()
    picture_of(page, tmp_path, 'light_800')
    assert not ours(said)
    page.close()


def offline(chromium, file, said):
    """A file, opened from disk in a browser that has no network."""
    context = chromium.new_context(offline=True, viewport=dict(width=1100, height=800))
    page = context.new_page()
    page.on('console', lambda m: said.append(m.text))
    page.on('pageerror', lambda e: said.append(str(e)))
    page.on('request', lambda r: said.append(r.url) if r.url != file.as_uri() else None)
    page.goto(file.as_uri())
    return page


def test_a_session_replayed_from_a_file(experiments, lad, chromium, tmp_path):
    """It begins at the end, moves with the slider and with Play, and asks for nothing."""
    said = []
    with Stepper(lad.replace(experiment='session', total_step=6, log_step=1), experiments) as stepper:
        losses = [stepper.step().parts['loss'] for _ in range(3)]
        page = offline(chromium, stepper.save_html(tmp_path/'session.html'), said)
    told = lambda: (int(page.locator('.lad-step').inner_text()), page.locator('.lad-loss').inner_text())
    place, slider = (lambda: page.locator('.lad-at').get_attribute('x1')), page.locator('#lad-slider')
    assert told() == (3, f'{losses[2]:.4g}')
    at_the_end, heat = place(), page.locator('#lad-page-heat').inner_html()
    slider.fill('0')
    assert told() == (1, f'{losses[0]:.4g}') and place() != at_the_end
    assert page.locator('#lad-page-heat').inner_html() != heat
    page.locator('#lad-next').click()
    assert told() == (2, f'{losses[1]:.4g}')
    page.locator('#lad-play').click()
    page.wait_for_function("() => document.querySelector('.lad-step').textContent === '3'")
    assert page.locator('td.text').first.inner_text().count('|') == 1
    picture_of(page, tmp_path, 'replay')
    assert said == []
    page.context.close()


def test_a_sentence_does_not_break_out_of_a_session(chromium, tmp_path):
    bad, said = '</script><script>alert(1)</script><img src=x onerror="alert(2)">', []
    record = example_record()
    records = [SimpleNamespace(**vars(record) | dict(step=i, examples=record.examples.assign(text=bad)))
               for i in (1, 2)]
    history = [(i, *record.parts.values()) for i in (1, 2)]
    (tmp_path/'bad.html').write_text(replay_html(records, history, ['step', *record.parts], bad))
    page = offline(chromium, tmp_path/'bad.html', said)
    page.locator('#lad-slider').fill('0')
    assert page.locator('.lad-step').inner_text() == '1' and page.title() == bad
    assert page.locator('td.text').first.inner_text() == bad and page.locator('img').count() == 0
    assert said == []
    page.context.close()


def write_notebook(file, cells):
    """A notebook of the cells of a Python file."""
    cells = [nbformat.v4.new_code_cell(cell) for cell in cells.read_text().split('# %%\n')]
    kernel = dict(kernelspec=dict(name='python3', display_name='python3'))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), file)


def kernels_in(folder):
    """The /proc folders of the kernels that a JupyterLab started."""
    found = [p for p in Path('/proc').glob('[0-9]*') if (p/'cmdline').exists()]
    found = [p for p in found if b'ipykernel_launcher' in (p/'cmdline').read_bytes()]
    return [p for p in found if str(folder).encode() in (p/'environ').read_bytes()]


def resident(process): # MB
    return int(re.search(r'VmRSS:\s+(\d+)', (process/'status').read_text())[1])/1024


@pytest.mark.slow
def test_five_hundred_steps_through_the_panel(lab, chromium, tmp_path, experiments, lad):
    """Memory stays flat; a step costs a tenth over a free one at most, a live view 2 % of its training."""
    teacher = run_books['rte']['fine_tune'].replace(
        experiment='teacher_small', ptrain_ver=SMALL, lr=5e-5, **FEW)
    run(teacher, experiments, progress=False)  # a step as long as a real one: a tiny model's is too short
    recipe = lad.replace(teacher_exp='teacher_small', total_step=524, warmup_step=20, batch_size=8,
                         ckpt_step=10_000, log_step=50)
    (lab[0]/'steps.json').write_text(json.dumps(dict(recipe=recipe.to_dict(), root=str(experiments))))
    write_notebook(lab[0]/'many.ipynb', ROOT/'tests'/'five_hundred_steps.py')
    said = []
    page = opened(chromium, lab, 'many.ipynb', said)
    text = ' '.join(page.locator('.jp-OutputArea-output').all_inner_texts())
    clock, work, pairs = re.search(r'overhead (\S+) (\S+) (\[.*?\])', text).groups()
    live, drawn = re.search(r'live ([\d.]+) (\d+)', text).groups()
    session = page.context.new_cdp_session(page)
    session.send('Performance.enable')
    kernels = kernels_in(lab[0])

    def memory():
        session.send('HeapProfiler.collectGarbage')
        m = {x['name']: x['value'] for x in session.send('Performance.getMetrics')['metrics']}
        kernel = max((resident(p) for p in kernels if (p/'status').exists()), default=0.)
        return m['JSHeapUsedSize']/2**20, m['Nodes'], kernel

    bench, seen = Bench(page), []
    bench.panel.scroll_into_view_if_needed()
    bench.press('Run')
    for step in (200, 300, 400, 500):
        bench.until(lambda: bench.step() >= step, 300)
        seen.append((bench.step(), *memory()))
    bench.press('Pause')
    bench.until(lambda: bench.state() == 'held')
    print(f'\noverhead {clock} (clock), {work} (work), {pairs}\nlive {live}, drawn {drawn}')
    print(f'step, page MB, page nodes, kernel MB: {seen}')
    assert float(work) < .1
    assert float(live) < .02 and int(drawn) >= 3
    assert seen[-1][1] < seen[0][1] + 5 and seen[-1][2] < seen[0][2] + 500, seen   # page
    assert seen[-1][3] < seen[0][3] + 60, seen                                     # kernel
    assert not ours(said)
    page.close()
