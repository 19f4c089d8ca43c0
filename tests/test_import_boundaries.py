"""The rooms import leftward only, and importing the package stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_nvfp4_qat

PACKAGE = Path(hf_nvfp4_qat.__file__).parent
ROOMS = ("numerics", "sharding", "selection", "modules", "distributed", "formats", "checkpoint")
"""Each imports from those before it."""
TRAINING = (*ROOMS, "compat", "quantizer", "distillation", "rollout", "trl_callbacks")
JUDGING = (*ROOMS, "doctor", "hub", "distillation")
"""Training knows nothing of the doctor and the Hub, but for distillation, which ends with a checkpoint and its card."""
LAZY = {("hf_nvfp4_qat.quantizer.saving", "hf_nvfp4_qat.hub.publish")}
"""The one exception: `model.push_to_hub` of a QAT model loads what publishes it when it is called."""
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(("hf_nvfp4_qat", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def own_imports(path: Path) -> list[str]:
    """Every module of ours that a file imports, at any depth of the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: star import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            known = {module_name(file) for file in FILES}
            found += [module if module in known else node.module for module in modules]
    return [name for name in found if name.split(".")[0] == "hf_nvfp4_qat"]


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "package"


def left_of(mine: str) -> set[str]:
    """The rooms that a room may import from, itself among them; the command line imports from all."""
    if mine in ("cli", "package"):
        return {*TRAINING, *JUDGING, mine}
    return {name for order in (TRAINING, JUDGING) if mine in order for name in order[: order.index(mine) + 1]}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_leftward_and_name_the_defining_file(path):
    mine = module_name(path)
    for imported in own_imports(path):
        assert room(imported) != "package", f"{path} imports from the package's __init__"
        assert imported not in {f"hf_nvfp4_qat.{name}" for name in left_of("cli") - {"compat", "cli"}}, (
            f"{path} imports from a room's __init__"
        )
        is_known = room(imported) == "version" or (mine, imported) in LAZY  # the version imports nothing
        assert is_known or room(imported) in left_of(room(mine)), f"{path} imports {imported}, to its right"


def test_there_are_no_import_cycles():
    graph = {module_name(path): set(own_imports(path)) for path in FILES}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"cycle: {' -> '.join((*above, module))}"
        if module not in done:
            for imported in graph.get(module, ()):
                visit(imported, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_importing_the_package_loads_no_optional_library():
    optional = "{'triton', 'vllm', 'trl', 'peft', 'matplotlib', 'deepspeed'}"
    # Torch and Transformers load some of them where they are installed.
    theirs = "sys, torch, transformers.modeling_utils, transformers.quantizers.auto"
    before = f"import {theirs}; before = {optional} & set(sys.modules)"
    after = f"import hf_nvfp4_qat; after = {optional} & set(sys.modules); assert after == before, after - before"
    subprocess.run([sys.executable, "-c", f"{before}\n{after}"], check=True)


def test_importing_the_package_and_training_load_neither_the_doctor_nor_the_hub():
    code = (
        "import sys, hf_nvfp4_qat, hf_nvfp4_qat.quantizer.load\n"
        "rooms = {name.split('.')[1] for name in sys.modules if name.startswith('hf_nvfp4_qat.')}\n"
        "assert 'quantizer' in rooms and not rooms & {'doctor', 'hub'}, rooms"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_registers_the_quantizer_and_reloading_does_not_fail():
    code = (
        "import importlib, hf_nvfp4_qat.quantizer.config as c, hf_nvfp4_qat.quantizer.hf_quantizer as q\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as M, AUTO_QUANTIZATION_CONFIG_MAPPING as C\n"
        "assert M['nvfp4_qat'] is q.NVFP4QATHfQuantizer and C['nvfp4_qat'] is c.NVFP4QATConfig\n"
        "importlib.reload(c); importlib.reload(q)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_the_door_makes_codes():
    """Nothing outside `numerics/` calls an implementation; inside it `quantize.py` does, and inputs round alike."""
    implementations = {f"hf_nvfp4_qat.numerics.{name}" for name in ("eager", "reference", "triton_kernels")}
    callers = {module_name(path) for path in FILES if implementations & set(own_imports(path))}
    inputs = {"hf_nvfp4_qat.numerics.activations", "hf_nvfp4_qat.numerics.triton_activations"}
    assert callers == {"hf_nvfp4_qat.numerics.quantize", *inputs}


def test_checkpoint_keys_are_spelled_in_one_file_only():
    for path in FILES:
        if path.name != "names.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
                    assert node.value not in ("weight_packed", "weight_scale", "weight_global_scale"), path


def test_public_names_are_the_documented_ones():
    assert set(hf_nvfp4_qat.__all__) <= set(dir(hf_nvfp4_qat))
    for name in hf_nvfp4_qat.__all__:
        assert getattr(hf_nvfp4_qat, name).__doc__, name


def test_no_test_file_imports_from_another_one():
    for path in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").rpartition(".")[2].startswith("test_"), f"{path}: {node.module}"
