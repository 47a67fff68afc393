"""The figures of the house that can be counted from its source: ``python tools/house.py [folder] [--list]``.

``--list`` also says where each thing stands.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_KINDS = re.compile(r"task (==|!=|in) |\bbidirectional\b|\bhead is (not )?None|sequence_classification")
_KNOWS = ("models/", "core/layout", "core/head", "layouts/", "heads/", "assets/")  # may ask which kind it is
_MANY = 6  # positional arguments
Places = list[str]


def figures(source: Path) -> dict[str, tuple[str, Places]]:
    """Each figure by name: what it is, and the places that it counts."""
    files = {path.relative_to(source).as_posix(): path.read_text() for path in sorted(source.rglob("*.py"))}
    files = {name: text for name, text in files.items() if not name.startswith("assets/")}
    trees = {name: ast.parse(text) for name, text in files.items()}
    lines = {name: sum(bool(line.strip()) for line in text.split("\n")) for name, text in files.items()}
    total = sum(lines.values())
    kinds = [name for name, text in files.items() if _KINDS.search(text) and not name.startswith(_KNOWS)]
    ignored = [f"{n}:{i}" for n, text in files.items() for i, line in enumerate(text.split("\n"), 1)
               if "type: ignore" in line]  # fmt: skip
    anything = [f"{n}:{node.lineno}" for n, tree in trees.items() for node in ast.walk(tree)
                if isinstance(node, ast.Name) and node.id == "Any"]  # fmt: skip
    calls = [place for name, tree in trees.items() for place in _long_calls(name, tree)]
    parts = {name: _parts(tree) for name, tree in trees.items()}
    completed = [place for name, tree in trees.items() for place in _completed(name, tree, parts)]
    circles = [" <-> ".join(sorted(circle)) for circle in _circles(_imports(trees))]
    return {
        "source lines": (f"{total:,}", []),
        "lines of core/": (f"{sum(n for name, n in lines.items() if name.startswith('core/')):,}", []),
        "files that ask which kind": (str(len(kinds)), kinds),
        "import circles": (str(len(circles)), circles),
        f"calls with {_MANY} positional arguments or more": (str(len(calls)), calls),
        "objects completed from another file": (str(len(completed)), completed),
        "type: ignore": (f"{len(ignored)} ({1000 * len(ignored) / total:.1f} per 1,000 lines)", ignored),
        "Any": (f"{len(anything)} ({1000 * len(anything) / total:.1f} per 1,000 lines)", anything),
    }


def _long_calls(name: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and sum(not isinstance(one, ast.Starred) for one in node.args) >= _MANY:
            yield f"{name}:{node.lineno}: {ast.unparse(node.func)}"


def _parts(tree: ast.AST) -> set[str]:
    """What the classes of a file say that their objects have."""
    found = set()
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        found |= {
            one.target.id for one in cls.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        }
        found |= {one.attr for one in ast.walk(cls) if _is_set(one) and ast.unparse(one.value) == "self"}  # type: ignore
    return found


def _is_set(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)


def _completed(name: str, tree: ast.AST, parts: dict[str, set[str]]) -> Iterator[str]:
    """Where a part is put into an object whose class another file has, and this one has none with such a part."""
    others = set().union(*(found for other, found in parts.items() if other != name)) - parts[name]
    for node in ast.walk(tree):
        if _is_set(node) and node.attr in others and ast.unparse(node.value).split(".")[0] not in ("self", "cls"):  # type: ignore
            yield f"{name}:{node.lineno}: {ast.unparse(node)}"  # type: ignore[attr-defined]


def _imports(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Which files a file imports, those under TYPE_CHECKING and inside functions too."""
    modules = {"weft." + name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in trees}
    found: dict[str, set[str]] = {name: set() for name in trees}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    wanted = f"{node.module}.{alias.name}"
                    found[name].add(modules.get(wanted) or modules.get(node.module, ""))
            elif isinstance(node, ast.Import):
                found[name] |= {modules.get(alias.name, "") for alias in node.names}
        found[name] -= {"", name}
    return found


def _circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The files that reach each other."""
    reach = {name: set(near) for name, near in graph.items()}
    for middle in graph:
        for near in reach.values():
            if middle in near:
                near |= reach[middle]
    seen: set[str] = set()
    circles = []
    for name in graph:
        if name in reach[name] and name not in seen:
            circle = {other for other in reach[name] if name in reach[other]}
            seen |= circle
            circles.append(circle)
    return circles


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--list"]
    folder = Path(words[0]) if words else Path(__file__).parents[1] / "src" / "weft"
    for figure, (count, places) in figures(folder).items():
        print(f"{figure}: {count}")
        if "--list" in sys.argv:
            print("".join(f"  {place}\n" for place in places), end="")
