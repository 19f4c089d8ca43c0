"""The NVFP4 gather through Accelerate and Trainer, in two processes, against fake quantization in forward."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from conftest import tiny_moe, tiny_qwen3, tokens
from processes import ProcessFailed, in_processes
from sharding import ExactSums, exact_sums, fsdp_on_cpus, largest_difference, shared_folder, spread
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.module import _global_forward_pre_hooks
from transformers import Trainer, TrainingArguments

from hf_nvfp4_qat import (
    NVFP4FSDPCallback,
    NVFP4FSDPPlugin,
    NVFP4QATConfig,
    prepare_qat,
    refresh_global_scales,
    save_nvfp4,
    verify_nvfp4,
)
from hf_nvfp4_qat.distributed.gather_mode import gather_mode
from hf_nvfp4_qat.distributed.packed_gather import gathers_packed
from hf_nvfp4_qat.modules.swap import qat_modules


def test_a_model_that_never_runs_leaves_no_hook_behind():
    before = list(_global_forward_pre_hooks)
    model = prepare_qat(tiny_qwen3())
    NVFP4FSDPPlugin(fsdp_version=2, cpu_ram_efficient_loading=False).set_auto_wrap_policy(model)
    assert len(_global_forward_pre_hooks) == len(before) + 1
    del model
    assert list(_global_forward_pre_hooks) == before


def test_measured_inputs_and_efficient_loading_are_refused_together():
    model = prepare_qat(tiny_qwen3(), NVFP4QATConfig(activations="nvfp4"))
    plugin = NVFP4FSDPPlugin(fsdp_version=2, cpu_ram_efficient_loading=True)
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: false"):
        plugin.set_auto_wrap_policy(model)
    NVFP4FSDPPlugin(fsdp_version=2, cpu_ram_efficient_loading=False).set_auto_wrap_policy(model)


def test_any_persistent_buffer_is_refused_with_efficient_loading_and_a_model_without_is_not(monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # Accelerate sets it, for Transformers
    plugin = NVFP4FSDPPlugin(fsdp_version=2, cpu_ram_efficient_loading=True)
    plugin.set_auto_wrap_policy(prepare_qat(tiny_qwen3()))
    message = "Glm4MoeForCausalLM has 1 of these, the first model.layers.1.mlp.gate.e_score_correction_bias"
    with_bias = prepare_qat(tiny_moe("glm4_moe"))
    with pytest.raises(ValueError, match=message):
        plugin.set_auto_wrap_policy(with_bias)
    plugin.fsdp_version = 1  # which broadcasts the module's own buffers
    plugin.set_auto_wrap_policy(with_bias)
    with pytest.raises(ValueError, match="has 14 of these, the first model.layers.0.self_attn.q_proj.input_amax"):
        plugin.set_auto_wrap_policy(prepare_qat(tiny_qwen3(), NVFP4QATConfig(activations="nvfp4")))


def prepared(rank: int, plugin: FullyShardedDataParallelPlugin, *, tied: bool = True, spoil: bool = False):
    model = spread(tiny_qwen3(tie_word_embeddings=tied)).train()
    if spoil and rank:
        with torch.no_grad():  # what a process has whose weights come from rank 0
            for parameter in model.parameters():
                parameter.zero_()
    model = prepare_qat(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", fsdp_plugin=plugin)
    model, optimizer = accelerator.prepare(model, optimizer)
    exact_sums(model)
    return accelerator, model, optimizer


def steps(accelerator, model, optimizer, rank: int, first: int = 0, num: int = 3) -> list[float]:
    losses = []
    for step in range(first, first + num):
        batch = (tokens() + 7 * rank + step) % 128
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plugin(cls=NVFP4FSDPPlugin, **options):
    """TRL's fsdp2.yaml, with the options given."""
    return cls(**{
        "fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": True, **options,
    })  # fmt: skip


def _accelerate(rank: int) -> dict:
    found = {}
    for name, tied, options in (
        ("as TRL ships it", True, {}),
        ("untied", False, {}),
        ("weights on every process", True, {"cpu_ram_efficient_loading": False}),
        ("activation checkpointing", True, {"activation_checkpointing": True}),
        ("kept whole", True, {"reshard_after_forward": False}),
    ):
        runs = []
        for cls in (FullyShardedDataParallelPlugin, NVFP4FSDPPlugin):
            with fsdp_on_cpus():
                spoil = options.get("cpu_ram_efficient_loading", True)
                accelerator, model, optimizer = prepared(rank, plugin(cls, **options), tied=tied, spoil=spoil)
                with torch.no_grad():
                    model(input_ids=tokens())
                scales = [layer.global_decode_scale.clone() for layer in qat_modules(model).values()]
                refresh_global_scales(model)
                fresh = scales == [layer.global_decode_scale for layer in qat_modules(model).values()]
                losses = steps(accelerator, model, optimizer, rank)
                runs.append((losses, list(model.parameters()), gathers_packed(model), fresh))
        (losses, masters, _, fresh), (packed_losses, packed_masters, is_packed, packed_fresh) = runs
        same = losses == packed_losses and fresh and packed_fresh
        found[name] = (same, largest_difference(masters, packed_masters), is_packed)
    return found


@pytest.mark.slow
def test_accelerate_trains_the_same_weights_with_the_plugin_as_without():
    for found in in_processes(_accelerate):
        assert found == dict.fromkeys(found, (True, 0.0, True))


def _states(rank: int) -> dict:
    """Saved and loaded in the middle of a run, in both of Accelerate's formats."""
    found = {}
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        with fsdp_on_cpus():
            accelerator, model, optimizer = prepared(rank, plugin(state_dict_type=kind), spoil=True)
            steps(accelerator, model, optimizer, rank, num=2)
            folder = shared_folder()
            accelerator.save_state(folder)
            expected = steps(accelerator, model, optimizer, rank, first=2)
            accelerator.load_state(folder)
            found[kind] = (steps(accelerator, model, optimizer, rank, first=2) == expected, gathers_packed(model))
    return found


@pytest.mark.slow
def test_accelerates_states_resume_exactly():
    for found in in_processes(_states):
        assert found == dict.fromkeys(("FULL_STATE_DICT", "SHARDED_STATE_DICT"), (True, True))


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        ids = torch.randint(0, 128, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def train(folder: str, gather: str, kind: str, resume: str | None = None) -> Trainer:
    with fsdp_on_cpus():
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=True, bf16=True, per_device_train_batch_size=2, max_steps=4, save_steps=2,
            report_to=[], seed=0, learning_rate=1e-2, disable_tqdm=True, fsdp=True,
            fsdp_config={"version": 2, "state_dict_type": kind, "cpu_ram_efficient_loading": False},
        )  # fmt: skip
        model = prepare_qat(spread(tiny_qwen3()).train())
        trainer = Trainer(model=model, args=arguments, train_dataset=Data(), callbacks=[ExactSums(gather)])
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def _trainer(rank: int) -> dict:
    found = {}
    folder = shared_folder()
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        plain = train(f"{folder}/plain-{kind}", "bf16", kind)
        packed = train(f"{folder}/packed-{kind}", "packed", kind)
        resumed = train(f"{folder}/resumed-{kind}", "packed", kind, resume=f"{folder}/packed-{kind}/checkpoint-2")
        found[kind] = (
            gathers_packed(packed.model), gathers_packed(plain.model),
            largest_difference(plain.model.parameters(), packed.model.parameters()),
            largest_difference(resumed.model.parameters(), packed.model.parameters()),
        )  # fmt: skip
        if kind == "FULL_STATE_DICT":
            packed.save_model(f"{folder}/final")
            dist.barrier()
            report = verify_nvfp4(f"{folder}/final", packed.model)
            found["saved"] = (report.ok, report.num_layers, report.num_compared, str(report))
    return found


@pytest.mark.slow
def test_trainer_trains_resumes_and_saves_what_it_trained():
    for found in in_processes(_trainer):
        saved = found.pop("saved")
        assert found == dict.fromkeys(found, (True, False, 0.0, 0.0))
        assert saved[:2] == (True, 14) and saved[2] > 14 * 3, saved[3]


def _save(rank: int) -> dict:
    """All processes save together; then the first fails in the middle, then one is killed."""
    found = {}
    folder = shared_folder()
    with fsdp_on_cpus():
        accelerator, model, optimizer = prepared(rank, plugin(), spoil=True)
        steps(accelerator, model, optimizer, rank)
    model.save_pretrained(f"{folder}/together", max_shard_size="20KB")
    report = verify_nvfp4(f"{folder}/together", model)
    found["together"] = (report.ok, report.num_layers, report.num_compared > 40)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in Path(f"{folder}/together").iterdir())

    def fail(num_done: int, total: int) -> None:
        if num_done == 5:
            raise OSError("disk full")

    try:
        save_nvfp4(model, f"{folder}/together", progress=fail)
    except (OSError, RuntimeError) as error:
        found["failed"] = str(error)
    dist.barrier()
    after = sorted((path.name, path.stat().st_mtime_ns) for path in Path(f"{folder}/together").iterdir())
    found["untouched"] = before == after
    with torch.no_grad():
        for layer in qat_modules(model).values():
            layer.weight.fill_(float("inf"))
    try:
        save_nvfp4(model, f"{folder}/infinite")
    except (ValueError, RuntimeError) as error:
        found["infinite"] = str(error)
    found["nothing"] = not Path(f"{folder}/infinite/config.json").exists()
    return found


@pytest.mark.slow
def test_processes_save_together_and_fail_together():
    first, second = in_processes(_save)
    for found in (first, second):
        assert found["together"] == (True, 14, True) and found["untouched"] and found["nothing"]
        assert "cannot be packed" in found["infinite"]
    assert first["failed"] == "disk full" and "It is process 0: OSError: disk full" in second["failed"]


def _masters(rank: int) -> dict:
    """In the folder a Trainer resumes from, and in any by `save_format`; tied weights too."""
    found = {}
    folder = Path(shared_folder())
    for name, tied, save_format in (
        ("checkpoint-5", False, "auto"),
        ("checkpoint-6", True, "auto"),
        ("anywhere", True, "master"),
    ):
        model = prepare_qat(spread(tiny_qwen3(tie_word_embeddings=tied)), NVFP4QATConfig(save_format=save_format))
        if rank == 0:
            model.save_pretrained(folder / "whole" / name)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        with torch.no_grad():
            model(input_ids=tokens())  # leaves the root's weights gathered
        model.save_pretrained(folder / name, is_main_process=rank == 0)
        whole, gathered = (
            {path.name: path.read_bytes() for path in path.iterdir()}
            for path in (folder / "whole" / name, folder / name)
        )
        found[name] = {file for file in {*whole, *gathered} if whole.get(file) != gathered.get(file)}
    try:
        (folder / "file").touch()
        model.save_pretrained(folder / "file" / "checkpoint-7")
    except (OSError, RuntimeError) as error:
        found["failed"] = type(error).__name__
    return found


@pytest.mark.slow
def test_master_weights_of_a_sharded_model_are_gathered_and_written_once():
    first, second = in_processes(_masters)
    assert (first.pop("failed"), second.pop("failed")) == ("NotADirectoryError", "RuntimeError")
    assert first == second == dict.fromkeys(("checkpoint-5", "checkpoint-6", "anywhere"), set())


def _die(rank: int) -> None:
    model = spread(tiny_qwen3())
    folder = Path(os.environ["FOLDER_OF_TEST"])
    if rank == 0:
        prepare_qat(model).save_pretrained(folder)
    dist.barrier()
    model = prepare_qat(spread(tiny_qwen3(num_hidden_layers=4)))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)

    def die(num_done: int, total: int) -> None:
        if num_done == 10:
            os._exit(1)

    save_nvfp4(model, folder, max_shard_size="20KB", progress=die)


@pytest.mark.slow
def test_a_killed_process_leaves_the_older_checkpoint_and_nothing_that_loads_beside_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FOLDER_OF_TEST", str(tmp_path))
    with pytest.raises(ProcessFailed, match="is gone|Connection"):
        in_processes(_die)
    left_over = [path.name for path in tmp_path.iterdir() if path.name.endswith(".nvfp4-partial")]
    report = verify_nvfp4(tmp_path, prepare_qat(spread(tiny_qwen3())))
    assert report.ok and report.num_layers == 14, str(report)
    assert left_over and not list(tmp_path.glob("*-of-*.safetensors"))


def test_the_mode_comes_from_the_argument_then_the_environment(monkeypatch):
    monkeypatch.delenv("NVFP4_QAT_GATHER", raising=False)
    assert gather_mode(None) == "auto" and gather_mode("bf16") == "bf16"
    monkeypatch.setenv("NVFP4_QAT_GATHER", "packed")
    assert gather_mode(None) == "packed" and gather_mode("bf16") == "bf16"
    monkeypatch.setenv("NVFP4_QAT_GATHER", "fp4")
    with pytest.raises(ValueError, match="'fp4'"):
        NVFP4FSDPCallback()


def test_fsdp1_is_refused_if_the_gather_is_asked_for(monkeypatch):
    monkeypatch.delenv("NVFP4_QAT_GATHER", raising=False)
    with pytest.raises(ValueError, match="fsdp_version is 1"):
        NVFP4FSDPPlugin(fsdp_version=1, nvfp4_gather="packed")
    assert NVFP4FSDPPlugin(fsdp_version=1).nvfp4_gather == "auto"


def test_without_fsdp_the_callback_says_so_and_training_goes_on(tmp_path, caplog):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1, report_to=[], save_strategy="no")
    trainer = Trainer(prepare_qat(tiny_qwen3()), arguments, train_dataset=Data(), callbacks=[NVFP4FSDPCallback("auto")])
    with caplog.at_level("WARNING", logger="hf_nvfp4_qat"):
        trainer.train()
    assert "gathered whole" in caplog.text and "fully_shard" in caplog.text
    trainer = Trainer(
        prepare_qat(tiny_qwen3()), arguments, train_dataset=Data(), callbacks=[NVFP4FSDPCallback("packed")]
    )
    with pytest.raises(ValueError, match="sharded by FSDP2"):
        trainer.train()
