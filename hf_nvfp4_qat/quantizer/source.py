"""What `from_pretrained` would do without a word with the files it loads: take codes for weights, leave weights out."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from hf_nvfp4_qat.checkpoint.load import check_holds_no_codes
from hf_nvfp4_qat.formats.files import CheckpointReader, tensor_names

logger = logging.getLogger(__name__)


def check_source(model: PreTrainedModel, checkpoint_files: Sequence[str]) -> None:
    """Look at the headers of the safetensors files that a model is about to be loaded from.

    Transformers reports tensors that a model has no place for, but not those that its class names as left out, such as
    the layers of multi-token prediction: a save does not write them, so that is said here.

    Args:
        model: that is loaded.
        checkpoint_files: paths; files in other formats are not looked at.

    Raises:
        ValueError: they hold codes, whose numbers are no weights.
    """
    left_out: list[str] = []
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for file in map(Path, checkpoint_files):
        if file.suffix == ".safetensors":
            reader = CheckpointReader(file.parent, dict.fromkeys(tensor_names(file), file.name))
            check_holds_no_codes(reader)
            names = [name for name in reader.names if name.endswith(".weight") and len(reader.layout(name)[1]) > 1]
            left_out += [name for name in names if any(pattern.search(name) for pattern in ignored)]
    if left_out:
        logger.warning(
            "%s has no place for %d matrices of the checkpoint, the first %s: they do not train, and a save does not "
            "write them. `nvfp4-qat quantize` keeps them as they are.",
            type(model).__name__,
            len(left_out),
            left_out[0],
        )
