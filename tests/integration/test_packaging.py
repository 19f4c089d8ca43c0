"""What is published installs and runs: both archives hold what they should, and dependencies name what is imported."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from configparser import ConfigParser
from email import message_from_string
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

from hf_nvfp4_qat.version import __version__

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hf_nvfp4_qat"
DEMO = [ROOT / "examples" / name for name in ("demo.py", "demo_data.py", "served_loss.py")]
NOT_OURS = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "demo_output")


def build(kind: str, source: Path, out: Path) -> Path:
    """Call the build backend as any frontend does, with the setuptools that is installed here: no network."""
    out.mkdir()
    code = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
    command = [sys.executable, "-c", code, f"build_{kind}", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it and from nothing else."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_OURS)
    sdist = build("sdist", folder / "source", folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return sdist, build("wheel", next((folder / "unpacked").iterdir()), folder / "wheel")


def files_below(folder: Path, *patterns: str) -> set[str]:
    found = [path for pattern in patterns for path in folder.rglob(pattern)]
    return {str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
    info = f"hf_nvfp4_qat-{__version__}.dist-info"
    assert {name for name in names if not name.startswith(info)} == files_below(PACKAGE, "*.py", "*.md", "py.typed")
    documents = {"hf_nvfp4_qat/py.typed", "hf_nvfp4_qat/numerics/FORMAT.md", "hf_nvfp4_qat/distributed/GATHER.md"}
    assert documents | {f"{info}/licenses/LICENSE"} <= names


@pytest.mark.slow
def test_the_wheel_says_what_it_is_and_how_to_start_it(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        info = f"hf_nvfp4_qat-{__version__}.dist-info"
        metadata = message_from_string(wheel.read(f"{info}/METADATA").decode())
        entry_points = ConfigParser()
        entry_points.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert (metadata["Name"], metadata["Version"]) == ("hf-nvfp4-qat", __version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert entry_points["console_scripts"]["nvfp4-qat"] == "hf_nvfp4_qat.cli:main"
    assert entry_points["vllm.general_plugins"]["hf_nvfp4_qat_cpu"] == "hf_nvfp4_qat.rollout.vllm.cpu_plugin:register"


@pytest.mark.slow
def test_the_source_distribution_holds_what_tests_and_documentation_need(archives):
    with tarfile.open(archives[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml"} <= names
    for folder in ("tests", "examples", "docs"):
        assert files_below(ROOT / folder, "*.py", "*.md", "*.toml", "*.yaml", "*.png") <= names


def imported(paths: list[Path], *, at_import_only: bool) -> set[str]:
    """Top-level names of the modules that files import; `at_import_only` leaves out those of functions."""
    found = set()
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body if at_import_only else ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    own = {"hf_nvfp4_qat", *(path.stem for path in paths)}
    return found - own - set(sys.stdlib_module_names)


def required(extra: str = "") -> set[str]:
    """Distributions that `pip install hf_nvfp4_qat[extra]` brings, and those that they themselves require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else ())]
    direct = {distribution(entry) for entry in listed}
    return direct | {name for entry in direct for name in required_by(entry)}


def required_by(name: str) -> set[str]:
    try:
        return {distribution(entry) for entry in requires(name) or () if "extra ==" not in entry}
    except PackageNotFoundError:  # an extra that is not installed here
        return set()


def distribution(requirement: str) -> str:
    """Its name, as names are compared."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;(]", requirement)[0]).lower()


@pytest.mark.parametrize(
    ("paths", "at_import_only", "extra"),
    [
        # Triton's own modules are imported on GPUs alone, where torch brings it along.
        (sorted(path for path in PACKAGE.rglob("*.py") if not path.name.startswith("triton_")), True, ""),
        (DEMO, False, "demo"),
    ],
    ids=["package", "demo"],
)
def test_what_is_imported_is_required(paths, at_import_only, extra):
    names = imported(paths, at_import_only=at_import_only)
    brought = required(extra)
    known = packages_distributions()
    missing = [name for name in names if not brought & {distribution(found) for found in known.get(name, [name])}]
    assert {"torch", "transformers"} <= names and not missing
