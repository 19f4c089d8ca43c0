"""What every benchmark here does with its numbers: a table on the screen, the same in RESULTS.md, a plot if asked."""

import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "RESULTS.md"


def machine() -> str:
    """GPU, or processor and threads, and the versions that matter."""
    if torch.cuda.is_available():
        import triton

        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def record(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, notes: str = "") -> None:
    """Print a markdown table and append it to RESULTS.md, with machine, versions, date and command."""
    command = shlex.join(["python", f"examples/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    made = f"{machine()}, Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}, `{command}`."
    lines = [
        f"\n### {title}\n",
        f"{made} {notes}\n" if notes else f"{made}\n",
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    table = "\n".join(lines) + "\n"
    print(table)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(table)


def plot_bars(path: str, title: str, unit: str, labels: Sequence[str], groups: dict[str, Sequence[float]]) -> None:
    """Bars side by side: one group of bars a label, one colour a key of `groups`, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(1.2 * len(labels) * max(1, len(groups) / 3) + 2, 4))
    width = 0.8 / len(groups)
    for number, (name, values) in enumerate(groups.items()):
        axes.bar([index + number * width for index in range(len(labels))], values, width, label=name)
    axes.set_xticks([index + 0.4 - width / 2 for index in range(len(labels))], labels, fontsize=8)
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")
