"""What is quantized, for every language model type of Transformers: a table that people have read line by line.

coverage_by_model_type.txt says of each type which layers train in NVFP4, and which part of the parameters that is (of a
model with few layers). A new version of Transformers, or a change of the rules, shows as a diff of that table; read it,
and write it anew with ``python tests/modules/test_coverage_by_model_type.py``.
"""

import difflib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from model_types import NOT_BUILT, language_model_types, on_meta
from transformers.utils import logging

from hf_nvfp4_qat.modules.recipe import Recipe
from hf_nvfp4_qat.modules.swap import coverage_of, fused_experts, swap_linears

TABLE = Path(__file__).with_name("coverage_by_model_type.txt")
WRITTEN_WITH = "5.17"
HEAD = f"""\
# What preset="full" quantizes, by model type and class of Transformers {WRITTEN_WITH}; * is any number. The percentage
# is the share of quantized parameters; the models have few layers, so embeddings count more than in real ones.
# "refused": the error that the plain recipe gives; the layers below it are quantized if the experts are excluded.
"""

# Of what is never packed, as far as names tell; the rules do not use this one.
OF_NO_LANGUAGE_MODEL = re.compile(
    r"vision|visual|image|img_|video|audio|speech(?!t5)|resampler|qformer|projector|merger|connector|codec|vocoder|talker"
    r"|token2wav|tokenizer_encoder|diffusion|router|indexer|lm_head|logits|(^|\.)(gate|score|classifier|cls)(\.|$)"
)


IS_THAT_VERSION = transformers.__version__.startswith(f"{WRITTEN_WITH}.")


def covered(model_type: str, class_name: str) -> tuple[str, list[str]]:
    """A line about the model, and the paths of its quantized layers, each once for all layers of a stack."""
    try:
        model = on_meta(model_type, class_name)
    except Exception as error:  # whatever a default config of a newer version lacks
        assert not IS_THAT_VERSION, f"{model_type} is not built ({error}): see CHANGES and NOT_BUILT"
        return f"{model_type} {class_name}: not built", []
    refused = ""
    for exclude in ((), tuple(fused_experts(model))):
        try:
            swap_linears(model, Recipe(exclude=exclude), output_embedding=model.get_output_embeddings())
            break
        except ValueError as error:
            refused += f", refused: {re.split('[:;,(]', str(error))[0].strip()}"
    report = coverage_of(model)
    share = sum(x.num_parameters for x in report if x.is_quantized) / sum(x.num_parameters for x in report)
    paths = sorted({re.sub(r"(?<=[._])\d+(?=\.|$)", "*", path) for path in report.quantized})
    return f"{model_type} {class_name}: {share:.0%}{refused}", paths


def lines_of(paths: list[str]) -> list[str]:
    """Siblings in one line: ``layers.*.mlp.{down_proj, gate_proj, up_proj}``."""
    siblings: dict[str, list[str]] = {}
    for path in paths:
        parent, _, local_name = path.rpartition(".")
        siblings.setdefault(parent, []).append(local_name)
    return [
        f"    {parent}.{names[0] if len(names) == 1 else '{' + ', '.join(names) + '}'}"
        for parent, names in siblings.items()
    ]


def everything() -> tuple[list[str], list[str]]:
    """The table's lines, and the quantized layers whose names are those of something else than a language model."""
    logging.set_verbosity_error()
    lines, odd = HEAD.splitlines(), []
    for model_type, class_name in language_model_types():
        if model_type in NOT_BUILT:
            lines.append(f"{model_type} {class_name}: not built, {NOT_BUILT[model_type]}")
            continue
        head, paths = covered(model_type, class_name)
        lines += [head, *lines_of(paths)]
        odd += [f"{model_type}: {path}" for path in paths if OF_NO_LANGUAGE_MODEL.search(path)]
    return lines, odd


@pytest.mark.slow
def test_what_is_quantized_is_what_was_read_and_nothing_else_than_a_language_model():
    # In a process of its own: an engine of vLLM replaces classes and configurations of Transformers.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, __file__, "--print"]
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    lines, odd = json.loads(printed.splitlines()[-1])
    assert not odd
    if IS_THAT_VERSION:
        diff = difflib.unified_diff(TABLE.read_text().splitlines(), lines, "as read", "now", lineterm="", n=2)
        assert not (changed := "\n".join(diff)), changed


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(json.dumps(everything()))
    else:
        TABLE.write_text("\n".join(everything()[0]) + "\n")
