"""Prints size and structure of the package: code lines per folder, function lengths, import cycles.

    python tools/code_counts.py

Code lines are lines with a token other than a comment or docstring. Imports in functions and under TYPE_CHECKING count
as imports.
"""

import ast
import io
import statistics
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_capgap"
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def docstring_lines(tree: ast.Module) -> set[int]:
    """Lines of all string statements: docstrings, and docstrings of fields."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def code_lines(source: str) -> int:
    """Number of lines with code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(ast.parse(source)))


def function_lengths(tree: ast.Module) -> list[int]:
    """Lines of each function, docstring included."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node.end_lineno - node.lineno + 1 for node in ast.walk(tree) if isinstance(node, kinds) and node.end_lineno]


def room_of(file: Path) -> str:
    """Folder of the package that contains the file; "." for files at the top level."""
    first, *rest = file.relative_to(PACKAGE).parts
    return first if rest else "."


def imported_modules(tree: ast.Module) -> Iterator[str]:
    """Dotted names imported from the package; the last part may be a name in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE.name)


def module_graph(trees: dict[Path, ast.Module]) -> dict[str, set[str]]:
    """From each module to the modules it imports."""

    def name_of(file: Path) -> str:
        return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")

    names = {name_of(file): file for file in trees}
    graph: dict[str, set[str]] = {}
    for name, file in names.items():
        found = set()
        for target in imported_modules(trees[file]):
            module = target if target in names else target.rpartition(".")[0]
            if module in names and module != name:
                found.add(module)
        graph[name] = found
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = []
            while not component or component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def room_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """From each folder to the folders it imports."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, targets in graph.items():
        one = [*module.split("."), "."][1]
        for target in targets:
            other = [*target.split("."), "."][1]
            rooms[one].add(other)
            rooms.setdefault(other, set())
    return {room: others - {room} for room, others in rooms.items()}


def main() -> int:
    """Prints the table; returns 0."""
    files = sorted(PACKAGE.rglob("*.py"))
    trees = {file: ast.parse(file.read_text()) for file in files}
    by_room: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        by_room[room_of(file)].append(file)
    total = 0
    print(f"{'room':<14}{'files':>6}{'code':>8}{'functions':>11}{'longest':>9}")
    for room, members in sorted(by_room.items()):
        lines = sum(code_lines(file.read_text()) for file in members)
        lengths = [length for file in members for length in function_lengths(trees[file])]
        total += lines
        print(f"{room:<14}{len(members):>6}{lines:>8,}{len(lengths):>11,}{max(lengths, default=0):>9}")
    lengths = [length for tree in trees.values() for length in function_lengths(tree)]
    print(f"{'all':<14}{len(files):>6}{total:>8,}{len(lengths):>11,}{max(lengths):>9}")
    print(f"median function: {statistics.median(lengths):g} lines; over 60: {sum(length > 60 for length in lengths)}")
    graph = module_graph(trees)
    loops, room_loops = cycles(graph), cycles(room_graph(graph))
    print(f"import cycles of modules: {len(loops)}", *(" <-> ".join(loop) for loop in loops), sep="\n  ")
    print(f"import cycles of rooms: {len(room_loops)}", *(" <-> ".join(loop) for loop in room_loops), sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
