"""Write docs/api.md from the docstrings, and pywm/_C.pyi from the compiled module.

``python docs/generate.py`` writes both, ``--check`` only says whether they are up to date (exit code 1: they are not).
The package is read, not imported, for api.md: it comes out the same whatever is installed.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "docs" / "api.md"
STUB = ROOT / "pywm" / "_C.pyi"

# In this order; a package stands for the names in its __all__, or for its modules if it has none.
MODULES = [
    "pywm",
    "pywm.ops",
    "pywm.ops.reference",
    "pywm.distributions",
    "pywm.nn",
    "pywm.optim",
    "pywm.envs",
    "pywm.losses",
    "pywm.data",
    "pywm.models",
    "pywm.models.video",
    "pywm.planning",
    "pywm.training",
    "pywm.algos",
    "pywm.algos.*",
    "pywm.integrations",
    "pywm.config",
    "pywm.types",
    "pywm.errors",
]

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


# ---- reading ---------------------------------------------------------------------------------------------------------


def path_of(module: str) -> Path | None:
    """Return the file of a module of the package, or None."""
    path = ROOT.joinpath(*module.split("."))
    found = [p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file()]
    return found[0] if found else None


def children(module: str) -> list[str]:
    """Return the public modules inside a package."""
    folder = ROOT.joinpath(*module.split("."))
    return [f"{module}.{p.stem}" for p in sorted(folder.glob("*.py")) if not p.stem.startswith("_")]


def modules() -> list[str]:
    """Return the modules to document, in order."""
    found: list[str] = []
    for module in MODULES:
        if module.endswith(".*"):
            found += children(module[:-2])
        elif path_of(module) is not None:
            found.append(module)
            if (ROOT.joinpath(*module.split(".")) / "__init__.py").is_file() and not exported(module):
                found += children(module)
    return found


def exported(module: str) -> list[str]:
    """Return the public names of a module: its __all__, or else what it defines."""
    path = path_of(module)
    assert path is not None
    body = ast.parse(path.read_text()).body
    for node in body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
        ):
            return [str(name) for name in ast.literal_eval(node.value)]
    return [n.name for n in body if isinstance(n, Definition) and not n.name.startswith("_")]


def find(module: str, name: str) -> tuple[str, Definition | ast.stmt, str] | None:
    """Return where a public name is defined: the module, the node, and the text below an assignment."""
    path = path_of(module)
    if path is None:
        return None
    tree = ast.parse(path.read_text())
    body = tree.body
    for i, node in enumerate(body):
        if isinstance(node, Definition) and node.name == name and not _is_overload(node):
            return module, node, ""
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in [getattr(t, "id", None) for t in targets]:
            after = body[i + 1] if i + 1 < len(body) else None
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            return module, node, str(after.value.value) if said else ""  # type: ignore[union-attr]
    for statement in ast.walk(tree):  # a lazy import inside __getattr__ counts too
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("pywm"):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return find(str(statement.module), alias.name)
    return None


def _is_overload(node: Definition) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)


# ---- writing api.md --------------------------------------------------------------------------------------------------


def api() -> str:
    """Return the text of docs/api.md."""
    listed = modules()
    lines = ["# API", "", "Written from the docstrings by `make docs`; do not edit.", ""]
    lines += [f"- [`{module}`](#{_anchor(module)})" for module in listed]
    documented: dict[int | str, str] = {}
    for module in listed:
        path = path_of(module)
        assert path is not None
        lines += ["", f"## `{module}`", "", *_prose(ast.get_docstring(ast.parse(path.read_text())) or "")]
        for name in exported(module):
            found = find(module, name)
            if found is None or name == "__version__":
                continue
            home, node, text = found
            key = f"{home}.{getattr(node, 'name', name)}"
            if key in documented:
                lines += [
                    "",
                    f"### `{module}.{name}`",
                    "",
                    f"See [`{documented[key]}`](#{_anchor(documented[key])}).",
                ]
                continue
            documented[key] = f"{module}.{name}"
            lines += ["", f"### `{module}.{name}`", "", *_definition(node, name, text)]
    return "\n".join(lines).rstrip() + "\n"


def _anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _definition(node: Definition | ast.stmt, name: str, text: str) -> list[str]:
    if not isinstance(node, Definition):
        line = ast.unparse(node)
        if len(line) > 100:
            line = re.sub(r" = .*", " = ...", line, count=1, flags=re.DOTALL)
        return ["```python", line, "```", *(["", *_prose(text)] if text else [])]
    lines = ["```python", *_signature(node, name), "```", ""]
    lines += _prose(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            public = isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
            if isinstance(method, ast.FunctionDef) and public and ast.get_docstring(method):
                lines += ["", "```python", *_signature(method, f"{name}.{method.name}"), "```", ""]
                lines += _prose(ast.get_docstring(method) or "")
    return lines


def _signature(node: Definition, name: str) -> list[str]:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(b) for b in node.bases)
        lines = [f"class {name}({bases}):" if bases else f"class {name}:"]
        fields = [
            n for n in node.body if isinstance(n, ast.AnnAssign) and not ast.unparse(n.target).startswith("_")
        ]
        lines += [f"    {ast.unparse(field)}" for field in fields]
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                lines += ["    " + line for line in _signature(method, "__init__")]
        return lines if len(lines) > 1 else [lines[0].removesuffix(":")]
    parts = re.sub(r"(\w+: [^,=]+)=", r"\1 = ", ast.unparse(node.args))
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{name}({parts}){returns}"
    if len(line) <= 100:
        return [line]
    # One argument a line: split where ast.unparse put a comma outside all brackets.
    split, depth = [""], 0
    for character in parts:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            split.append("")
        else:
            split[-1] += character
    return [f"{name}(", *(f"    {part.strip()}," for part in split), f"){returns}"]


SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Source|Example|Examples|Note):\s*(.*)$")


def _prose(text: str) -> list[str]:
    """Return a docstring as Markdown: sections in bold, arguments as a list, literal blocks fenced."""
    lines = text.strip().splitlines()
    result: list[str] = []
    i = 0
    while i < len(lines):
        line = lines[i]
        section = SECTION.match(line)
        if section:
            block, i = _indented(lines, i + 1)
            result += [f"**{section[1]}**" + (f" {_inline(section[2])}" if section[2] else ""), ""]
            as_list = section[1] in ("Args", "Attributes", "Raises")
            result += _items(block) if as_list else [_inline(b.strip()) for b in block]
        elif line.startswith(".. math::"):
            block, i = _indented(lines, i + 1)
            formula = [line.removeprefix(".. math::").strip(), *(b.strip() for b in block)]
            result += ["$$", *(f for f in formula if f), "$$"]
        elif line.endswith("::"):
            block, i = _indented(lines, i + 1)
            said = line.removesuffix("::").rstrip()
            result += [
                *([_inline(said) + ":", ""] if said else []),
                "```",
                *textwrap.dedent("\n".join(block)).strip("\n").splitlines(),
                "```",
            ]
        else:
            result.append(_inline(line))
            i += 1
            continue
        if i < len(lines):
            result.append("")
    return result


def _indented(lines: list[str], start: int) -> tuple[list[str], int]:
    end = start
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" ")):
        end += 1
    block = lines[start:end]
    while block and not block[-1].strip():
        block.pop()
    while block and not block[0].strip():
        block.pop(0)
    return block, end


def _items(block: list[str]) -> list[str]:
    items: list[str] = []
    for line in textwrap.dedent("\n".join(block)).splitlines():
        if line.startswith(" ") and items:
            items[-1] += " " + line.strip()
        elif line.strip():
            items.append(line)
    return [re.sub(r"^(\*{0,2}[\w, ]+?): ", r"- `\1`: ", _inline(item)) for item in items]


def _inline(text: str) -> str:
    text = re.sub(r":\w+:`~?([^`<]+?)(?:\s*<[^>]*>)?`", r"`\1`", text)
    return text.replace("``", "`").rstrip()


# ---- writing _C.pyi --------------------------------------------------------------------------------------------------


def stub() -> str:
    """Return the text of pywm/_C.pyi; pybind11 puts the signatures in the first line of the docstrings."""
    from pywm.ops import _native

    module = _native.module()
    lines = []
    names = [name for name in sorted(vars(module)) if not name.startswith("__") or name == "__version__"]
    for name in names:
        if not callable(getattr(module, name)):
            lines.append(f"{name}: {type(getattr(module, name)).__name__}")
    lines.append("")
    for name in names:
        if callable(getattr(module, name)):
            signature = (inspect.getdoc(getattr(module, name)) or "").splitlines()[0]
            lines.append(f"def {_types(signature)}: ...")
    head = ['"""Compiled kernels of pywm; written from the module by `make docs`, do not edit."""', ""]
    if any("Sequence[" in line for line in lines):
        head.append("from collections.abc import Sequence")
    head += ["from typing import Any", ""]
    return _formatted("\n".join(head + lines) + "\n")


def _types(signature: str) -> str:
    for pattern, replacement in [
        (r"typing\.SupportsFloat \| typing\.SupportsIndex", "float"),
        (r"typing\.SupportsInt \| typing\.SupportsIndex", "int"),
        (r"collections\.abc\.", ""),
        (r"\btyping\.", ""),
        (r"\b(object|handle)\b", "Any"),
        (r"\bdict\b(?!\[)", "dict[str, tuple[int, int]]"),
        (r"\btype: type\b", "type: type[Any]"),
    ]:
        signature = re.sub(pattern, replacement, signature)
    return signature


def _formatted(text: str) -> str:
    """Return a stub as `ruff format` leaves it: one argument a line where one line is too short."""
    lines = []
    for line in text.splitlines():
        match = re.fullmatch(r"def (\w+)\((.*)\) -> (.*): \.\.\.", line)
        if match and len(line) > 110:
            arguments = re.split(r", (?=\w+: )", match[2])
            lines += [f"def {match[1]}(", *(f"    {a}," for a in arguments), f") -> {match[3]}: ..."]
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write both files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if something is out of date"
    )
    check = parser.parse_args().check
    stale = 0
    for path, text in ((API, api()), (STUB, stub())):
        if path.exists() and path.read_text() == text:
            continue
        stale += 1
        name = path.relative_to(ROOT)
        sys.stdout.write(f"{name} is out of date: run `make docs`\n" if check else f"wrote {name}\n")
        if not check:
            path.write_text(text)
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
