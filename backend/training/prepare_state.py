"""What the files of one photo depend on beside its bytes: the code, the tables and the libraries that make them.

The digest is derived, not raised by hand. It covers every function, class and constant of this package that ``prepare_photo.process``
reaches through names, wherever they are defined, without comments and docstrings; and the table that they read. Changed processing makes
Stage 0 do the photos again, changed words or a changed neighbour do not.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from backend.training.data_processing.mapping import MAPPING_PATH

ROOTS = (("backend.training.prepare_photo", "process"), ("backend.training.prepare_photo", "start_worker"))
PLUMBING = frozenset({"backend.artifacts", "backend.config", "backend.console", "backend.errors", "backend.weights"})
"""Modules that move bytes and messages about and have no say in what the bytes are."""
LIBRARIES = ("numpy", "opencv-python-headless", "pillow", "onnxruntime", "uniface")

Definition = tuple[str, str]  # module, name; the name '' stands for the statements that bind none


@functools.cache
def processing_digest() -> str:
    """sha256 of the code, table and library versions that decide what Stage 0 writes for a photo."""
    parts = [f"{name} {metadata.version(name)}" for name in LIBRARIES]
    parts += [f"{module} {name}\n{code}" for (module, name), code in sorted(reached().items())]
    parts.append(MAPPING_PATH.read_text(encoding="utf-8"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def reached() -> dict[Definition, str]:
    """The definitions that ROOTS reach, with their code."""
    found: dict[Definition, str] = {}
    waiting: list[Definition] = list(ROOTS)
    while waiting:
        module, name = waiting.pop()
        if (module, name) in found or module in PLUMBING:
            continue
        source = read_module(module)
        if source is None:
            continue
        if name in source.imports:  # handed on from another module
            waiting.append(source.imports[name])
        elif name in source.definitions:
            node = source.definitions[name]
            found[module, name] = code_of(node)
            waiting += [(module, ""), *used(node, source)]
    return found


@dataclass(frozen=True)
class Source:
    """A module: what it defines at its top level, and what its imports bind, as (module, name); a module itself has the name '*'."""

    name: str
    definitions: dict[str, ast.Module]
    imports: dict[str, Definition]


@functools.cache
def read_module(name: str) -> Source | None:
    """The module ``name`` of this package; None for what is no such module."""
    path = _file(name)
    return None if path is None else parse(name, path.read_text(encoding="utf-8"))


def parse(name: str, text: str) -> Source:
    """Sorts a module's text into definitions and imports (of other modules of this package)."""
    tree = ast.parse(text)
    statements: dict[str, list[ast.stmt]] = {"": []}
    for statement in tree.body:
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            for bound in _bound(statement) or [""]:
                statements.setdefault(bound, []).append(statement)
    imports: dict[str, Definition] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "backend":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                imports[alias.asname or alias.name] = (whole, "*") if _file(whole) else (node.module, alias.name)
    return Source(name, {key: ast.Module(body, []) for key, body in statements.items()}, imports)


def _bound(statement: ast.stmt) -> list[str]:
    """The names that a statement binds at the top level."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return [
            node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        ]
    return []


def used(node: ast.AST, source: Source) -> list[Definition]:
    """What a piece of code names: definitions of its own module, and those of others that it imports."""
    names: list[Definition] = []
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            module, name = source.imports.get(part.value.id, ("", ""))
            if name == "*":
                names.append((module, part.attr))
        elif isinstance(part, ast.Name):
            if part.id in source.definitions:
                names.append((source.name, part.id))
            elif source.imports.get(part.id, ("", "*"))[1] != "*":
                names.append(source.imports[part.id])
    return names


def code_of(node: ast.Module) -> str:
    """Code without comments, docstrings and layout."""
    tree = ast.parse(ast.unparse(node))
    for part in ast.walk(tree):
        if isinstance(part, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            body = [line for line in part.body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
            part.body = body if body or isinstance(part, ast.Module) else [ast.Pass()]
    return ast.unparse(tree)


def _file(module: str) -> Path | None:
    if module.split(".", maxsplit=1)[0] != "backend":
        return None
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a name within a module: backend.imaging.crop.Box
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None
