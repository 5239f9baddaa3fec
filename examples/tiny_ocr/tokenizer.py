"""The tokenizer of the tiny checkpoint: InternLM2's layout with a 512-piece vocabulary.

A SentencePiece BPE model without any merge: values are read character by character, which is what
makes reading learnable, and the few words of the questions are single pieces. As in the released
checkpoints the last six pieces are placeholders that `tokenizer_config.json` renames, and nine
more special tokens follow the SentencePiece vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as proto

PIECES = 503  # SentencePiece vocabulary; with the nine appended tokens the embedding has 512 rows
RENAMED = (
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)
APPENDED = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
KEYS = ("TOTAL", "TAX", "CASH", "DATE", "TIME", "ID", "CODE", "NAME", "SHOP", "ITEM", "QTY", "TEL")
WORDS = (
    "What",
    "▁is",
    "▁the",
    "Read",
    "▁lines",
    "▁all",
    "You",
    "▁read",
    "▁receipts",
    "none",
    "system",
    "user",
    "assistant",
)
SPACE = "▁"


def _characters() -> list[str]:
    """Printable ASCII without the space, whose piece is `▁`."""
    return [SPACE, *(chr(code) for code in range(33, 127))]


def model_proto() -> bytes:
    """The serialised SentencePiece model."""
    kinds = proto.ModelProto.SentencePiece
    model = proto.ModelProto()

    def add(piece: str, kind: int, score: float = 0.0) -> None:
        model.pieces.add(piece=piece, score=score, type=kind)

    add("<unk>", kinds.UNKNOWN)
    add("<s>", kinds.CONTROL)
    add("</s>", kinds.CONTROL)
    add("\n", kinds.USER_DEFINED)
    for byte in range(256):
        add(f"<0x{byte:02X}>", kinds.BYTE)
    for word in (*WORDS, *(SPACE + key for key in KEYS)):
        add(word, kinds.USER_DEFINED)
    for rank, character in enumerate(_characters()):
        add(character, kinds.NORMAL, -float(rank))
    spare = PIECES - len(RENAMED) - len(model.pieces)
    for number in range(spare + len(RENAMED)):
        add(f"[UNUSED_TOKEN_{number}]", kinds.USER_DEFINED)

    trainer = model.trainer_spec
    trainer.model_type = proto.TrainerSpec.BPE
    trainer.vocab_size = PIECES
    trainer.byte_fallback = True
    trainer.pad_id = -1
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString(deterministic=True)


def special_ids() -> dict[str, int]:
    """Special token text -> id."""
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2}
    names = (*RENAMED, *APPENDED)
    return ids | {name: PIECES - len(RENAMED) + n for n, name in enumerate(names)}


def write_tokenizer(directory: Path) -> None:
    """Write the five tokenizer files of a checkpoint directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model_proto())
    flags = {
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    listed = [
        "<|im_start|>",
        "<|im_end|>",
        "<|action_start|>",
        "<|action_end|>",
        "<|interpreter|>",
        "<|plugin|>",
        *APPENDED,
    ]
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    ids = special_ids()
    files = {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                str(number): {"content": name, **flags} for name, number in ids.items()
            },
            "additional_special_tokens": listed,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 8192,
            "tokenizer_class": "InternLM2Tokenizer",
            **named,
        },
        "special_tokens_map.json": {"additional_special_tokens": listed, **named},
        "added_tokens.json": {name: ids[name] for name in APPENDED},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


class Tokenizer:
    """Text to ids for prompts assembled by this example; specials are given by name, not parsed."""

    def __init__(self) -> None:
        self._pieces = spm.SentencePieceProcessor(model_proto=model_proto())
        self.special = special_ids()

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, without BOS."""
        return self._pieces.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Text of ordinary ids; special ids are dropped."""
        return self._pieces.decode([i for i in ids if 2 < i < PIECES - len(RENAMED)])
