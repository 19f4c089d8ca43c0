"""What the tests of TRL's trainers share."""

import pytest
from trl_trainers import release_engines, small_qwen3


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A bfloat16 checkpoint of a small Qwen3, with a tokenizer."""
    path = tmp_path_factory.mktemp("small_qwen3")
    small_qwen3(path)
    return path


@pytest.fixture(autouse=True)
def release_all_engines():
    yield
    release_engines()
