"""Which layers stay in high precision whatever the recipe says: what is no language model, and what chooses or answers.

Structure decides, so that architectures nobody has seen yet are read like those that are known:

- what lies outside the language model of a model: towers, projectors, codecs, talkers, vocoders, heads;
- what a forward makes a choice with: routers of experts, and the indexers that select tokens;
- output embeddings;
- what vLLM builds without a quantization config, so that the packed form has no place to go.

Names decide where no structure can be seen: in checkpoints, in modules that are not of Transformers, and for layers of
another modality in the middle of a language model. They stand in one table, ``layer_names.KEPT_OUT``.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import accumulate

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_nvfp4_qat.selection.layer_names import (
    CHOOSES_OR_ANSWERS,
    KEPT_OUT,
    OUTPUT_EMBEDDING,
    ROUTER,
    TOKEN_SELECTOR,
    UNQUANTIZED_IN_VLLM,
)

OUTSIDE = "outside the language model"

_CHOOSING_CLASS = re.compile(r"(?P<router>Router|TopKGating)$|(?P<selector>Indexer)")
"""Class names in Transformers of routers, and of what selects tokens."""


def reason_by_name(name: str) -> str | None:
    """Why a layer of this name stays in high precision whatever its model is: "router", "output embedding", ...

    Args:
        name: dotted path, of a module or of its checkpoint name.
    """
    return _first_fit(name, KEPT_OUT)


def _first_fit(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    parts = name.split(".")
    return next((reason for pattern, reason in table if any(re.fullmatch(pattern, part) for part in parts)), None)


def reasons_by_rule(model: nn.Module, linears: Iterable[str], experts: Iterable[str]) -> dict[str, str]:
    """Layers that stay in high precision, and why.

    A model of which nothing would be left is taken as a whole, but for what chooses or answers: a vision tower that is
    trained by itself, or a model of Mamba mixers alone.

    Args:
        model: any module; its parameters may be on the meta device.
        linears: paths of its linears.
        experts: paths of its fused experts.
    """
    linears, experts = list(linears), list(experts)
    chosen = dict(_embedding_shaped(model, linears)) | dict(_choosing(model, linears, experts))
    chosen |= {name: reason for name in linears if (reason := _first_fit(name, CHOOSES_OR_ANSWERS))}
    others = {name: reason for name in (*linears, *experts) if (reason := reason_by_name(name))}
    others |= dict.fromkeys(in_mamba_1(model, linears), UNQUANTIZED_IN_VLLM)
    others |= dict.fromkeys(_outside(model, [*linears, *experts]), OUTSIDE)
    return others | chosen if {*linears, *experts} - others.keys() - chosen.keys() else chosen


def bare_routers(model: nn.Module) -> dict[str, str]:
    """Routers that are no nn.Linear here are linears in vLLM, so they count as excluded all the same."""
    return {
        name: ROUTER
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear)
        and reason_by_name(name) == ROUTER
        and any(p.ndim == 2 for p in module.parameters(recurse=False))
    }


def _embedding_shaped(model: nn.Module, linears: list[str]) -> Iterator[tuple[str, str]]:
    """Linears outside of every stack of layers that have the shape of an embedding: one output a token."""
    shapes = {module.weight.shape for module in model.modules() if isinstance(module, nn.Embedding)}
    for name in linears:
        linear = model.get_submodule(name)
        is_in_a_stack = any(part.isdigit() for part in name.split("."))
        if isinstance(linear, nn.Linear) and linear.weight.shape in shapes and not is_in_a_stack:
            yield name, OUTPUT_EMBEDDING


def _choosing(model: nn.Module, linears: list[str], experts: list[str]) -> Iterator[tuple[str, str]]:
    """Linears of routers and token selectors: by the class they are in, or by having an output for each expert."""
    num_experts: dict[str, int] = {}  # by the path of what owns them
    for name in experts:
        sizes = {p.shape[0] for p in model.get_submodule(name).parameters(recurse=False) if p.ndim == 3}
        num_experts[name.rpartition(".")[0]] = max(sizes)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and "expert" in name.rpartition(".")[2]:
            num_experts[name.rpartition(".")[0]] = len(module)
    for name in linears:
        owner = name.rpartition(".")[0]
        if model.get_submodule(name).out_features == num_experts.get(owner):
            yield name, ROUTER
        for path in accumulate(owner.split("."), "{}.{}".format):  # `a`, `a.b` and `a.b.c` of `a.b.c`
            if found := _CHOOSING_CLASS.search(type(model.get_submodule(path)).__name__):
                yield name, ROUTER if found["router"] else TOKEN_SELECTOR


def in_mamba_1(model: nn.Module, linears: Iterable[str]) -> list[str]:
    """Linears of the mixers of Mamba's first version, all of which vLLM builds unquantized.

    The decay of such a mixer is a matrix ``[channels, states]``; that of Mamba 2 and of gated delta nets has one number
    a head.
    """
    decays = {name: getattr(model.get_submodule(name.rpartition(".")[0]), "A_log", None) for name in linears}
    return [name for name, decay in decays.items() if decay is not None and decay.ndim == 2]


def _outside(model: nn.Module, names: list[str]) -> list[str]:
    """Those of `names` that lie in a model of Transformers, but not in its language model, nor share its weights."""
    known: set[int] = set()
    inside: set[int] = set()
    for pretrained in _outermost_models(model):
        known |= {id(module) for module in pretrained.modules()}
        for part in language_models(pretrained):
            inside |= {id(module) for module in part.modules()}
            inside -= {id(module) for other in _other_parts(part) for module in other.modules()}
    # DiffusionGemma's encoder has the weights of its decoder.
    modules = [module for module in model.modules() if id(module) in inside]
    shared = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
    outside = known - inside
    return [
        name
        for name in names
        if id(layer := model.get_submodule(name)) in outside
        and not any(id(parameter) in shared for parameter in layer.parameters(recurse=False))
    ]


def _outermost_models(module: nn.Module) -> list[PreTrainedModel]:
    """The models of Transformers in `module`, itself among them, that are in no other."""
    return [module] if isinstance(module, PreTrainedModel) else _models_below(module)


def _models_below(module: nn.Module) -> list[PreTrainedModel]:
    return [model for child in module.children() for model in _outermost_models(child)]


def language_models(model: PreTrainedModel) -> list[nn.Module]:
    """The parts of a model that hold its language model: its body, its decoder, or both its halves.

    Args:
        model: any model of Transformers. One without text is taken like one whose text is its only input.
    """
    config = model.config
    decoder, encoder = _proper_part(model, model.get_decoder()), None
    if config.is_encoder_decoder:
        encoder = _proper_part(model, model.get_encoder())
    if decoder is not None and encoder is not None:
        parts = [encoder, decoder] if model.main_input_name == "input_ids" else [decoder]
    elif not any(isinstance(value, PreTrainedConfig) for value in vars(config).values()):
        return [model.base_model]  # all but heads
    elif decoder is not None:
        parts = [decoder]
    else:
        parts = _text_models(model)
    found = [p for part in parts for p in (language_models(part) if isinstance(part, PreTrainedModel) else [part])]
    return found or [model]


def _proper_part(model: nn.Module, part: nn.Module) -> nn.Module | None:
    """`part` if it is a part of `model`, and not all of it."""
    return part if part is not model and any(module is part for module in model.modules()) else None


def _text_models(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models in `model` that have its text config; if it is made of models alone, those that read tokens."""
    text_config = type(model.config.get_text_config(decoder=True))
    below = [module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model]
    if found := [module for module in below if type(module.config) is text_config]:
        return found
    outermost = _models_below(model)
    covered = {id(module) for other in outermost for module in other.modules()}
    if any(isinstance(module, nn.Linear) and id(module) not in covered for module in model.modules()):
        return []
    return [other for other in outermost if other.main_input_name == "input_ids" and "text" in other.input_modalities]


def _other_parts(part: nn.Module) -> Iterator[nn.Module]:
    """What in a language model belongs to another model, such as a tower that sits beside the layers.

    Whatever holds that model alone goes with it: of Phi-4-multimodal `embed_tokens_extend`, with its projections.
    """
    for path, module in part.named_modules() if isinstance(part, PreTrainedModel) else ():
        if isinstance(module, PreTrainedModel) and type(module.config) is not type(part.config):
            is_in_a_layer = any(component.isdigit() for component in path.split("."))
            yield module if is_in_a_layer else part.get_submodule(path.split(".")[0])
