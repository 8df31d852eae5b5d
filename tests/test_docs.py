"""The examples of docs/transformers.md run: edgellama's in every run, transformers' where torch is installed.

All blocks of one side share one namespace, in the order of the page, and run in a folder that has `demo.edgellama` and
`classifier.edgellama`, and the demo once more as `my-llama` (a checkpoint) and `my-llama.edgellama`; for transformers
also `demo-hf` and `classifier-hf`.
"""

import json
import re
import shutil

import pytest

from checkpoints import make_checkpoint
from conftest import REPOSITORY, byte_tokenizer
from edgellama.demo import checkpoint_dir
from edgellama_convert import convert, export_hf

PAGE = REPOSITORY / "docs" / "transformers.md"


def blocks(of_transformers: bool) -> list[tuple[int, str]]:
    """(line, code) of each ```python block of one side."""
    text = PAGE.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1].startswith("# transformers\n") == of_transformers:
            found.append((text.count("\n", 0, match.start(1)), match[1]))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    convert(checkpoint_dir(), folder / "demo.edgellama", receipt=False, method="search")
    shutil.copytree(checkpoint_dir(), folder / "my-llama")
    shutil.copy(folder / "demo.edgellama", folder / "my-llama.edgellama")
    source = folder / "classifier"
    make_checkpoint(source, architectures=["LlamaForSequenceClassification"], num_labels=2, pad_token_id=0)
    (source / "tokenizer.json").write_text(byte_tokenizer(), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    convert(source, folder / "classifier.edgellama", method="search")
    return folder


def run(of_transformers: bool) -> None:
    namespace: dict[str, object] = {}
    found = blocks(of_transformers)
    assert len(found) > 3
    for line, code in found:
        # Padded, so that a traceback names the page's own line.
        exec(compile("\n" * line + code, str(PAGE), "exec"), namespace)
    for value in namespace.values():
        if type(value).__module__.startswith("edgellama") and hasattr(value, "close"):
            value.close()


def test_edgellamas_half(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run(of_transformers=False)


@pytest.mark.torch
def test_transformers_half(folder, monkeypatch):
    import torch

    torch.set_num_threads(1)
    monkeypatch.chdir(folder)
    for name in ("demo", "classifier"):
        export_hf(folder / f"{name}.edgellama", folder / f"{name}-hf")
    run(of_transformers=True)
