"""Pages of documentation that run: `python tests/doc_pages.py docs/reference.md` in an empty folder.

A page is read from the top. Its fenced blocks share one namespace and the current folder:

    ```python                Python
    ```python vllm           Python that needs vLLM; left out unless asked for
    ```python no-run: why    Python that cannot run here; it must still compile
    ```console               commands after `$ `, and what they print
    ```console hub           commands that write to a hub; left out unless asked for
    ```text                  what the Python block before it prints

Printed text is compared as doctest does: any white space is one space, and `...` stands for anything.
"""

import contextlib
import doctest
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
SETUP = "Setup"
"""Heading of the section that every other section builds on."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: first word of the info string.
        marker: the rest of it, "" in most.
        body: what is between the fences.
        line: of the body's first line in the page, from 1.
        section: the heading above it.
    """

    language: str
    marker: str
    body: str
    line: int
    section: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, from the top."""
    text = page.read_text(encoding="utf-8")
    fences = list(_FENCE.finditer(text))
    inside = [range(*fence.span()) for fence in fences]
    headings = [found for found in _HEADING.finditer(text) if not any(found.start() in span for span in inside)]
    found = []
    for fence in fences:
        language, _, marker = fence["info"].strip().partition(" ")
        section = [heading[1] for heading in headings if heading.start() < fence.start()]
        line = text.count("\n", 0, fence.start("body")) + 1
        found.append(Block(language, marker, fence["body"], line, section[-1] if section else ""))
    return found


def run(page: Path, *, vllm_only: bool = False, with_hub: bool = False) -> int:
    """Run a page in the current folder.

    Args:
        page: to run.
        vllm_only: run the section `SETUP` and the blocks marked `vllm`; else all blocks but those.
        with_hub: run the blocks marked `hub` too, at HF_ENDPOINT.

    Returns:
        The number of blocks that ran.

    Raises:
        AssertionError: something else was printed than the page says, or a command failed.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    num_run = 0
    for block in blocks(page):
        markers = {"", "hub"} if with_hub else {""}
        wanted = block.section == SETUP or block.marker == "vllm" if vllm_only else block.marker in markers
        if not wanted:
            continue
        where = f"{page.name}:{block.line}"
        if block.language == "python":
            # Lines are counted as in the page, so that a traceback points there.
            code = compile("\n" * (block.line - 1) + block.body, str(page), "exec")
            printed = _printed_by(code, namespace)
        elif block.language == "console":
            for command, expected in _commands(block.body):
                _check_printed(_output_of(command), expected, where)
        elif block.language == "text":
            _check_printed(printed, block.body, where)
        else:
            continue
        num_run += 1
    return num_run


def _printed_by(code: Any, namespace: dict[str, Any]) -> str:
    # A file and not a StringIO: vLLM asks stdout for its descriptor.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        printed.seek(0)
        return printed.read()


def _commands(body: str) -> list[tuple[str, str]]:
    """(command, what it prints) of a console block; a command may go on after a backslash."""
    parts = re.split(r"^\$ ", body.replace("\\\n", " "), flags=re.MULTILINE)[1:]
    return [(command, expected) for command, _, expected in (part.partition("\n") for part in parts)]


def _output_of(command: str) -> str:
    from hf_nvfp4_qat.cli import app

    name, *arguments = shlex.split(command)
    assert name == "nvfp4-qat", f"only nvfp4-qat is run; got {command}"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{command}: exit code {result.exit_code}: {result.output} {result.exception!r}"
    return result.stdout


def _check_printed(printed: str, expected: str, where: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    same = doctest.OutputChecker().check_output(expected, printed, flags)
    assert same, f"{where}: expected\n{expected}\nbut this was printed:\n{printed}"


if __name__ == "__main__":
    path, *options = sys.argv[1:]
    num_blocks = run(Path(path).resolve(), vllm_only="--vllm" in options, with_hub="--hub" in options)
    print(f"{num_blocks} blocks ran")
