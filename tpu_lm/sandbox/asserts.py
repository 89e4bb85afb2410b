"""Reads a text of asserts: steps for the sandbox, checks for the parent.

The asserts stand alone, in functions without arguments that the text calls, or
in `check(candidate)`. An assertion is taken apart. What depends on the answer
(a call of its function, a name that was bound to the value of one, an
attribute or an item of it) is a leaf, and is sent; the rest, constants,
comparisons and the functions of `_WRAPPERS`, is evaluated here, over the
leaves' values. Names bound to constants stay here; other statements (a class
of nodes, a graph of them, a loop that walks a list) make or read inputs, and
are sent, without anything that compares.

Whatever else there is, is refused: a comparison made inside would be the
answer's own.
"""

import ast
import builtins
import copy
import functools
import math
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tpu_lm.errors import UserError
from tpu_lm.sandbox import values

_MOST_UNROLLED = 10_000  # assertions of one record


class Check(NamedTuple):
  """One test: whether the values of its steps are what they have to be."""

  places: tuple[int, ...]  # of the steps that it reads
  holds: Callable[[Sequence[Any]], Any]  # of their values; may raise
  note: str  # what is tested, in a line


_WRAPPERS: dict[str, Callable] = {
  **{
    name: getattr(builtins, name)
    for name in (
      *('abs', 'all', 'any', 'bool', 'dict', 'divmod', 'enumerate', 'float'),
      *('frozenset', 'int', 'isinstance', 'len', 'list', 'max', 'min', 'repr'),
      *('reversed', 'round', 'set', 'sorted', 'str', 'sum', 'tuple', 'zip'),
      *('bytes', 'complex', 'range'),
    )
  },
  'math.isclose': math.isclose,
  'isclose': math.isclose,
  'math.isnan': math.isnan,
  'math.isinf': math.isinf,
  'math.sqrt': math.sqrt,
}
_NAMES = {
  'math.pi': math.pi,
  'math.e': math.e,
  'math.inf': math.inf,
  'math.nan': math.nan,
  **{
    kind.__name__: kind
    for kind in (bool, int, float, str, list, tuple, set, frozenset, dict)
  },
}


def _is(a: Any, b: Any) -> bool:
  """`is`, for None, bools and objects; else equality, as nothing is shared."""
  return type(a) is type(b) and values.same(a, b)


_COMPARE = {
  ast.Lt: operator.lt,
  ast.LtE: operator.le,
  ast.Gt: operator.gt,
  ast.GtE: operator.ge,
  ast.Is: _is,
  ast.IsNot: lambda a, b: not _is(a, b),
}
_ARITHMETIC = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv,
  ast.Mod: operator.mod,
  ast.Pow: operator.pow,
}
_UNARY = {
  ast.Not: operator.not_,
  ast.USub: operator.neg,
  ast.UAdd: operator.pos,
}
Thunk = Callable[[Sequence[Any]], Any]


def _dotted(node: ast.AST) -> str:
  """`a.b` as text; empty for what is no dotted name."""
  if isinstance(node, ast.Name):
    return node.id
  if isinstance(node, ast.Attribute) and _dotted(node.value):
    return f'{_dotted(node.value)}.{node.attr}'
  return ''


class Reading:
  """Reads one text of asserts."""

  def __init__(self, name: str, entry: str | None, text: str, strict: bool):
    self.name, self.entry = name, entry
    self.same = functools.partial(values.same, strict=strict)
    self.steps: list[dict] = []
    self.checks: list[Check] = []
    self.functions: dict[str, ast.FunctionDef] = {}
    self.bound: set[str] = set()  # names that the sandbox knows of the test
    self.absent: set[str] = set()  # modules that are not inside
    self.computed: set[str] = set()  # of these, by functions of others
    self.inside: list[str] = []  # functions that are being unrolled
    self.scopes = [0]  # a fresh one for every function that is unrolled
    self.num_scopes = 1
    try:
      self.body = ast.parse(text).body
    except SyntaxError as error:
      raise UserError(
        f'record {name}, test line {error.lineno}: no Python: {error.msg}'
      ) from error

  def tests(self) -> tuple[list[dict], list[Check]]:
    """The steps and the checks, in order."""
    known: dict[str, ast.expr] = {}
    self.statements(self.body, known)
    check = self.functions.get('check')
    if check is not None and not self.checks:
      self.call_check(check, known)
    if not self.checks:
      raise UserError(f'record {self.name}: its test asserts nothing')
    return self.steps, self.checks

  def refuse(self, node: ast.AST, what: str) -> UserError:
    return UserError(
      f'record {self.name}, test line {node.lineno}: {what} cannot be read; '
      'write it as assert f(x) == y'
    )

  def call_check(self, check: ast.FunctionDef, known: dict) -> None:
    """`check(candidate)`: its argument is the answer's function."""
    if len(check.args.args) != 1 or not self.entry:
      raise self.refuse(check, 'check without one argument or an entry_point')
    # A function that is itself named check is the answer's, from here on.
    del self.functions['check']
    itself = ast.Name(self.entry, ast.Load())
    known = known | {check.args.args[0].arg: itself}
    self.scoped('check', check.body, known)

  def scoped(self, name: str, body: list[ast.stmt], known: dict) -> None:
    """The body of a function, its names apart from those of others."""
    self.inside.append(name)
    self.scopes.append(self.num_scopes)
    self.num_scopes += 1
    outer = set(self.bound)
    self.statements(body, dict(known))
    self.bound = outer
    self.scopes.pop()
    self.inside.pop()

  def step(self, kind: str, node: ast.AST) -> None:
    """Adds what the sandbox does in the scope that is read."""
    for x in ast.walk(node):
      if isinstance(x, ast.Name) and x.id in self.absent:
        raise self.refuse(x, f'{x.id}, which is not of the standard library,')
    scope = {'scope': self.scopes[-1], 'under': self.scopes[-2:][0]}
    self.steps.append({kind: ast.unparse(node), **scope})

  def statements(self, body: list[ast.stmt], known: dict) -> None:
    for node in body:
      self.statement(node, known)
      if len(self.checks) > _MOST_UNROLLED:
        raise self.refuse(node, f'more than {_MOST_UNROLLED} assertions')

  def statement(self, node: ast.stmt, known: dict) -> None:
    """Sends it inside, keeps it here, or unrolls it."""
    match node:
      case ast.Assert():
        self.assertion(node, known)
      case ast.FunctionDef():
        self.functions[node.name] = node
      case ast.Expr() if self.unrolled(node, known):
        pass
      case ast.Assign() if self.constant(node, known):
        pass
      case ast.For() if any(isinstance(x, ast.Assert) for x in ast.walk(node)):
        self.loop(node, known)
      case (
        ast.ClassDef()
        | ast.Assign()
        | ast.AugAssign()
        | ast.Expr()
        | ast.While()
        | ast.For()
      ):
        self.send(node, known)
      case ast.Import() | ast.ImportFrom():
        self.imports(node, known)
      case ast.Pass():
        pass
      case _:
        raise self.refuse(node, type(node).__name__)

  def unrolled(self, node: ast.Expr, known: dict) -> bool:
    """A docstring; or a call of a function of the test, which is read here."""
    if isinstance(node.value, ast.Constant):
      return True
    call = node.value
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
      return False
    function = self.functions.get(call.func.id)
    if function is None:
      return False
    if call.func.id == 'check' and len(call.args) == 1:
      self.call_check(function, known)
      return True
    arguments = function.args
    if call.args or call.keywords or arguments.args or arguments.vararg:
      raise self.refuse(node, 'a call of a function of the test')
    if function.name in self.inside:
      raise self.refuse(node, 'recursion')
    self.scoped(function.name, function.body, known)
    return True

  def constant(self, node: ast.Assign, known: dict) -> bool:
    """Binds a name to a constant, here; False if it has to be sent."""
    target = node.targets[0]
    if len(node.targets) != 1 or not isinstance(target, ast.Name):
      return False
    value = _substituted(node.value, known)
    if not self.is_constant(value):
      known.pop(target.id, None)
      return False
    self.bound.discard(target.id)
    known[target.id] = value
    return True

  def loop(self, node: ast.For, known: dict) -> None:
    """A loop with assertions, over constants that are written out."""
    items = _substituted(node.iter, known)
    if not isinstance(items, ast.List | ast.Tuple) or node.orelse:
      raise self.refuse(node, 'a loop over what is not written out')
    for item in items.elts:
      names, parts = [node.target], [item]
      if isinstance(node.target, ast.Tuple):
        if not isinstance(item, ast.List | ast.Tuple):
          raise self.refuse(node, 'a loop over what is not written out')
        names, parts = node.target.elts, item.elts
      if len(names) != len(parts) or not all(
        isinstance(name, ast.Name) for name in names
      ):
        raise self.refuse(node, 'the target of the loop')
      inner = {n.id: p for n, p in zip(names, parts, strict=True)}
      self.statements(node.body, known | inner)

  def send(self, node: ast.stmt, known: dict) -> None:
    """A statement that makes or reads inputs, executed inside.

    The constants that it reads go with it; none that it does not.
    """
    self.check_sent(node)
    names = [x for x in ast.walk(node) if isinstance(x, ast.Name)]
    stored = {x.id for x in names if isinstance(x.ctx, ast.Store)}
    if isinstance(node, ast.ClassDef):
      stored.add(node.name)
    for name in sorted({x.id for x in names} & known.keys()):
      if isinstance(known[name], ast.List | ast.Dict | ast.Set | ast.Call):
        # From here on it lives inside, where it may be changed.
        value = ast.Assign([ast.Name(name, ast.Store())], known[name], lineno=0)
        self.step('do', value)
        del known[name]
        self.bound.add(name)
    self.bound |= stored
    value = getattr(node, 'value', None)
    foreign = isinstance(value, ast.Call) and self.root(value) != self.entry
    self.computed = self.computed - stored | (stored if foreign else set())
    self.step('do', _substituted(node, known))

  def imports(self, node: ast.Import | ast.ImportFrom, known: dict) -> None:
    """Sends it, if it is of the standard library; no other is inside."""
    names = {(x.asname or x.name).split('.')[0] for x in node.names}
    modules = [x.name for x in node.names]
    if isinstance(node, ast.ImportFrom):
      modules = [node.module or '']
    if all(x.split('.')[0] in sys.stdlib_module_names for x in modules):
      self.step('do', node)
    else:  # of the answer's own file, or never used, it does no harm
      self.absent |= names - {self.entry}

  def check_sent(self, node: ast.stmt) -> None:
    """Refuses what would compare inside, or hides what it does."""
    refused = ast.Assert, ast.FunctionDef, ast.Lambda, ast.Compare, ast.BoolOp
    if isinstance(node, ast.ClassDef):
      refused = (ast.Assert,)
    elif isinstance(node, ast.While | ast.For):
      refused = ast.Assert, ast.FunctionDef, ast.Lambda
    for x in ast.walk(node):
      if isinstance(x, refused):
        raise self.refuse(node, f'{type(x).__name__} in it')
      if isinstance(x, ast.Name) and x.id in self.functions:
        raise self.refuse(node, f'a use of the function {x.id} of the test')

  def root(self, node: ast.expr) -> str:
    """The name on which calls, attributes and items stand; '' without one."""
    while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
      node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ''

  def is_constant(self, node: ast.expr) -> bool:
    """Whether it is computed here, from what is written in the test."""
    if isinstance(node, ast.Constant):
      return True
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
      return all(self.is_constant(x) for x in node.elts)
    if isinstance(node, ast.Dict):
      parts = [*node.keys, *node.values]
      return all(x is not None and self.is_constant(x) for x in parts)
    if isinstance(node, ast.UnaryOp):
      return type(node.op) in _UNARY and self.is_constant(node.operand)
    if isinstance(node, ast.BinOp):
      parts = (node.left, node.right)
      return type(node.op) in _ARITHMETIC and all(map(self.is_constant, parts))
    if isinstance(node, ast.Call):
      parts = [*node.args, *(keyword.value for keyword in node.keywords)]
      named = _dotted(node.func)
      return self.ours(named) and all(map(self.is_constant, parts))
    return _dotted(node) in _NAMES and _dotted(node) not in self.bound

  def ours(self, name: str) -> bool:
    """Whether this is a function that is called here."""
    hidden = name in self.bound or name == self.entry
    return name in _WRAPPERS and not hidden

  def assertion(self, node: ast.Assert, known: dict) -> None:
    """One check: its leaves become steps."""
    test = _substituted(node.test, known)
    places: list[int] = []
    self.check_truth(node, test)
    holds = self.thunk(test, places)
    if not places:
      raise self.refuse(node, 'an assertion without the answer')
    note = f'line {node.lineno}: {ast.unparse(test)}'[:120]
    self.checks.append(Check(tuple(places), holds, note))

  def check_truth(self, node: ast.Assert, test: ast.expr) -> None:
    """Refuses the verdict of anything but the answer's function itself."""
    while isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
      test = test.operand
    if isinstance(test, ast.BoolOp):
      for part in test.values:
        self.check_truth(node, part)
    method = isinstance(test, ast.Call) and isinstance(test.func, ast.Attribute)
    if method and test.args and not self.ours(_dotted(test.func)):
      raise self.refuse(node, 'the truth of a method')
    if isinstance(test, ast.Name) and test.id in self.computed:
      raise self.refuse(node, f'the truth of {test.id}, computed by others')

  def leaf(self, node: ast.expr, places: list[int]) -> Thunk:
    """A value of the answer's, as the sandbox tells it."""
    root = self.root(node)
    known = self.bound | ({self.entry} if self.entry else {root})
    if not root or root not in known:
      raise self.refuse(node, f'{ast.unparse(node)[:40]}, which is not `f(x)`,')
    for x in ast.walk(node):
      if isinstance(x, ast.Name) and x.id in self.functions:
        raise self.refuse(node, f'a use of the function {x.id} of the test')
      if isinstance(x, ast.Attribute) and x.attr.startswith('__'):
        raise self.refuse(node, f'a use of {x.attr}')
    self.step('give', node)
    places.append(len(self.steps) - 1)
    place = len(places) - 1
    return lambda found: found[place]

  def thunk(self, node: ast.expr, places: list[int]) -> Thunk:
    """The expression as a function of the leaves' values."""
    parts = lambda nodes: [self.thunk(x, places) for x in nodes]  # noqa: E731
    if isinstance(node, ast.Constant):
      return lambda found: node.value
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
      kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
      items = parts(node.elts)
      return lambda found: kind(x(found) for x in items)
    if isinstance(node, ast.Dict) and None not in node.keys:
      keys, held = parts(node.keys), parts(node.values)
      pairs = list(zip(keys, held, strict=True))
      return lambda found: {k(found): v(found) for k, v in pairs}
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
      act, (inner,) = _UNARY[type(node.op)], parts([node.operand])
      return lambda found: act(inner(found))
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
      return self.arithmetic(node, parts([node.left, node.right]))
    if isinstance(node, ast.BoolOp):
      every = all if isinstance(node.op, ast.And) else any
      items = parts(node.values)
      return lambda found: every(x(found) for x in items)
    if isinstance(node, ast.Compare):
      return self.comparison(node, parts([node.left, *node.comparators]))
    if isinstance(node, ast.Call) and self.ours(_dotted(node.func)):
      return self.wrapper(node, parts)
    if self.is_constant(node):
      return lambda found: _NAMES[_dotted(node)]
    if isinstance(node, ast.Call | ast.Name | ast.Attribute | ast.Subscript):
      return self.leaf(node, places)
    raise self.refuse(node, type(node).__name__)

  def arithmetic(self, node: ast.BinOp, sides: list[Thunk]) -> Thunk:
    """Of the answer's values numbers only, or +: lists soon get too long."""
    act, (left, right) = _ARITHMETIC[type(node.op)], sides
    if self.is_constant(node):
      return lambda found: act(left(found), right(found))
    kinds = (bool, int, float, complex)

    def compute(found):
      a, b = left(found), right(found)
      numbers = type(a) in kinds and type(b) in kinds
      if not numbers and not isinstance(node.op, ast.Add):
        raise TypeError('no numbers')
      if isinstance(node.op, ast.Pow) and not max(abs(a), abs(b)) < 1e4:
        raise OverflowError('too large a power')
      return act(a, b)

    return compute

  def comparison(self, node: ast.Compare, sides: list[Thunk]) -> Thunk:
    """a < b == c …, each of neighbours."""
    nodes = [node.left, *node.comparators]
    pairs = []
    for place, op in enumerate(node.ops):
      if isinstance(op, ast.Eq):
        left = self.is_constant(nodes[place])
        # The side that is written out is the expected one.
        act = self.same if left else lambda a, b: self.same(b, a)
      elif isinstance(op, ast.NotEq):
        act = lambda a, b: not self.same(a, b)  # noqa: E731
      elif isinstance(op, ast.In):
        act = self.within
      elif isinstance(op, ast.NotIn):
        act = lambda a, b: not self.within(a, b)  # noqa: E731
      else:
        act = _COMPARE[type(op)]
      pairs.append((act, sides[place], sides[place + 1]))
    return lambda found: all(act(a(found), b(found)) for act, a, b in pairs)

  def within(self, a: Any, b: Any) -> bool:
    """`a in b`; of text and bytes, a part."""
    if type(b) in (str, bytes) and type(a) is type(b):
      return a in b
    return any(self.same(x, a) for x in b)

  def wrapper(self, node: ast.Call, parts: Callable) -> Thunk:
    """A function of `_WRAPPERS`, called here."""
    if any(isinstance(x, ast.Starred) for x in node.args) or any(
      keyword.arg is None for keyword in node.keywords
    ):
      raise self.refuse(node, 'a starred argument')
    if _dotted(node.func) in ('range', 'bytes') and not self.is_constant(node):
      raise self.refuse(node, "a size that is the answer's")
    act, args = _WRAPPERS[_dotted(node.func)], parts(node.args)
    names = [keyword.arg for keyword in node.keywords]
    held = parts([keyword.value for keyword in node.keywords])
    named = list(zip(names, held, strict=True))
    return lambda found: act(
      *(x(found) for x in args), **{name: x(found) for name, x in named}
    )


class _Substitution(ast.NodeTransformer):
  def __init__(self, known: dict):
    self.known = known

  def visit_Name(self, node: ast.Name) -> ast.expr:
    if isinstance(node.ctx, ast.Load) and node.id in self.known:
      return ast.copy_location(copy.deepcopy(self.known[node.id]), node)
    return node


def _substituted(node: Any, known: dict) -> Any:
  """A copy in which names that stand for constants are these constants."""
  if not known:
    return node
  return _Substitution(known).visit(copy.deepcopy(node))
