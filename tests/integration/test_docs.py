"""The documentation is true: its examples run, nothing public lacks one, and its links lead somewhere."""

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import doc_pages
import pytest
from fake_hub import FakeHub
from messages import VALUE, messages

import hf_nvfp4_qat
from hf_nvfp4_qat.cli import app
from hf_nvfp4_qat.doctor.findings import RULES

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
FOR_CONTRIBUTORS = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "contributing").glob("*.md"))]
LANGUAGES = ("python", "console", "text")
COMMANDS = [f"nvfp4-qat {command.callback.__name__}" for command in app.registered_commands]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_page(page: Path, folder: Path, *options: str) -> str:
    """What `doc_pages.py` prints when it runs a page in an empty folder, with a hub that takes what is pushed."""
    with FakeHub() as hub:
        environment = {
            **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "hf_home"),
            "HF_TOKEN": hub.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        command = [sys.executable, doc_pages.__file__, str(page), *options]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-5000:]
        return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_a_page_runs_from_the_top(page, tmp_path):
    wanted = [block for block in doc_pages.blocks(page) if block.marker in ("", "hub") and block.language in LANGUAGES]
    assert run_page(page, tmp_path, "--hub").endswith(f"{len(wanted)} blocks ran\n")


@pytest.mark.slow
@pytest.mark.vllm
def test_the_rollout_example_runs(tmp_path):
    assert run_page(REFERENCE, tmp_path, "--vllm").endswith("2 blocks ran\n")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_what_does_not_run_says_why_and_imports_what_exists(page):
    for block in doc_pages.blocks(page):
        if block.language != "python":
            continue
        assert re.fullmatch(r"|vllm|no-run: .+", block.marker), f"{page.name}:{block.line}"
        for node in ast.walk(ast.parse(block.body)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_nvfp4_qat":
                assert find_spec(node.module), f"{page.name}:{block.line}: no module {node.module}"
                if node.module == "hf_nvfp4_qat":
                    assert {alias.name for alias in node.names} <= set(hf_nvfp4_qat.__all__)


def examples_of(name: str) -> list[doc_pages.Block]:
    """Blocks that some test runs, in the section of the reference that has the name in its title."""
    title = re.compile(rf"\[`{re.escape(name)}`\]\(.*\)")
    found = [block for block in doc_pages.blocks(REFERENCE) if title.fullmatch(block.section)]
    return [block for block in found if not block.marker.startswith("no-run")]


@pytest.mark.parametrize("name", hf_nvfp4_qat.__all__)
def test_every_public_name_has_an_example_whose_outcome_is_checked(name):
    examples = examples_of(name)
    assert any(re.search(rf"\b{name}\b", block.body) for block in examples if block.language == "python")
    assert any(block.language == "text" or "assert " in block.body for block in examples)
    source = getattr(hf_nvfp4_qat, name).__module__.replace(".", "/")
    assert f"### [`{name}`](../{source}.py)" in REFERENCE.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_whose_output_is_checked(command):
    shown = [line for block in examples_of(command) if block.language == "console" for line in block.body.splitlines()]
    assert any(line.startswith(f"$ {command} ") for line in shown)
    assert any(not line.startswith("$") for line in shown)


@pytest.mark.parametrize("page", [*PAGES, *FOR_CONTRIBUTORS], ids=page_name)
def test_links_lead_to_files_that_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|#", link)]
    assert not [link for link in links if not (page.parent / link.partition("#")[0]).exists()]


@pytest.mark.parametrize("expected", ["", "something else\n"])
def test_a_page_that_prints_something_else_fails(tmp_path, expected):
    (tmp_path / "page.md").write_text(f"```python\nprint('this')\n```\n\n```text\n{expected}```\n")
    with pytest.raises(AssertionError, match="page.md:6"):
        doc_pages.run(tmp_path / "page.md")


def messages_on_the_page() -> list[str]:
    """What stands between two backticks; between one alone is code."""
    text = TROUBLESHOOTING.read_text(encoding="utf-8")
    return [" ".join(found.split()) for found in re.findall(r"(?<!`)``(?!`)(.+?)(?<!`)``(?!`)", text)]


@pytest.mark.parametrize("message", messages(), ids=lambda message: message.where)
def test_every_message_is_on_the_page_by_its_fixed_words(message):
    assert len(message.fixed_words) >= 8, f"nothing to search for: {message.text}"
    assert any(message.fixed_words in shown for shown in messages_on_the_page()), message.text


def test_every_rule_of_the_doctor_is_on_the_page():
    text = TROUBLESHOOTING.read_text(encoding="utf-8")
    table = text.partition("## What `nvfp4-qat doctor` finds")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \| ([\w, ]+) \| (.+) \|$", table, re.MULTILINE)
    assert rows == [(name, rule.severity, ", ".join(rule.engines) or "all", rule.fix) for name, rule in RULES.items()]


def test_the_page_has_no_message_that_the_package_does_not_have():
    texts = [message.text for message in messages()]
    shown = {
        text: [part.strip() for part in text.split(VALUE) if re.search(r"\w", part)] for text in messages_on_the_page()
    }
    gone = [text for text, parts in shown.items() if not any(all(part in known for part in parts) for known in texts)]
    assert len(shown) > 100 and not gone
