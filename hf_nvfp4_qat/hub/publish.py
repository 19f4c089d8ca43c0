"""Publishing: a packed checkpoint and its card, in one commit, or nothing.

Uploads, their retries and what a second attempt need not send again are huggingface_hub's. Files are sent first; the
repository changes when the commit that names them all is made.
"""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_nvfp4_qat.doctor.examine import examine
from hf_nvfp4_qat.formats.files import (
    CARD_FILE,
    CONFIG_FILE,
    HF_QUANT_CONFIG,
    INDEX_FILE,
    SINGLE_FILE,
    files_beside_weights,
    printable,
    read_json_object,
)
from hf_nvfp4_qat.formats.modelopt import ModelOptReader, open_checkpoint
from hf_nvfp4_qat.hub.card import Evaluation, license_of, load_card, model_card

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_NAMING_CODE = (CONFIG_FILE, "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_WEIGHTS = re.compile(r"(model|pytorch_model)[\w.-]*\.(safetensors|bin)(\.index\.json)?")


def publish_checkpoint(
    directory: str | os.PathLike,
    repo_id: str,
    *,
    files: Sequence[str] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    base_model: str | None = None,
    original: str | os.PathLike | None = None,
    evaluation: Evaluation | None = None,
    tags: Sequence[str] = (),
) -> CommitInfo:
    """Publish a packed checkpoint on the Hub with a model card, in one commit.

    Weights that the repository has under other names are deleted in the same commit, so that nothing loads a mixture.

    Args:
        directory: of the checkpoint, in either dialect.
        repo_id: created if missing.
        files: names in `directory` to publish, of a checkpoint that was just written; None examines the checkpoint
            with ``doctor`` and publishes what belongs to one: the weights that are loaded, configs, tokenizer,
            license, and code if a config names some. What is left out is logged.
        private: of a repository that is created.
        revision: branch to commit to; created if missing.
        create_pr: open a pull request instead of committing to the branch.
        token: as everywhere in huggingface_hub.
        commit_message, commit_description: of the commit.
        base_model, original, evaluation, tags: of the card, as for ``model_card``. The license is the base model's.

    Returns:
        What huggingface_hub says of the commit.

    Raises:
        ValueError: the checkpoint has errors, the Hub refuses the token or breaks off, or a card cannot be read.
        HfHubHTTPError: any other trouble with the Hub. The repository is as it was, if it existed.
    """
    directory = Path(directory)
    if files is None:
        _refuse_errors(directory)
        files = _published_files(directory)
    api = HfApi(token=token)
    try:
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        # Whatever can fail here comes before anything is made there.
        card = model_card(
            directory,
            repo_id=repo_id,
            base_model=base_model,
            license=license_of(base_model, token=token) if base_model else None,
            original=original,
            evaluation=evaluation,
            tags=tags,
            existing=_existing_card(api, directory, repo_id, revision),
        )
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        stale = [
            name
            for name in api.list_repo_files(repo_id, revision=revision)
            if name not in files and (_WEIGHTS.fullmatch(name) or name == HF_QUANT_CONFIG)
        ]
        operations = [
            *(CommitOperationAdd(name, directory / name) for name in files if name != CARD_FILE),
            CommitOperationAdd(CARD_FILE, card.content.encode()),
            *(CommitOperationDelete(name) for name in stale),
        ]
        try:
            return api.create_commit(
                repo_id,
                operations=operations,
                commit_message=commit_message or "Upload NVFP4 checkpoint",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
        except RuntimeError as error:  # what huggingface_hub makes of a file that could not be sent
            reason = f"{error} {error.__cause__ or ''}".strip()
            raise ValueError(f"An upload failed ({reason}). Nothing was committed: try again.") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status not in (401, 403):
            raise
        raise ValueError(
            f"The Hub does not let this token write to {repo_id} (HTTP {status}). Log in with `hf auth login`, or set "
            "HF_TOKEN to a token with write access."
        ) from error
    except (HTTPError, LocalEntryNotFoundError) as error:  # of whichever HTTP library this huggingface_hub stands on
        raise ValueError(f"The Hub cannot be reached ({error}). Nothing was committed: try again.") from error


def _refuse_errors(directory: Path) -> None:
    findings = examine(directory).findings
    found = {
        severity: "; ".join(str(finding) for finding in findings if finding.severity == severity)
        for severity in ("error", "warning")
    }
    if found["error"]:
        raise ValueError(
            f"Only good checkpoints are published; {directory} has errors: {found['error']}. See `nvfp4-qat doctor "
            f"{directory}` for what to do."
        )
    if found["warning"]:
        logger.warning("%s is published with what may go wrong in some engine: %s", directory, found["warning"])


def _published_files(directory: Path) -> list[str]:
    """Names of the files that belong to a checkpoint; the others are logged."""
    reader = open_checkpoint(directory)
    weights = set(reader.file_of.values())
    wanted = {CONFIG_FILE, *weights, *([HF_QUANT_CONFIG] if isinstance(reader, ModelOptReader) else [])}
    wanted |= {INDEX_FILE} - ({INDEX_FILE} if SINGLE_FILE in weights else set())
    has_code = any(
        "auto_map" in read_json_object(directory / name) for name in _NAMING_CODE if (directory / name).is_file()
    )
    beside, others = files_beside_weights(directory)
    files = [name for name in beside if has_code or not name.endswith(".py")]
    others += [name for name in beside if name not in files]
    files += [name for name in others if name in wanted]
    others = [printable(name) for name in others if name not in wanted and name != CARD_FILE]
    if others:
        logger.warning("Not published, since loaders of a checkpoint do not need them: %s", ", ".join(others))
    return sorted(files)


def _existing_card(api: HfApi, directory: Path, repo_id: str, revision: str | None) -> ModelCard | None:
    """The repository's, or else the one beside the weights."""
    try:
        return load_card(api.hf_hub_download(repo_id, CARD_FILE, revision=revision))
    except RevisionNotFoundError:
        # The branch will be made of the main one.
        return None if revision is None else _existing_card(api, directory, repo_id, None)
    except LocalEntryNotFoundError:
        raise  # lost connections are not missing cards
    except (EntryNotFoundError, RepositoryNotFoundError):
        path = directory / CARD_FILE
        return load_card(path) if path.is_file() else None


def publish_saved(
    model: "PreTrainedModel", directory: str | os.PathLike, files: Sequence[str], **options: Any
) -> CommitInfo:
    """Publish what a model has just saved; the base model is where it was loaded from, if that is on the Hub.

    Args:
        model: gives tags, and where it comes from.
        directory: where it was saved, whose name is the repository's if no `repo_id` is given.
        files: what was saved.
        options: for ``publish_checkpoint``, and `repo_id`.
    """
    options["repo_id"] = options.get("repo_id") or Path(directory).name
    source = str(getattr(model, "name_or_path", "") or "")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists():
        options.setdefault("base_model", source)
    return publish_checkpoint(
        directory, files=files, tags=[*(model.model_tags or ()), *options.pop("tags", ())], **options
    )
