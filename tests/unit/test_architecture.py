"""The house rules: which room imports which, where heavy libraries may be named, sizes, docstrings, no print."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_capgap
from tests.support.processes import ROOT, environment

PACKAGE = Path(megatron_capgap.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))

_BASE = {"common", "config", "devices", "distributed", "runtime"}
_BELOW_TRAINING = _BASE | {"models", "data", "checkpoint", "losses", "distillation"}
ROOMS = {
    "common": set(),
    "config": {"common"},
    "law": set(),
    "runtime": {"common", "config"},
    "devices": {"common", "config", "runtime"},
    "distributed": {"common", "config", "devices", "runtime"},
    "losses": {"common", "config"},
    "models": _BASE,
    "planning": {"common", "config", "models"},
    "evaluation": _BASE | {"models", "data", "losses", "generation"},
    "data": _BASE,
    "checkpoint": _BASE | {"models"},
    # A converted model comes with its tokenizer.
    "conversion": _BASE | {"models", "checkpoint", "data"},
    "pruning": _BASE | {"models", "checkpoint"},
    # The teacher reads the micro-batches that data yields.
    "distillation": _BASE | {"models", "checkpoint", "losses", "data"},
    "generation": _BASE | {"models", "data"},
    "training": _BELOW_TRAINING | {"conversion", "pruning"},
    "stages": _BELOW_TRAINING | {"conversion", "pruning", "training", "law", "generation", "planning"},
}
# The command line knows the stages by name alone, and imports one when it is asked for.
CLI = {"common", "config", "devices", "distributed", "runtime"}

MEGATRON_ROOMS = {
    "devices",
    "distributed",
    "runtime",
    "models",
    "data",
    "checkpoint",
    "distillation",
    "pruning",
    "training",
}
TRANSFORMERS_ROOMS = {"conversion"}
LIGHT = (
    "common/*.py",
    "config/*.py",
    "config/validation/*.py",
    "law/*.py",
    "models/size.py",
    "models/memory.py",
    "models/logits.py",
    "models/packing.py",
    "planning/*.py",
    "conversion/hf_config.py",
    "pruning/student_shape.py",
    "checkpoint/metadata.py",
    "distributed/environment.py",
    "distributed/process_group.py",
    "runtime/third_party.py",
    "distributed/worker_pool.py",
    "stages/check.py",
    "stages/resolve.py",
    "data/tokenizer.py",
    "data/sampler.py",
    "distillation/transfer_plan.py",
    "cli.py",
)
HEAVY = ("torch", "megatron", "transformers", "transformer_engine")

MOST_LINES_A_FILE = 400
MOST_LINES_A_FUNCTION = 60


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), filename=str(file))


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file names in an import, wherever the import stands: (line, dotted name)."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def room_of(file: Path) -> str:
    """The room's name, or "" for the files beside the rooms."""
    first, *rest = file.relative_to(PACKAGE).parts
    return first if rest else ""


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def functions(file: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree_of(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_room_has_a_row() -> None:
    assert {room_of(file) for file in FILES} - {""} <= ROOMS.keys()
    assert len(FILES) > 30


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_rooms_import_only_what_the_table_allows(file: Path) -> None:
    room = room_of(file)
    allowed = ROOMS[room] | {room} if room else CLI
    wrong = []
    for line, module in imports(file):
        if within(module, "megatron_capgap"):
            other = [*module.split("."), ""][1]
            if other in ROOMS and other not in allowed:
                wrong.append(f"{name_of(file)}:{line}: {room or 'the command line'} may not import {module}")
    assert not wrong


@pytest.mark.parametrize("file", FILES + TOOLS, ids=name_of)
def test_heavy_libraries_are_named_in_their_rooms(file: Path) -> None:
    room = room_of(file) if file in FILES else "tools"
    path = name_of(file).removeprefix("megatron_capgap/")
    at_home = {
        "megatron": room in MEGATRON_ROOMS,
        "transformer_engine": path.startswith("devices/") or path == "models/specs.py",
        "transformers": room in TRANSFORMERS_ROOMS or room == "tools",
        "triton": path.startswith("losses/kernels/"),
        "torch": room not in ("common", "config", "law", ""),
    }
    named = [(line, module) for line, module in imports(file) if module.split(".")[0] in at_home]
    assert not [f"{line}: {module}" for line, module in named if not at_home[module.split(".")[0]]]


@pytest.mark.parametrize("file", TOOLS, ids=name_of)
def test_tools_leave_the_stages_alone(file: Path) -> None:
    assert not [module for _, module in imports(file) if within(module, "megatron_capgap.stages")]


def test_parallel_state_has_one_reader() -> None:
    readers = {name_of(file) for file in FILES for _, module in imports(file) if "parallel_state" in module}
    assert readers == {"megatron_capgap/distributed/parallel_context.py"}


def test_what_help_and_check_touch_is_light() -> None:
    files = sorted(file for pattern in LIGHT for file in PACKAGE.glob(pattern))
    assert len(files) >= len(LIGHT)
    modules = [name_of(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in files]
    program = (
        "import importlib, sys\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(module)\n"
        f"    heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "    assert not heavy, f'{module} imports {heavy}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *modules], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_library_code_does_not_print(file: Path) -> None:
    calls = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_and_functions_are_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MOST_LINES_A_FILE
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions(file)}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES_A_FUNCTION} == {}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_what_is_public_has_a_docstring(file: Path) -> None:
    tree = tree_of(file)
    assert ast.get_docstring(tree), "the module itself"
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in list(public):
        # What a base class has described need not be said again.
        if isinstance(node, ast.ClassDef) and all(
            getattr(base, "id", "") in ("Protocol", "ABC") for base in node.bases
        ):
            public += [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
    assert not [node.name for node in public if not node.name.startswith("_") and not ast.get_docstring(node)]


@pytest.mark.parametrize("file", [file for file in FILES if file.name == "__init__.py"], ids=name_of)
def test_init_files_are_faces(file: Path) -> None:
    _docstring, *rest = tree_of(file).body
    for node in rest:
        names = [target.id for target in node.targets] if isinstance(node, ast.Assign) else []
        assert isinstance(node, ast.Import | ast.ImportFrom) or names in (["__all__"], ["__version__"]), node.lineno


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "tools", "tests"])
def test_what_is_imported_of_ours_is_there(folder: str) -> None:
    """Scripts that only a person runs are not broken by a name that has moved."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        if "work" in file.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron_capgap":
                module = PACKAGE.joinpath(*node.module.split(".")[1:])
                source = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
                assert source.is_file(), f"{file}:{node.lineno}: {node.module}"
                words = set(re.findall(r"\w+", source.read_text()))
                names = [alias.name for alias in node.names]
                lost = [name for name in names if name not in words and not (module / f"{name}.py").is_file()]
                assert not [name for name in lost if not (module / name).is_dir()], f"{file}:{node.lineno}: {lost}"
