"""What the package can say to a user: the messages of its errors and warnings, read from its source.

Values are written as `…`: ``NVFP4 needs in_features divisible by …; … has …. Add it to `exclude`.``
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hf_nvfp4_qat

PACKAGE = Path(hf_nvfp4_qat.__file__).parent
VALUE = "…"
_LOGGED = ("warning", "error")


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        where: file and line.
        text: all of it, with `VALUE` for values, and single spaces.
    """

    where: str
    text: str

    @property
    def rule(self) -> str:
        """Its first sentence: what a user reads first, and looks for."""
        return re.split(r"[.:] (?=[A-Z…])", self.text)[0].rstrip(".")

    @property
    def fixed_words(self) -> str:
        """The longest part of the first sentence that is the same every time."""
        return max((part.strip() for part in self.rule.split(VALUE)), key=len)


def messages() -> list[Message]:
    """Of every `raise` and every warning, but for those that only hand on what another said."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            statement.targets[0].id: statement.value
            for statement in tree.body
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
        }
        for line, node in _spoken(tree):
            text = " ".join(_text(node, constants).split())
            if re.search(r"\w", text):
                found.append(Message(f"{path.relative_to(PACKAGE)}:{line}", text))
    return found


def _spoken(tree: ast.AST) -> Iterator[tuple[int, ast.expr]]:
    """(line, expression of the message) of what is raised or logged; Python's own protocols are no messages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            if ast.unparse(node.exc.func) not in ("AttributeError", "typer.Exit"):
                yield node.lineno, node.exc.args[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in [f"logger.{name}" for name in _LOGGED]:
            yield node.lineno, node.args[0]


def _text(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """The words of an expression, `VALUE` where they vary."""
    match node:
        case ast.Constant(value=str(words)):
            return re.sub(r"%[sd]", VALUE, words)
        case ast.JoinedStr(values=parts):
            return "".join(_text(part, constants) for part in parts)
        case ast.Call(func=ast.Attribute(value=words, attr="format")):
            return re.sub(r"\{\w*\}", VALUE, _text(words, constants))
        case ast.Name(id=name) if name in constants:
            return _text(constants[name], constants)
    return VALUE
