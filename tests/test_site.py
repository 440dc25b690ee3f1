"""The site: a quick form of it is built and its links are followed; with --slow all of it."""
import json
import re
from html import unescape

import pytest
from api_pages import PACKAGE, Module, api_page
from conftest import ROOT
from make_site import build, follow_links, modules, notebooks

FEW = ['index', '20_gates', '45_recipes', 'your_first_distillation', 'results']


def needs_sphinx():
    for name in ('sphinx', 'myst_nb', 'furo'):
        pytest.importorskip(name, reason=f"no {name}: pip install -c constraints.txt -e '.[docs]'")


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """A few notebooks as a site, and what Sphinx warned of."""
    needs_sphinx()
    out = tmp_path_factory.mktemp('site').resolve()/'_docs'
    pages, warnings = build(out, FEW)
    return out, warnings


def outputs(name):
    """The outputs that a notebook stores, by their kind."""
    cells = json.loads((ROOT/'nbs'/f'{name}.ipynb').read_text())['cells']
    found = [o for c in cells for o in c.get('outputs', []) if not ''.join(c['source']).startswith('#| hide')]
    return [kind for o in found for kind in ('image/png', 'text/html') if kind in o.get('data', {})]


def test_sphinx_warns_of_nothing_and_links_lead_somewhere(site):
    out, warnings = site
    followed, lost = follow_links(out)
    assert not warnings and not lost and followed > 500


def test_pages_show_what_notebooks_store(site):
    page = (site[0]/'tutorials'/'your_first_distillation.html').read_text()
    stored = outputs('tutorials/your_first_distillation')
    pictures = [tag for tag in re.findall('<img [^>]*>', page) if 'badge' not in tag]
    shown = {'image/png': len(pictures), 'text/html': len(re.findall('class="[^"]*text_html', page))}
    assert len(stored) > 4 and shown == {kind: stored.count(kind) for kind in shown}


def test_hidden_cells_and_directives_stay_away(site):
    page = unescape(re.sub('<[^>]+>', '', (site[0]/'20_gates.html').read_text()))
    assert "find_gate('tempered')(H, norm='token')" in page                  # as it is shown,
    assert '#| ' not in page and "GateBlock(8, norm='batch')" not in page    # and as it would be


def test_names_have_shapes_and_lead_to_their_cells(site):
    page = (site[0]/'api'/'gates.html').read_text()
    assert 'id="lad_nb.gates.GateBlock.forward"' in page and '(B, S, H) layer k' in page
    cell = Module(PACKAGE/'gates.py').cells[-1][1]
    assert f'href="../20_gates.html#cell-{cell}"' in page
    notebook = (site[0]/'20_gates.html').read_text()
    assert 'href="api/gates.html#lad_nb.gates.GateBlock"' in notebook and f'id="cell-{cell}"' in notebook


def test_no_page_loads_scripts_or_styles_from_elsewhere(site):
    asked = [found for page in site[0].rglob('*.html')
             for found in re.findall(r'<(?:script|link)[^>]*>', page.read_text()) if 'canonical' not in found]
    assert len(asked) > 50 and not [found for found in asked if re.search('(src|href)="(https?:)?//', found)]


def test_a_dead_link_is_found(tmp_path):
    links = '<a href="b.html#there">1</a> <a href="b.html#gone">2</a> <img src="no.png">'
    (tmp_path/'a.html').write_text(links)
    links = '<p id="there"><a href="../outside.html">3</a> <a href="https://x.org">4</a>'
    (tmp_path/'b.html').write_text(links)
    assert follow_links(tmp_path) == (4, ['a.html: b.html#gone', 'a.html: no.png', 'b.html: ../outside.html'])


def test_every_public_name_has_its_place():
    """In each module's page; read from the source alone, so it needs no Sphinx."""
    named, count = modules(notebooks()), 0
    assert {p.stem for p in PACKAGE.glob('*.py')} - {'__init__', '_modidx'} == set(named)
    for module, path in named.items():
        page, public = api_page(PACKAGE/f'{module}.py', path), Module(PACKAGE/f'{module}.py').public
        assert public == re.findall(r'^`{4,5}\{py:(?:function|class|data)\} (\w+)', page, re.M), module
        count += len(public)
    assert count > 400


def test_a_setting_says_its_default_and_help():
    page = api_page(PACKAGE/'recipes.py', '45_recipes.ipynb')
    said = r"teacher's checkpoint; its last by default, or the best of a teacher with keep\_best"
    assert f':param tckpt: {said}\n:type tckpt: int | None' in page
    assert "method='lad'" in page


@pytest.mark.slow
def test_all_of_it(tmp_path):
    needs_sphinx()
    out = tmp_path.resolve()/'_docs'
    pages, warnings = build(out)
    followed, lost = follow_links(out)
    assert not warnings and not lost and followed > 20_000
    assert pages >= len(notebooks()) + len(modules(notebooks()))
