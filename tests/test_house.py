"""Architecture: which package may import which, what starts without JAX, how large modules are."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import selcrypt_jax

HOUSE = Path(selcrypt_jax.__file__).parent

# From the ground up. What is on a floor imports lower floors only, and not its neighbours.
FLOORS = [
    ["_tree"],
    ["_io"],
    ["_keys"],
    ["_ciphers", "_importance"],
    ["_masks", "_format"],
    ["_calibrate"],
    ["_release"],
    ["demo"],
    ["audit"],
    ["cli"],
]
# What users import. Only what shows them how imports it too.
PUBLIC = {"__init__", "importance", "models"}
SHOWING = {"audit", "cli", "demo", "models", "__main__"}
# What stands beside the floors, on what.
BESIDE = {
    "models": {"_tree", "_importance"},
    "importance": {"_importance"},
    "__main__": {"cli"},
}
MOST_LINES = 450
MOST_AT_THE_ROOT = 8
# What opens a protected file starts without JAX, which takes longer to start than its work takes.
WITHOUT_JAX = [
    "_keys/*.py",
    "_io/*.py",
    "_format/*.py",
    "_ciphers/blocks.py",
    "_ciphers/lossless.py",
    "_ciphers/engine_numpy.py",
    "_ciphers/engine_window.py",
    "_ciphers/window.py",
    "_ciphers/windows.py",
    "_tree/dtypes.py",
    "_tree/groups.py",
]
WITH_JAX = {"_keys/chacha.py"}
OPENING = ["unlock_file", "verify_file", "inspect_file", "issue_grant", "rotate_file", "open_model"]

# How complaints begin that are known, until what they complain of is mended.
KNOWN = [
    "demo/__init__.py, demo/_run.py import each other",
]


class Import(NamedTuple):
    """An import: of a file of this package, or of a library.

    Attributes:
        path: the importing file, such as ``_keys/keys.py``.
        line: the line of the import.
        module: the imported file of this package, or the name of a library.
        at_start: whether it runs when the file is imported, not only when a function is called.
    """

    path: str
    line: int
    module: str
    at_start: bool


def statements(node: ast.AST, at_start: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes except those for type checkers, and whether they run when the file is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other, at_start
            continue
        yield child, at_start
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from statements(child, at_start and not function)


def file_of(*parts: str) -> str:
    """The file of this package at these steps of a path; the last one may be a name in the file."""
    for steps in (parts, parts[:-1]):
        path = HOUSE.joinpath(*steps)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file.relative_to(HOUSE).as_posix()
    raise AssertionError(f"from {'.'.join(parts)}: there is no such file")


def imports_of(path: Path) -> Iterator[Import]:
    here = path.relative_to(HOUSE)
    for node, at_start in statements(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = here.parts[: len(here.parts) - node.level]
            base = (*base, *node.module.split(".")) if node.module else base
            modules = [file_of(*base, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [str(node.module)]
        for module in dict.fromkeys(modules):
            yield Import(here.as_posix(), node.lineno, module, at_start)


FILES = {path.relative_to(HOUSE).as_posix(): path for path in sorted(HOUSE.rglob("*.py"))}
IMPORTS = [found for path in FILES.values() for found in imports_of(path)]
OURS = [found for found in IMPORTS if found.module in FILES]


def room(file: str) -> str:
    """The package of a file, or its own name at the root."""
    return Path(file).parts[0].removesuffix(".py")


def circles(edges: set[tuple[str, str]]) -> list[list[str]]:
    """Sets of names that reach each other."""
    reached = {one: {other for start, other in edges if start == one} for one, _ in edges}
    for middle in reached:
        for one in reached:
            if middle in reached[one]:
                reached[one] |= reached[middle]
    groups = {
        frozenset(other for other in reached[one] if one in reached.get(other, ()))
        for one in reached
        if one in reached[one]
    }
    return sorted(map(sorted, groups))


def upwards() -> Iterator[str]:
    floors = {name: number for number, names in enumerate(FLOORS) for name in names}
    for found in OURS:
        here, there = room(found.path), room(found.module)
        if here == there or (here in BESIDE and there in BESIDE[here]):
            continue
        if there in PUBLIC:
            fine = here in SHOWING
        else:
            fine = here not in BESIDE and floors[there] < floors[here]
        if not fine:
            yield f"{found.path} imports {found.module} in line {found.line}"


def round_and_round() -> Iterator[str]:
    edges = {(found.path, found.module) for found in OURS if room(found.path) == room(found.module)}
    for circle in circles(edges):
        yield f"{', '.join(circle)} import each other"


def definition() -> Iterator[str]:
    for found in OURS:
        if found.path.startswith("_ciphers/engine_") and found.module == "_ciphers/lossless.py":
            yield f"{found.path} imports {found.module} in line {found.line}"


def long() -> Iterator[str]:
    for file, path in FILES.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES:
            yield f"{file} has {lines} lines"


def without_jax() -> list[str]:
    files = {
        path.relative_to(HOUSE).as_posix() for glob in WITHOUT_JAX for path in HOUSE.glob(glob)
    }
    return sorted(files - WITH_JAX)


def jax_at_start() -> Iterator[str]:
    files = without_jax()
    for found in IMPORTS:
        if found.path in files and found.at_start and found.module.split(".")[0] == "jax":
            yield f"{found.path} imports {found.module} in line {found.line}"


RULES = {
    upwards: f"imports go down only: {' < '.join(' '.join(names) for names in FLOORS)}",
    round_and_round: "no circle in a room, imports in functions counted too",
    definition: "an engine gets what it needs from its caller, or from below",
    long: f"a module is one idea, in at most {MOST_LINES} lines",
    jax_at_start: "opening a file takes no JAX: import it in the function that needs it",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rules_of_the_house(rule):
    bad = [text for text in rule() if not text.startswith(tuple(KNOWN))]
    assert not bad, "\n".join([f"{RULES[rule]}. But:", *bad])


def test_exceptions_are_needed():
    complaints = [text for rule in RULES for text in rule()]
    mended = [known for known in KNOWN if not any(text.startswith(known) for text in complaints)]
    assert not mended, f"mended, so take them out of KNOWN: {mended}"


def test_few_modules_at_the_root():
    names = sorted(path.name for path in HOUSE.glob("*.py*"))
    assert len(names) <= MOST_AT_THE_ROOT, f"put modules into rooms; at the root are {names}"
    rooms = {name for names in FLOORS for name in names} | PUBLIC | set(BESIDE)
    assert {room(file) for file in FILES} == rooms, "which floor is it on? See FLOORS"


def test_opening_files_does_not_start_jax():
    modules = [f"selcrypt_jax.{file[:-3].replace('/', '.')}" for file in without_jax()]
    program = f"""
import importlib, sys, selcrypt_jax
for name in {OPENING}:
    getattr(selcrypt_jax, name)
    # NumPy starts while the file is read.
    assert not {{"jax", "numpy"}} & set(sys.modules), f"selcrypt_jax.{{name}} imports JAX or NumPy"
for name in {modules}:
    importlib.import_module(name)
    assert "jax" not in sys.modules, f"{{name}} imports JAX"
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr.splitlines()[-1]


def test_imports_are_found():
    # Otherwise the rules would hold of anything.
    source = "if TYPE_CHECKING:\n    import a\nelse:\n    import b\ndef f():\n    import c\n"
    found = [
        (node.names[0].name, at_start)
        for node, at_start in statements(ast.parse(source))
        if isinstance(node, ast.Import)
    ]
    assert found == [("b", True), ("c", False)]
    assert file_of("_tree", "names", "Selector") == file_of("_tree", "names") == "_tree/names.py"
    assert file_of("_tree") == "_tree/__init__.py"
    assert file_of("__version__") == "__init__.py"
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")}) == [["a", "b", "c"]]
    assert circles({("a", "b"), ("b", "c"), ("a", "c")}) == []
