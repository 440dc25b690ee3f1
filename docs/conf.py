"""How Sphinx makes the site; tools/make_site.py writes the pages that it reads, and says where they are."""
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

HERE = Path(__file__).parent
settings = ConfigParser(delimiters=['='])
settings.read(HERE.parent/'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']

project, author, release = settings['lib_name'], settings['author'], settings['version']
copyright = settings['copyright']
extensions = ['myst_nb']
templates_path, html_static_path = [], [str(HERE/'static')]
html_extra_path = [str(HERE.parent/'llms.txt')]

# Notebooks are shown with the outputs that they store. Nothing is run.
nb_execution_mode = 'off'
nb_render_markdown_format = 'myst'
nb_ipywidgets_js = {}            # no page loads scripts from elsewhere
myst_enable_extensions = ['dollarmath', 'fieldlist', 'html_image']
myst_heading_anchors = 4

language, add_module_names, smartquotes_action = 'en', False, 'D'  # dashes, no other quotes than are typed
pygments_dark_style = 'github-dark'
toc_object_entries_show_parents = 'hide'
html_title = project
html_baseurl = f"{settings['doc_host']}{settings['doc_baseurl']}/"
html_theme = 'furo'
html_css_files = ['site.css']
html_copy_source, html_show_sourcelink, html_show_sphinx = False, False, False
html_math_renderer = 'mathml'
html_theme_options = dict(top_of_page_buttons=[], footer_icons=[
    dict(name='The repository', url=settings['git_url'], html='Source', **{'class': ''})])


def formula(node, **how):
    try: return tex2mathml(node.astext(), **how)
    except MathError as e:
        logging.getLogger(__name__).warning('a formula that docutils does not know: %s', e, location=node)
        return ''


def inline(self, node):
    self.body.append(formula(node))
    raise nodes.SkipNode


def display(self, node):
    self.body.append('<div class="formula">' + formula(node, as_block=True) + '</div>')
    raise nodes.SkipNode


def setup(app):
    "Formulas as MathML, which browsers show by themselves: MathJax would come from elsewhere."
    app.add_html_math_renderer('mathml', (inline, None), (display, None))
