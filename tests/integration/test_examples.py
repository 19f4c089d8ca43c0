"""The examples that the README names run as printed there."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_follow_one_tensor_prints_every_stop():
    command = [sys.executable, str(EXAMPLES / "follow_one_tensor.py")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stops = [
        "load",
        "global scale",
        "forward",
        "backward",
        "optimizer step",
        "pack",
        "save",
        "back: plain",
        "back: training",
    ]
    found = [stop for stop in stops for line in output.splitlines() if line.startswith(f"== {stop}")]
    assert found == stops
    assert "equal to what forward multiplied with: True" in output and "all 36,864 weights keep their values" in output
