"""The model card counts what is in the files."""

from conftest import load_qat

from hf_nvfp4_qat import save_nvfp4
from hf_nvfp4_qat.checkpoint.card import model_card


def test_all_parameters_are_counted_biases_of_packed_layers_too(llama_dir, tmp_path):
    model = load_qat(llama_dir)
    save_nvfp4(model, tmp_path)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"14 layers, 73,728 of {total:,} parameters" in model_card(tmp_path).text
