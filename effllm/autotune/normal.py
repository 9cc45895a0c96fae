"""Source text reduced to what it means, so that a comment or a line break does not throw measurements away.

Python: the syntax tree without positions, docstrings and other bare strings; written out by hand, since `ast.dump` differs between
Python versions. C++: the text without comments, runs of white space outside of literals collapsed.
"""

from __future__ import annotations

import ast
import re
from functools import lru_cache

_CPP = re.compile(
    r"""
    (?P<raw>(?:u8|[uUL])?R"(?P<tag>[^\s()\\]{0,16})\(.*?\)(?P=tag)")
  | (?P<text>"(?:\\.|[^"\\\n])*")
  | (?P<number>\d[\w.']*)                # digits may be separated by '
  | (?P<word>\w+)
  | (?P<char>'(?:\\.|[^'\\\n])+')
  | (?P<line>//(?:\\\n|[^\n])*)
  | (?P<block>/\*.*?\*/)
  | (?P<space>(?:[^\S\n]|\\\n)+)         # a spliced line is one line
  | (?P<newline>\n\s*)                   # kept: preprocessor lines end there
  | (?P<other>[^\s"'/\w\\]+|.)
    """,
    re.S | re.X,
)
_GAP = {"line": 1, "block": 1, "space": 1, "newline": 2}


@lru_cache(maxsize=512)  # every kernel's hash reads all the files that it shares with the others
def python(text: str) -> str:
    """The canonical form of a Python source. Raises SyntaxError."""
    return _node(ast.parse(text))


@lru_cache(maxsize=512)
def cpp(text: str) -> str:
    """The canonical form of a C++ source."""
    pieces: list[str] = []
    gap = 0
    for found in _CPP.finditer(text):
        kind = str(found.lastgroup)
        if kind in _GAP:
            gap = max(gap, _GAP[kind])
            continue
        if pieces:
            pieces.append(("", " ", "\n")[gap])
        pieces.append(found[0])
        gap = 0
    return "".join(pieces)


def _node(value: object) -> str:
    if isinstance(value, ast.AST):
        fields = ((name, getattr(value, name, None)) for name in value._fields if name not in ("kind", "type_comment"))
        # a field that newer Pythons added is empty in sources that older ones can read
        return f"{type(value).__name__}({','.join(f'{name}={_node(v)}' for name, v in fields if v is not None and v != [])})"
    if isinstance(value, list):
        return f"[{','.join(_node(v) for v in value if not _is_bare_string(v))}]"
    return repr(value)


def _is_bare_string(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def imported(text: str, package: str) -> list[tuple[str, bool]]:
    """Dotted names that a Python source refers to, each with whether it must exist. Raises SyntaxError.

    `from a import b` gives a.b; relative imports are resolved against `package`. String constants that look like dotted names are
    listed too, since modules are also loaded by name, but they may mean something else.
    """
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, True) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join((*parts[: len(parts) - node.level + 1], *filter(None, [node.module])))
            found += [(f"{base}.{alias.name}", True) for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+(\.\w+)+", node.value):
            found.append((node.value, False))
    return found


def included(text: str) -> list[str]:
    """File names of a C++ source's quoted includes, as written."""
    return re.findall(r'^\s*#\s*include\s*"([^"]+)"', cpp(text), re.M)
