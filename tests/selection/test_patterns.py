"""Which layers a pattern names: three meanings, one file."""

import pytest

from hf_nvfp4_qat.selection.patterns import excluded_in_modelopt, excludes, names_matching, patterns_without_match


@pytest.mark.parametrize(
    "pattern, path, expected",
    [
        ("model.layers.1", "model.layers.1", True),
        ("model.layers.1", "model.layers.10", False),  # a prefix is no match
        ("mlp.gate", "model.layers.1.mlp.gate", True),
        ("mlp.gate", "model.layers.1.mlp.gate_proj", False),
        ("gate_proj", "model.layers.1.mlp.gate_proj", True),
        ("proj", "model.layers.1.mlp.gate_proj", False),  # components are matched whole
        (r"re:.*\.1\.mlp", "model.layers.1.mlp.gate_proj", True),
        (r"re:.*\.1\.mlp$", "model.layers.1.mlp.gate_proj", False),
        ("re:mlp", "model.layers.1.mlp", False),  # from the start, as in vLLM
    ],
)
def test_exclude_patterns(pattern, path, expected):
    assert excludes(pattern, path) is expected


def test_an_ignored_name_is_whole_and_an_expression_matches_from_its_start():
    names = ["lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj"]
    patterns = ["model.layers.0.mlp.gate", "re:.*head$", "mlp.gate", "re:gate"]
    assert names_matching(names, patterns) == {"lm_head", "model.layers.0.mlp.gate"}
    assert patterns_without_match(names, patterns) == ["mlp.gate", "re:gate"]


def test_patterns_that_would_match_for_ever_are_stopped():
    with pytest.raises(ValueError, match="must match in 0.01 seconds"):
        names_matching(["a" * 400 + "!"], ["re:(a|aa)+$"], seconds=0.01)


@pytest.mark.parametrize("expression", ["(", r"\p{L}", "(" * 5000 + ")" * 5000, "a{99999999999999}"])
def test_what_is_no_expression_in_python_is_refused(expression):
    with pytest.raises(ValueError, match="must hold regular expressions after 're:'; Python says: .+. Mend it."):
        names_matching(["a"], [f"re:{expression}"])


@pytest.mark.parametrize(
    ("entry", "expected"),
    [("lm_head", True), ("layers.0", True), ("*.mlp.*", True), ("*mlp", False), ("re:.*mlp.*", False), ("MLP", False)],
)
def test_an_excluded_module_of_modelopt_is_a_wildcard_or_a_part_of_a_name(entry, expected):
    assert excluded_in_modelopt(entry, "model.layers.0.mlp.lm_head.up") is expected
