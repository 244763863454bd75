"""The examples in core's docstrings: each indented block that is Python."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

CORE = Path(__file__).parents[2] / "core" / "src"


def examples() -> dict[str, str]:
    """Where it stands -> the code."""
    found = {}
    for path in sorted((CORE / "multifd").rglob("*.py")):
        module = ".".join(path.relative_to(CORE).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for code in _blocks(ast.get_docstring(node) or ""):
                    found[f"{module}:{getattr(node, 'name', '')}".rstrip(":")] = code
    return found


def _blocks(text: str) -> Iterator[str]:
    block: list[str] = []
    for line in [*text.splitlines(), "end"]:
        if line.startswith("    ") or (block and not line.strip()):
            block.append(line)
        elif block:
            code = textwrap.dedent("\n".join(block))
            block = []
            try:
                compile(code, "example", "exec")
            except SyntaxError:  # a formula, or a directory
                continue
            yield code
