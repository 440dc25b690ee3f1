"""A page for each module of `lad_nb`: its public names, with what their comments and docstrings say.

The source is read and nothing is imported, so a site can be built where there is no torch.
"""
import ast
import io
import json
import re
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[1]/'lad_nb'


def comments(source):
    "{line: what the comment on it says}"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: re.sub(r'^#\s*|\s*# noqa.*', '', t.string)
            for t in tokens if t.type == tokenize.COMMENT}


def cell_ids(source):
    "[(line, id of the notebook cell that begins there)]"
    marks = re.finditer(r'^# %% \S+ #(\w+)$', source, re.M)
    return [(source.count('\n', 0, m.start()) + 1, m[1]) for m in marks]


class Module:
    "What a module of the library says of itself."

    def __init__(self, path):
        self.name, source = path.stem, path.read_text(encoding='utf-8')
        self.tree, self.said, self.cells = ast.parse(source), comments(source), cell_ids(source)
        self.about, self.defined = ast.get_docstring(self.tree), {}
        for node in self.tree.body:
            for name in names_of(node): self.defined.setdefault(name, node)
        self.public = ast.literal_eval(self.defined['__all__'].value)

    def cell_of(self, node):
        "The notebook cell that a definition stands in."
        return [cell for line, cell in self.cells if line <= node.lineno][-1]

    def comment(self, node):
        "The comment at the end of a parameter's, a field's or a value's first or last line."
        return self.said.get(node.end_lineno) or self.said.get(node.lineno) or ''


def names_of(node):
    "The names that a statement of a module defines."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)): return [node.name]
    targets = getattr(node, 'targets', [getattr(node, 'target', None)])
    parts = [part for target in targets if target for part in ast.walk(target)]
    return [part.id for part in parts if isinstance(part, ast.Name)]


def text(node):
    "A type or a default, as it is written; quotes around a type are left out."
    if isinstance(node, ast.Constant) and isinstance(node.value, str): return node.value
    return ast.unparse(node)


def prose(line):
    "A comment or docstring as Markdown: what is not in backticks is meant as it stands."
    parts = re.split(r'(`[^`]*`)', line or '')
    return ''.join(p if p[:1] == '`' else re.sub(r'([\\*_<>\[\]{}|$])', r'\\\1', p) for p in parts)


def parameters(node, module):
    "[(name as in a signature, name, type, default, comment)] of a function."
    a = node.args
    plain = a.posonlyargs + a.args
    filled = [None]*(len(plain) - len(a.defaults)) + a.defaults
    found = [('', arg, default) for arg, default in zip(plain, filled)]
    if a.vararg: found.append(('*', a.vararg, None))
    found += [('', arg, default) for arg, default in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: found.append(('**', a.kwarg, None))
    rows = [row for row in found if row[1].arg not in ('self', 'cls')]
    lines = [arg.end_lineno for _, arg, _ in rows]
    def comment(arg, default):
        if lines.count(arg.end_lineno) > 1: return ''  # behind two parameters: of neither
        return module.comment(arg) or (module.comment(default) if default else '')
    return [(stars + arg.arg, arg.annotation, default, comment(arg, default)) for stars, arg, default in rows]


def signature(node, rows):
    "Names and defaults, with a bare star before what goes by name alone."
    shown = [name + (f'={ast.unparse(default)}' if default is not None else '')
             for name, _, default, _ in rows]
    if node.args.kwonlyargs and not node.args.vararg:
        first = node.args.kwonlyargs[0].arg
        shown.insert([name for name, *_ in rows].index(first), '*')
    return f"({', '.join(shown)})"


def field_lines(rows):
    "Parameters as a field list: type and comment."
    for name, kind, _, comment in rows:
        if kind is None and not comment: continue
        name = name.replace('*', r'\*')
        yield f':param {name}: {prose(comment)}'.rstrip()
        if kind is not None: yield f':type {name}: {text(kind)}'


def returned(node, module):
    "What a function gives back, as a field list; the comment stands behind the arrow's type."
    if node.returns is None or text(node.returns) == 'None': return
    taken = [arg.end_lineno for arg in [*node.args.args, *node.args.kwonlyargs]]
    own = node.lineno != node.returns.lineno and node.returns.end_lineno not in taken
    comment = module.comment(node.returns) if own else ''
    yield f':returns: *{prose(text(node.returns))}*' + (f' – {prose(comment)}' if comment else '')


def decorated(node):
    return {ast.unparse(d).split('(')[0].split('.')[-1] for d in node.decorator_list}


def block(kind, head, body, ticks, options=()):
    "A directive with what it holds."
    fence = '`'*ticks
    return [f'{fence}{{py:{kind}}} {head}', *options, '', *body, fence, '']


def function_lines(node, module, kind='function', link=()):
    "A function or method."
    rows = parameters(node, module)
    body = [prose(ast.get_docstring(node)), '', *field_lines(rows), *returned(node, module), '', *link]
    if 'property' in decorated(node):
        options = [f':type: {text(node.returns)}'] if node.returns else []
        return block('property', node.name, [prose(ast.get_docstring(node)), ''], 4, options)
    options = [f':{d}:' for d in ('classmethod', 'staticmethod') if d in decorated(node)]
    return block(kind, node.name + signature(node, rows), body, 4, options)


def bases(node, module):
    "A class and its private parents in the same module, the farthest first."
    for base in reversed(node.bases):
        parent = module.defined.get(ast.unparse(base))
        if isinstance(parent, ast.ClassDef) and parent.name.startswith('_'): yield from bases(parent, module)
    yield node


def fields(node, module):
    "[(name, type, default, comment)] of a dataclass; a setting's help is its comment."
    found = {}
    for part in bases(node, module):
        for line in part.body:
            if not isinstance(line, ast.AnnAssign) or line.target.id.startswith('_'): continue
            default, comment, value = line.value, module.comment(line), line.value
            if isinstance(value, ast.Call) and ast.unparse(value.func).endswith('setting'):
                default, comment = value.args[0], text(value.args[1])
            elif isinstance(value, ast.Call) and ast.unparse(value.func) == 'field':
                default = next((as_default(k) for k in value.keywords if k.arg.startswith('default')), None)
            found[line.target.id] = (line.target.id, line.annotation, default, comment)
    return list(found.values())


def as_default(keyword):
    "What `field(default=...)` or `field(default_factory=...)` gives."
    if keyword.arg == 'default': return keyword.value
    return ast.Call(func=keyword.value, args=[], keywords=[])


def class_lines(node, module, link):
    "A class: how it is made, its fields, its public methods."
    methods = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
    head, rows = node.name, []
    if '__init__' in methods:
        rows = parameters(methods['__init__'], module)
        head += signature(methods['__init__'], rows)
    elif 'dataclass' in decorated(node):
        rows = fields(node, module)
        shown = [name + (f'={ast.unparse(d)}' if d is not None else '') for name, _, d, _ in rows]
        head += f"({', '.join(shown)})"
    body = [prose(ast.get_docstring(node)), '', *field_lines(rows), '', *link, '']
    for name, method in methods.items():
        if not name.startswith('_'): body += function_lines(method, module, 'method')
    return block('class', head, body, 5)


def value_lines(name, node, module, link):
    "A table, a constant or a name for a type."
    said = [prose(module.comment(node)), ''] if module.comment(node) else []
    value = ast.unparse(node.value)
    short = len(value) < 160 and names_of(node) == [name]
    return block('data', name, [*said, *link], 4, [f':value: {json.dumps(value)}'] if short else [])


def api_page(path, notebook):
    "A module's page as Markdown: links lead to the cells of its notebook that define the names."
    module = Module(path)
    from_ = f'The notebook that it is made from, with reasons and examples: [{module.name}](../{notebook}).'
    lines = [f'# lad_nb.{module.name}', '', f'{module.about} {from_}', '',
             f'```{{py:module}} lad_nb.{module.name}', '```', '']
    for name in module.public:
        node = module.defined[name]
        link = [f'[Why, and its code](../{notebook}#cell-{module.cell_of(node)})']
        if isinstance(node, ast.FunctionDef): lines += function_lines(node, module, link=link)
        elif isinstance(node, ast.ClassDef): lines += class_lines(node, module, link)
        else: lines += value_lines(name, node, module, link)
    return '\n'.join(lines)
