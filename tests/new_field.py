"""What the library makes of one more field of `Recipe`, `pause`, that its copy was given; prints JSON."""
import contextlib
import io
import json

from lad_nb.cli import main, make_parser
from lad_nb.settings import settings_table
from lad_nb.recipes import Recipe, recipe_table

TEACHER = 'run_fine_tune --experiment x --task toy --ptrain_ver all-minilm-l6-v2 --dry_run'


def said(line):
    """Exit code, stdout and stderr of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main(line.split())
    return code, out.getvalue(), err.getvalue()


with_flag = {name: parser for name, parser in make_parser().commands.items() if '--pause' in parser.flags}
print(json.dumps(dict(
    help={name: ' '.join(parser.format_help().split()) for name, parser in with_flag.items()},
    planned=said(f'{TEACHER} --pause 5'),
    refused=said(f'{TEACHER} --pause 0'),
    row=list(settings_table(Recipe(pause=5)).loc['pause']),
    columns=list(recipe_table(dict(one=Recipe(), other=Recipe(pause=5)))))))
