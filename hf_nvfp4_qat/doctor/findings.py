"""What may be wrong with a checkpoint, as records: one rule, one place, what was found there, and what to do.

Every check of ``verify_nvfp4`` and of ``doctor`` makes these, so that no check is written twice. `RULES` says once for
each rule how bad it is, what to do and which engines it concerns; a check says where, and what it saw.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hf_nvfp4_qat.formats.files import printable

ENGINES = ("vllm", "sglang", "transformers")
SEVERITIES = ("error", "warning", "note")
"""Loading fails or other weights are served; something is lost, or one engine goes wrong; worth knowing."""

_NUM_NAMED = 3


@dataclass(frozen=True)
class Rule:
    """What all findings of a rule share: how bad they are, what to do, which engines they concern (none: all)."""

    severity: str
    fix: str
    engines: tuple[str, ...] = ()


_AGAIN = "Download or copy it again."
_BY_HAND = "Quantize the original again: `nvfp4-qat quantize ORIGINAL DESTINATION`."
_KEEP_OUT = "Decode it to bfloat16 and add it to `ignore`."

RULES = {
    # Files
    "unreadable-file": Rule("error", _AGAIN),
    "unreadable-tensor": Rule("error", _AGAIN),
    "missing-shard": Rule("error", "Download or copy the whole checkpoint."),
    "path-outside": Rule("error", "Do not trust this checkpoint; take it from its source again."),
    "bad-json": Rule("error", "Take the file from the checkpoint's source again."),
    "index-mismatch": Rule("error", "Write the index anew from the headers of the shards, once all tensors are there."),
    "duplicate-tensor": Rule("error", "Remove the file that is not of this checkpoint."),
    "two-layouts": Rule("error", "Remove the older of the two: model.safetensors, or the index and its shards."),
    "unfinished-repair": Rule("error", "Finish it: only renaming is left."),
    "stray-weights": Rule("warning", "Move it to another directory.", ("vllm",)),
    "unindexed-shard": Rule("note", "Nothing loads it. Remove it if it is left from an earlier save."),
    "partial-files": Rule("note", "Nothing loads them; the next save into the directory removes them."),
    "no-tokenizer": Rule("note", "Save the tokenizer beside the weights: `tokenizer.save_pretrained(PATH)`."),
    # Configuration
    "no-config": Rule("error", "Take config.json from the checkpoint's source again."),
    "no-quantization-config": Rule("error", "Take config.json from the checkpoint's source again."),
    "mixed-precision": Rule("note", "Nothing to do for serving; this package loads and converts NVFP4 alone."),
    "fused-experts": Rule("note", "Nothing to do for serving; this package reads experts that are stored one by one."),
    "nothing-packed": Rule("error", "Remove `quantization_config`, or pack the weights: `nvfp4-qat quantize`."),
    "other-format": Rule("error", "This package reads and checks NVFP4 only."),
    "bad-config": Rule("error", "Take config.json from the checkpoint's source again."),
    "overlapping-targets": Rule("error", "Let the `targets` of each group name its own layers alone."),
    "bad-group": Rule(
        "error",
        "Describe under `config_groups` what is packed: its `targets`, and weights of 4-bit floats in groups of 16.",
    ),
    "dialect-mismatch": Rule("error", "Take config.json from the checkpoint's source again."),
    "status-not-compressed": Rule("error", "Set `quantization_status` to 'compressed'.", ("transformers",)),
    "dtype": Rule("note", "bfloat16 is exact for NVFP4 weights whose global scale is a power of two."),
    "dtype-float32": Rule(
        "warning",
        "Set `dtype` to 'bfloat16', or serve with `--dtype bfloat16`; tensors stored in float32 are rounded by it: "
        "`load_nvfp4(PATH).save_pretrained(DESTINATION)`.",
    ),
    "ignore-mismatch": Rule("error", "Make `ignore` name exactly the linear layers that are not packed."),
    "split-group": Rule("error", "Pack all layers of the group, or none: `nvfp4-qat quantize --exclude`.", ("vllm",)),
    "configs-disagree": Rule("warning", "Make hf_quant_config.json say what config.json says."),
    "missing-input-scale": Rule(
        "error", "Calibrate and save again, or serve weights only: `input_activations` null in `config_groups`."
    ),
    "unused-input-scale": Rule(
        "warning", "Remove the scales, or, if inputs were to be quantized, describe them under `input_activations`."
    ),
    # Tensors
    "missing-parts": Rule("error", f"{_AGAIN} Or: {_BY_HAND}"),
    "both-forms": Rule("error", "Remove the one that is not to be served."),
    "scale-without-codes": Rule("error", f"{_AGAIN} Or: {_BY_HAND}"),
    "wrong-layout": Rule("error", _BY_HAND),
    "missing-expert": Rule("error", f"{_AGAIN} Or: {_BY_HAND}"),
    # Values
    "bad-global-scale": Rule("error", _BY_HAND),
    "bad-input-scale": Rule("error", "Calibrate and save again."),
    "bad-block-scale": Rule("error", _BY_HAND),
    "implausible-scale": Rule("warning", _BY_HAND),
    "zero-block-scale": Rule("warning", _BY_HAND),
    "all-zero": Rule("note", "If it is not meant to be: download or copy it again."),
    "zero-rows": Rule("note", "If they are not meant to be: download or copy it again."),
    "lost-codes": Rule("error", f"{_AGAIN} A copy that did not end leaves zeros."),
    "subnormal-block-scale": Rule(
        "warning", "Move powers of two from the global scale into the block scales.", ("vllm",)
    ),
    "unshared-scale": Rule("error", "Bring the group to one global scale.", ("vllm",)),
    "unshared-input-scale": Rule("warning", "Calibrate with one scale for layers that share their input.", ("vllm",)),
    "bad-cache-scale": Rule("error", "Calibrate the cache again, or serve it in 16 bits: `--kv-cache-dtype auto`."),
    "not-finite": Rule("error", "Take the tensor from the original checkpoint."),
    "other-tools-scale": Rule("note", "Nothing to do for serving; training it again moves its values a little."),
    "negative-zero": Rule("note", "Nothing to do: it decodes to zero."),
    # Layers that do not bear four bits
    "quantized-router": Rule("error", _KEEP_OUT),
    "quantized-lm-head": Rule("error", _KEEP_OUT, ("vllm",)),
    "unquantized-in-vllm": Rule("error", _KEEP_OUT, ("vllm",)),
    "tied-lm-head": Rule(
        "error", "Decide which is meant: set `tie_word_embeddings` to false, or remove the tensors of the head."
    ),
    "another-head": Rule(
        "warning",
        "Set `tie_word_embeddings` to false, under `text_config` too, or remove the tensor of the head.",
    ),
    "quantized-embedding": Rule("error", "Decode it to bfloat16."),
    # Against the architecture
    "missing-tensor": Rule("error", _AGAIN),
    "unknown-tensor": Rule("warning", "Remove it, or check `architectures` in config.json."),
    "skipped-tensor": Rule("note", "Nothing to do: loaders skip it."),
    "wrong-shape": Rule("error", "Check that config.json belongs to these weights."),
    "another-model": Rule("error", "Save this model, or compare with the one that was saved."),
    "not-compared": Rule("note", "Every other check was made."),
    # Engines
    "vllm-name": Rule("error", "Add the entry to `ignore`.", ("vllm",)),
    "plain-loading": Rule(
        "warning", "Load it with `load_nvfp4`, or keep the layer out with `--exclude`.", ("transformers",)
    ),
    "expert-scales": Rule(
        "note",
        "Call `hf_nvfp4_qat.compat.fix_expert_loading()` before `from_pretrained`, or use `load_nvfp4`.",
        ("transformers",),
    ),
    "modelopt-dialect": Rule(
        "note", "`nvfp4-qat convert PATH DESTINATION --to compressed-tensors`.", ("transformers",)
    ),
    "sglang-version": Rule(
        "note", "SGLang 0.5.22 or newer; 0.5.19 after `nvfp4-qat convert PATH DESTINATION --to modelopt`.", ("sglang",)
    ),
    "w4a4-on-hopper": Rule(
        "note", "Serve on Blackwell, or with `--linear-backend emulation`, slowly, to get W4A4's numbers.", ("vllm",)
    ),
    "kernel-padding": Rule("note", "vLLM 0.24 or newer, which pads; older ones refuse these shapes.", ("vllm",)),
    "tensor-parallel": Rule("error", "Use fewer GPUs per replica, or pipeline or expert parallelism.", ("vllm",)),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that is, or may go, wrong.

    Attributes:
        severity: of `SEVERITIES`.
        rule: key of `RULES`.
        where: file, layer or tensor; the first few of several.
        message: what was found there.
        fix: what to do.
        fixable: whether ``repair`` does it, without changing a decoded value.
        engines: those it concerns; empty: all.
        count: how many places it stands for.
    """

    severity: str
    rule: str
    where: str
    message: str
    fix: str
    fixable: bool = False
    engines: tuple[str, ...] = ()
    count: int = 1

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"

    def concerns(self, engine: str | None) -> bool:
        """Whether it matters to somebody who serves with `engine`; None: to anybody."""
        return engine is None or not self.engines or engine in self.engines


def found(rule: str, where: str, message: str, *, fixable: bool = False, severity: str | None = None) -> Finding:
    """A finding of a rule; `severity` where it is not the rule's own."""
    known = RULES[rule]
    return Finding(severity or known.severity, rule, where, message, known.fix, fixable, known.engines)


def fold(findings: Iterable[Finding]) -> list[Finding]:
    """Like findings in one, the worst first: 10,000 experts with one fault are one line.

    Those of a rule whose messages differ only by what stands in them for one place are like.
    """
    alike: dict[tuple, list[Finding]] = {}
    for finding in findings:
        # Without its numbers: "3 block scales are zero" and "5 block scales are zero" are one fault in two layers.
        message = "".join(char for char in finding.message.replace(finding.where, "") if not char.isdigit())
        alike.setdefault((finding.severity, finding.rule, finding.fixable, message), []).append(finding)
    folded = []
    for same in alike.values():
        places = list(dict.fromkeys(finding.where for finding in same))
        names = ", ".join(map(printable, places[:_NUM_NAMED]))
        more = f" and {len(places) - _NUM_NAMED} more" if len(places) > _NUM_NAMED else ""
        folded.append(replace(same[0], where=names + more, message=printable(same[0].message), count=len(same)))
    return sorted(folded, key=lambda finding: SEVERITIES.index(finding.severity))


@dataclass(frozen=True)
class Diagnosis:
    """What ``examine`` or ``verify_nvfp4`` found.

    Attributes:
        path: the directory that was read.
        dialect: "compressed-tensors" or "modelopt"; None if nothing in it is packed.
        engine: the one asked about; None: all.
        num_layers: packed layers.
        num_tensors: tensors in the files that can be read.
        findings: of ``examine`` the worst first, and like ones are one.
        num_compared: tensors that equal the model's, if one was given.
    """

    path: Path
    dialect: str | None
    engine: str | None
    num_layers: int
    num_tensors: int
    findings: tuple[Finding, ...]
    num_compared: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing goes wrong: notes at most."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """What is worse than a note, a line each."""
        return [str(finding) for finding in self.findings if finding.severity != "note"]

    @property
    def notes(self) -> list[str]:
        """What is unusual but loads right, a line each."""
        return [str(finding) for finding in self.findings if finding.severity == "note"]

    def as_json(self) -> dict[str, Any]:
        """Plain data, for `--json`; keys are added in later versions, never renamed."""
        return {
            "path": printable(str(self.path)),
            "dialect": self.dialect,
            "engine": self.engine,
            "num_layers": self.num_layers,
            "num_tensors": self.num_tensors,
            "ok": self.ok,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        head = f"{self.path}: {self.num_layers} packed layers, {self.num_tensors} tensors"
        compared = f", {self.num_compared} tensors equal to the model's" if self.num_compared else ""
        findings = fold(self.findings)
        counts = {severity: sum(finding.severity == severity for finding in findings) for severity in SEVERITIES}
        counted = ", ".join(f"{number} {name}{'s' * (number > 1)}" for name, number in counts.items() if number)
        verdict = "good" if self.ok else "not good"
        lines = [printable(f"{head}: {verdict}{f' ({counted})' if counted else ''}{compared}")]
        for finding in findings:
            of = f" [{', '.join(finding.engines)}]" if finding.engines else ""
            lines.append(f"  {finding.severity}: {finding.rule}{of}: {finding}")
            lines.append(f"    {'`--fix` does this: ' if finding.fixable else ''}{finding.fix}")
        return "\n".join(lines)
