"""Which layers a pattern names, in the three meanings that there are.

- ``excludes``: `exclude` of ``NVFP4QATConfig``, written by the user. The last components of a path are enough.
- ``names_matching``: `ignore` and `targets` of compressed-tensors, as that library and vLLM read them. Only the whole
  name counts. The list may be a stranger's, so there is a time limit.
- ``excluded_in_modelopt``: excluded modules of ModelOpt, as vLLM and SGLang read them. Any part of the name is enough,
  and ``*`` is a wildcard.
"""

import re
import time
from collections.abc import Iterable
from fnmatch import fnmatch

import regex

_SECONDS = 10.0


def excludes(pattern: str, path: str) -> bool:
    """Whether a pattern of `exclude` names a module.

    Args:
        pattern: ``re:`` and a regular expression matched from the start of the path (as vLLM and
            compressed-tensors do), or an exact path, or its last components: ``gate_proj``, ``mlp.gate_proj``.
        path: dotted path, ``model.layers.1.mlp.gate_proj``.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], path) is not None
    return path == pattern or path.endswith(f".{pattern}")


def excluded_in_modelopt(entry: str, layer: str) -> bool:
    """Whether an excluded module of ModelOpt's leaves `layer` unquantized: as a wildcard, or as a part of its name."""
    return fnmatch(layer, entry) or entry in layer


def names_matching(names: Iterable[str], patterns: Iterable[str], *, seconds: float = _SECONDS) -> set[str]:
    """Those of `names` that any of `patterns` names, as compressed-tensors and vLLM decide it.

    A plain entry is a whole name, and ``re:`` comes before what matches from a name's beginning.

    Args:
        names: dotted paths.
        patterns: entries of an `ignore` list.
        seconds: for all regular expressions together; some take longer than the universe.

    Raises:
        ValueError: a pattern is no string or no regular expression, or they take too long.
    """
    names, patterns = list(names), list(patterns)
    if odd := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise ValueError(f"`ignore` lists strings; it has a {type(odd[0]).__name__}. Take it out.")
    found = set(names).intersection(patterns)
    end = time.monotonic() + seconds
    try:
        for expression in sorted({pattern[3:] for pattern in patterns if pattern.startswith("re:")}):
            re.compile(expression)  # ``regex`` knows more expressions than Python, which engines ask
            compiled = regex.compile(expression)
            for name in names:
                if name not in found and compiled.match(name, timeout=max(end - time.monotonic(), 1e-3)):
                    found.add(name)
    except TimeoutError:
        raise ValueError(
            f"The regular expressions in `ignore` must match in {seconds:g} seconds; they take longer. Name the layers "
            "instead."
        ) from None
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"`ignore` must hold regular expressions after 're:'; Python says: {error}. Mend it."
        ) from None
    return found


def patterns_without_match(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Those of `patterns` that name none of `names`; arguments and errors as for ``names_matching``."""
    names = set(names)
    return [
        pattern
        for pattern in patterns
        if not (names_matching(names, [pattern]) if pattern.startswith("re:") else pattern in names)
    ]
