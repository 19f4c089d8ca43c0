"""A teacher in another process gives the logits it would give here, and says what goes wrong there."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_nvfp4_qat.distillation.teacher_process import TeacherProcess

IDS = torch.arange(48).view(2, 24)


def test_its_logits_are_the_models(qwen3_dir):
    with TeacherProcess(qwen3_dir) as teacher:
        found = [teacher({"input_ids": IDS}), teacher({"input_ids": IDS[:1], "attention_mask": torch.ones(1, 24)})]
    model = AutoModelForCausalLM.from_pretrained(qwen3_dir, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    assert torch.equal(found[0], expected) and found[1].shape == (1, 24, 128)


def test_what_goes_wrong_there_is_said_here(qwen3_dir, tmp_path):
    with pytest.raises(ValueError, match="The teacher could not load its model: .*"):
        TeacherProcess(tmp_path / "nothing")
    with TeacherProcess(qwen3_dir) as teacher:
        with pytest.raises(RuntimeError, match="The teacher failed on a batch: IndexError"):
            teacher({"input_ids": IDS + 1000})
        assert teacher({"input_ids": IDS}).shape == (2, 24, 128)  # and goes on
        teacher._process.kill()
        teacher._process.join()
        with pytest.raises(RuntimeError, match="process (has )?ended"):
            teacher({"input_ids": IDS})
