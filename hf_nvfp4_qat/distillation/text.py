"""Text files as token sequences of one length."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_nvfp4_qat.formats.files import TOKENIZERS

SUFFIXES = (".txt", ".md", ".jsonl")


def read_documents(paths: Sequence[Path]) -> list[str]:
    """The documents in files and folders: a ``.txt`` or ``.md`` file is one, a line of ``.jsonl`` is one (its "text").

    Raises:
        ValueError: a file of another kind or encoding, a line without text, or nothing at all.
    """
    documents = [document for path in paths for document in _documents_in(path)]
    if not any(document.strip() for document in documents):
        raise ValueError(f"No text was found in {', '.join(map(str, paths))} ({', '.join(SUFFIXES)} files are read).")
    return documents


def _documents_in(path: Path) -> Iterator[str]:
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES):
            yield from _documents_in(file)
    elif not path.is_file():
        raise ValueError(f"There is no file or folder {path}.")
    elif path.suffix == ".jsonl":
        for number, line in enumerate(_read(path).splitlines(), start=1):
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'Each line of {path} is a JSON object with a string "text"; line {number} is not.')
            yield text
    elif path.suffix in SUFFIXES:
        yield _read(path)
    else:
        raise ValueError(f"Text is read from {', '.join(SUFFIXES)} files; got {path}.")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"Text is read as UTF-8; {path} is not: {error}. Convert it first.") from error


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model's weights.

    Raises:
        ValueError: there is none; Transformers would make one up that knows no word.
    """
    if not any((directory / name).exists() for name in TOKENIZERS):
        raise ValueError(
            f"Text needs the model's tokenizer; {directory} has none beside the weights. Save it there: "
            "`tokenizer.save_pretrained(PATH)`."
        )
    return AutoTokenizer.from_pretrained(directory)


def sequences(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int) -> torch.Tensor:
    """Documents end to end, an end-of-text token after each, cut into sequences; the rest of the last is left out.

    Args:
        tokenizer: with an `eos_token_id`, or the documents follow each other without a mark.
        documents: texts.
        length: tokens a sequence.

    Returns:
        int64 ``[S, length]``.

    Raises:
        ValueError: not one whole sequence.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = [token for document in documents for token in (*tokenizer(document).input_ids, *end)]
    if len(tokens) < length:
        raise ValueError(f"The text has {len(tokens)} tokens, fewer than one sequence of {length}. Give more text.")
    return torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
