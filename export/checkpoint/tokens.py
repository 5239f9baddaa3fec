"""A checkpoint's tokenizer, once it is known to serve the checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from internvl_edge.bundle.errors import BundleError, CheckpointError
from internvl_edge.bundle.prompt import IMAGE_CONTEXT, NATIVE_TEMPLATE, get_template
from internvl_edge.bundle.quoting import named, quoted
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.bundle.token_files import FAST_FILE, KINDS, tokenizer_files
from internvl_edge.bundle.tokenizer import Tokenizer, load_tokenizer
from internvl_edge.export.checkpoint.beside import GENERATION, read_beside

#: Stands for frames before they are encoded; converters gave it the first id behind the table.
_VIDEO = "<video>"


@dataclass(frozen=True)
class Tokens:
    """A tokenizer, and the files that make it."""

    tokenizer: Tokenizer
    files: list[Path]


def read_tokens(directory: Path, spec: ModelSpec) -> Tokens:
    """Read the tokenizer of a checkpoint directory.

    Raises:
        CheckpointError: a file is missing or malformed, or belongs to another checkpoint.
    """
    template = get_template(spec.prompt.template)
    native = spec.prompt.template == NATIVE_TEMPLATE
    try:
        files = tokenizer_files(directory, prefer=FAST_FILE if native else None)
        _check_there(directory, {path.name for path in files})
        tokenizer = load_tokenizer(directory, [path.name for path in files])
        tokenizer.token_id(IMAGE_CONTEXT)
        stop = tokenizer.token_id(template.stop)
    except BundleError as error:
        raise CheckpointError(f"tokenizer: {error}") from error
    _check_size(tokenizer, spec.language.vocab_size)
    if native:
        _check_stop(directory, template.stop, stop)
    return Tokens(tokenizer, files)


def _check_there(directory: Path, names: Collection[str]) -> None:
    if not any(all(name in names for name in kind) for kind in KINDS):
        raise CheckpointError(
            f"{named(directory)} has no tokenizer: copy {' or '.join(map(' and '.join, KINDS))}"
            " there, from where the weights came from"
        )


def _check_size(tokenizer: Tokenizer, rows: int) -> None:
    beyond = [token.text for token in tokenizer.added.values() if token.id >= rows]
    if tokenizer.size > rows and (beyond != [_VIDEO] or tokenizer.size > rows + 1):
        raise CheckpointError(
            f"the tokenizer has {tokenizer.size} ids, the embedding table only {rows} rows; its"
            " files belong to another checkpoint"
        )


def _check_stop(directory: Path, text: str, stop: int) -> None:
    """See that the template's last token is one that ends an answer by generation_config.json."""
    told = read_beside(directory, [GENERATION]).get(GENERATION, {}).get("eos_token_id")
    ends = told if isinstance(told, list) else [told]
    if told is not None and stop not in ends:
        raise CheckpointError(
            f"{GENERATION}: 'eos_token_id' is {quoted(told)}; {quoted(text)}, which ends an answer,"
            f" is token {stop}"
        )
