"""A teacher in another process gives the logits it would give here, and says what goes wrong there."""

import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_nvfp4_qat.distillation.teacher_process import TeacherProcess, _answer

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


def interrupt(answer):
    raise KeyboardInterrupt  # Ctrl-C while the teacher computes


def test_after_an_interrupt_every_batch_gets_its_own_answer(qwen3_dir, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(qwen3_dir, dtype=torch.bfloat16)
    with TeacherProcess(qwen3_dir) as teacher:
        with monkeypatch.context() as patched:
            patched.setattr(teacher, "_receive", interrupt)
            for number in (1, 2):
                with pytest.raises(KeyboardInterrupt):
                    teacher({"input_ids": IDS + number})
        for number in (3, 4):
            with torch.no_grad():
                expected = model(input_ids=IDS + number).logits
            assert torch.equal(teacher({"input_ids": IDS + number}), expected)


def test_a_ctrl_c_in_the_terminal_does_not_end_the_teacher(qwen3_dir):
    with TeacherProcess(qwen3_dir) as teacher:
        os.kill(teacher._process.pid, signal.SIGINT)
        assert teacher({"input_ids": IDS}).shape == (2, 24, 128)


def test_closing_does_not_wait_for_an_answer_that_nobody_wants(qwen3_dir, monkeypatch):
    teacher = TeacherProcess(qwen3_dir)
    os.kill(teacher._process.pid, signal.SIGSTOP)  # never answers
    monkeypatch.setattr(teacher, "_receive", interrupt)
    with pytest.raises(KeyboardInterrupt), teacher:
        teacher({"input_ids": IDS})
    assert not teacher._process.is_alive()
    with pytest.raises(RuntimeError, match="has ended. Start another"):
        monkeypatch.undo()
        teacher({"input_ids": IDS})


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError, BrokenPipeError])
def test_the_process_ends_without_a_traceback_when_the_trainer_is_gone(error, qwen3_dir, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this is the tests' own process

    class Connection:
        def send(self, answer):
            assert answer == (None, "")

        def recv(self):
            raise error

    _answer(Connection(), str(qwen3_dir), "cpu", {})
