"""Which linears must share one global scale, because vLLM fuses them into one matrix.

vLLM keeps one global scale per fused matrix: where the parts differ it takes one of them, warns, and decodes the
other parts wrong by the ratio. So the parts share a scale in training, in the file and on the wire.
"""

from hf_nvfp4_qat.selection.layer_names import FUSED_GROUPS

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
