"""Which names the entries of an `ignore` list stand for, where the list may be a stranger's.

A regular expression can take longer than the universe to match. So those run in a process of their own, which is
stopped when its time is up; Python's matcher cannot be stopped in any other way.
"""

import json
import subprocess
import sys
from collections.abc import Iterable

_SECONDS = 10.0
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
compiled = [re.compile(pattern) for pattern in patterns]
json.dump([name for name in names if any(pattern.match(name) for pattern in compiled)], sys.stdout)
"""


def names_matching(names: Iterable[str], patterns: Iterable[str], *, seconds: float = _SECONDS) -> set[str]:
    """Those of `names` that any of `patterns` names, as compressed-tensors and vLLM decide it.

    A plain entry is a whole name, and ``re:`` comes before what matches from a name's beginning. (`exclude` is more
    lenient: there, the last parts of a name do.)

    Args:
        names: dotted paths.
        patterns: entries of an `ignore` list.
        seconds: for all regular expressions together.

    Raises:
        ValueError: a pattern is no string or no regular expression, or they take too long.
    """
    names, patterns = list(names), list(patterns)
    if odd := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise ValueError(f"`ignore` lists strings; it has a {type(odd[0]).__name__}. Take it out.")
    found = set(names).intersection(patterns)
    expressions = sorted({pattern[3:] for pattern in patterns if pattern.startswith("re:")})
    if not expressions or not names:
        return found
    try:
        process = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([expressions, names]),
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"The regular expressions in `ignore` must match in {seconds:g} seconds; they take longer. Name the layers "
            "instead."
        ) from None
    if process.returncode != 0:
        reason = process.stderr.strip()[-200:]
        raise ValueError(f"`ignore` must hold regular expressions after 're:'; Python says: {reason}. Mend it.")
    return found | set(json.loads(process.stdout))


def patterns_without_match(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Those of `patterns` that name none of `names`; arguments and errors as for ``names_matching``."""
    names = set(names)
    return [
        pattern
        for pattern in patterns
        if not (names_matching(names, [pattern]) if pattern.startswith("re:") else pattern in names)
    ]
