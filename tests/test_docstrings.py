"""The docstring of a public function gives the shapes of its tensors, and says that it raises a ``UserError``.

The check reads the source and imports nothing. A function or method is public if its own name, its class and its module
begin with no underscore and it stands in no other function. A method that overrides one of a base class in this package
need not repeat it: its docstring is its own together with those it overrides (bases are found by their class name).
A verb of the command line (``train`` in ``cli/train.py``) need not say it: its docstring is what ``--help`` prints.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "weft"

# ``[N, d]``, ``[..., d]`` or ``[]`` (not an index as in ``x[N]``, nor a type as in ``list[int]``), or a word for it.
SHAPE = re.compile(r"(?<![\w\])])\[(?:[\w+*./ -]+(?:, ?[\w+*./ -]+)*)?\]|\bscalars?\b|\bshapes?\b")
RAISES = re.compile(r"^[ ]*Raises:\n((?:[ ]+\S.*\n?|\s*\n)+)", re.MULTILINE)

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Entry:
    """One public function: its place, and its docstring with those it overrides."""

    place: str
    node: Function
    text: str


@dataclass
class Package:
    """The modules of a package by their path, and all its classes by their name."""

    trees: dict[str, ast.Module]
    classes: dict[str, list[ast.ClassDef]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for tree in self.trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self.classes.setdefault(node.name, []).append(node)

    def above(self, node: ast.ClassDef) -> list[ast.ClassDef]:
        """Every class of the package from which ``node`` is made, near ones first."""
        found: list[ast.ClassDef] = []
        waiting = [node]
        while waiting:
            for base in waiting.pop(0).bases:
                new = [n for n in self.classes.get(last_name(base), []) if n is not node and n not in found]
                found += new
                waiting += new
        return found

    def kinds(self, root: str) -> set[str]:
        """``root`` and the names of all classes made from it."""
        made = {n.name for nodes in self.classes.values() for n in nodes if root in {c.name for c in self.above(n)}}
        return {root} | made

    def entries(self) -> Iterator[Entry]:
        """Every public function."""
        for path, tree in self.trees.items():
            if not any(part.startswith("_") and part != "__init__.py" for part in Path(path).parts):
                yield from self._of(path, tree.body, None)

    def _of(self, path: str, body: list[ast.stmt], owner: ast.ClassDef | None) -> Iterator[Entry]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from self._of(path, node.body, node)
            elif isinstance(node, FUNCTIONS) and not node.name.startswith("_"):
                above = [f for base in (self.above(owner) if owner else []) for f in base.body]
                overridden = [f for f in above if isinstance(f, FUNCTIONS) and f.name == node.name]
                name = f"{owner.name}.{node.name}" if owner else node.name
                text = "\n".join(ast.get_docstring(f) or "" for f in [node, *overridden])
                yield Entry(f"{path}:{node.lineno}: {name}", node, text + "\n")
            elif isinstance(node, ast.If):  # if TYPE_CHECKING, if sys.platform
                yield from self._of(path, [*node.body, *node.orelse], owner)


def last_name(node: ast.expr) -> str:
    """``torch.Tensor`` -> ``Tensor``; ``Generic[T]`` -> ``Generic``."""
    if isinstance(node, ast.Subscript):
        return last_name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def names_tensor(annotation: ast.expr | None) -> bool:
    """Whether ``Tensor`` stands anywhere in an annotation, in quotes or not."""
    for node in ast.walk(annotation) if annotation else ():
        quoted = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if (quoted and re.search(r"\bTensor\b", node.value)) or last_name(node) == "Tensor":
            return True
    return False


def has_tensor(node: Function) -> bool:
    """Whether a function takes or gives a tensor."""
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    return any(names_tensor(a.annotation) for a in given if a) or names_tensor(node.returns)


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a function, without those of functions and classes inside it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            yield child
            yield from own_nodes(child)


def raised(node: Function, kinds: set[str]) -> set[str]:
    """Those of ``kinds`` that the function itself raises."""
    given = [n.exc for n in own_nodes(node) if isinstance(n, ast.Raise) and n.exc is not None]
    return {last_name(exc.func if isinstance(exc, ast.Call) else exc) for exc in given} & kinds


def without_shape(package: Package) -> list[str]:
    return [e.place for e in package.entries() if has_tensor(e.node) and not SHAPE.search(e.text)]


def without_raises(package: Package) -> list[str]:
    kinds = package.kinds("UserError")
    said = re.compile(rf"\b(?:{'|'.join(kinds)})\b")
    return [
        f"{entry.place} raises {', '.join(sorted(names))}"
        for entry in package.entries()
        if (names := raised(entry.node, kinds)) and not said.search("".join(RAISES.findall(entry.text)))
        if not entry.place.startswith(f"cli/{entry.node.name}.py:")
    ]


@pytest.fixture(scope="module")
def weft() -> Package:
    return Package({str(p.relative_to(SOURCE)): ast.parse(p.read_text()) for p in sorted(SOURCE.rglob("*.py"))})


def test_tensors_have_shapes(weft: Package) -> None:
    assert without_shape(weft) == []


def test_user_errors_are_said(weft: Package) -> None:
    assert without_raises(weft) == []


SAMPLE = '''
class UserError(ValueError): ...
class TooLongError(UserError): ...
class Base:
    def apply(self, x: Tensor) -> None:
        """Of x [N, d]."""
    def read(self) -> None:
        """Read.

        Raises:
            UserError: It cannot.
        """
class Inherits(Base):
    def apply(self, x: Tensor) -> None:
        """Of x."""
    def read(self) -> None:
        raise TooLongError("said by the base")
def bare(x: torch.Tensor) -> None:
    """Index x[0] of a list[int]."""
def quoted() -> dict[str, "Tensor | None"]: ...
def scalar() -> Tensor:
    """A scalar."""
def _private(x: Tensor) -> None: ...
def silent() -> None:
    """May raise UserError, in no section."""
    raise TooLongError("no section")
def other() -> None:
    """Reads.

    Raises:
        ValueError: It cannot.

    UserError is something else.
    """
    raise UserError
def inner() -> None:
    def inside() -> None:
        raise UserError("not the outer function's")
'''


def test_what_the_check_finds() -> None:
    verb = "def run() -> None:\n    raise UserError\ndef other() -> None:\n    raise UserError"
    package = Package(
        {"a.py": ast.parse(SAMPLE), "_b.py": ast.parse("def hidden(x: Tensor): ..."), "cli/run.py": ast.parse(verb)}
    )
    assert [place.split()[-1] for place in without_shape(package)] == ["bare", "quoted"]
    assert [place.split()[1] for place in without_raises(package)] == ["silent", "other", "other"]
