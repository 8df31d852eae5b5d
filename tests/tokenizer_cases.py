"""The tokenizers and texts that tests/data/tokenizers/make_tokenizers.py made goldens for, and the tests read.

A case is a folder of tests/data/tokenizers, the files taken from it, and what its tokenizer_config.json says.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

DATA = Path(__file__).resolve().parent / "data" / "tokenizers"


def token(content: str, **flags: bool) -> dict:
    fields = {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {**fields, "special": True, **flags}


@dataclass(frozen=True)
class Case:
    name: str
    folder: str  # below DATA
    config: dict | None  # tokenizer_config.json; None: no such file
    others: dict[str, object] = field(default_factory=dict)  # further JSON files

    def files(self) -> dict[str, bytes]:
        """What a checkpoint folder of this case holds."""
        files = {path.name: path.read_bytes() for path in (DATA / self.folder).iterdir()}
        small = {**({} if self.config is None else {"tokenizer_config.json": self.config}), **self.others}
        return files | {name: json.dumps(content).encode() for name, content in small.items()}


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA |= {"add_bos_token": True, "add_eos_token": False, "legacy": False, "clean_up_tokenization_spaces": False}
LLAMA_DECODER = {str(index): token(content) for index, content in enumerate(("<unk>", "<s>", "</s>"))}
EXTRA_DECODER = {
    "800": token("<pad>"),
    "801": token("<tool>", special=False),
    "802": token("<left>", lstrip=True, rstrip=True),
    "803": token("word", special=False, normalized=True, single_word=True),
}
GPT2 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "add_prefix_space": False}
GPT2 |= {"clean_up_tokenization_spaces": True}
FAST = {**GPT2, "tokenizer_class": "PreTrainedTokenizerFast"}

CASES = [
    Case("spm-model", "spm-model", LLAMA),
    Case("spm-model-legacy-eos", "spm-model", {**LLAMA, "legacy": True, "add_eos_token": True}),
    Case("spm-model-no-prefix", "spm-model", {**LLAMA, "add_prefix_space": False, "add_bos_token": False}),
    Case("spm-model-added", "spm-model", {**LLAMA, "added_tokens_decoder": LLAMA_DECODER | EXTRA_DECODER}),
    Case(
        "spm-model-older-files",
        "spm-model",
        {key: value for key, value in LLAMA.items() if key != "eos_token"},
        {
            "added_tokens.json": {"<pad>": 800, "<tool>": 801},
            "special_tokens_map.json": {"pad_token": "<pad>", "eos_token": token("</s>"), "bos_token": "<s>"},
        },
    ),
    Case("spm-json", "spm-json", {**LLAMA, "added_tokens_decoder": LLAMA_DECODER}),
    Case("spm-json-legacy", "spm-json", {**LLAMA, "legacy": True}),
    Case(
        "spm-json-no-prefix", "spm-json", {**LLAMA, "tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False}
    ),
    Case("spm-json-flags", "spm-json", {**LLAMA, "add_bos_token": False, "add_eos_token": True}),
    Case("spm-json-added", "spm-json", {**LLAMA, "added_tokens_decoder": LLAMA_DECODER | EXTRA_DECODER}),
    Case("spm-json-code-llama", "spm-json", {**LLAMA, "tokenizer_class": "CodeLlamaTokenizer"}),
    Case("spm-json-as-it-is", "spm-json", None),
    Case(
        "spm-json-generic", "spm-json", {**LLAMA, "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    ),
    Case("bytelevel", "bytelevel", FAST),
    Case("bytelevel-as-it-is", "bytelevel", None),
    Case("bytelevel-says-llama", "bytelevel", {**FAST, "tokenizer_class": "LlamaTokenizerFast", "add_eos_token": True}),
    Case("bytelevel-gpt2", "bytelevel", {**GPT2, "tokenizer_class": "GPT2Tokenizer", "unk_token": "<|new|>"}),
    Case("bytelevel-gpt2-prefix", "bytelevel", {**GPT2, "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
    Case("bytelevel-split", "bytelevel", {**FAST, "split_special_tokens": True}),
    Case("bytelevel-extra", "bytelevel", {**FAST, "additional_special_tokens": ["<|extra|>", "<|tool|>"]}),
]

TEXTS = [
    "",
    " ",
    "   ",
    "Hello this is a test",
    " Hello",
    "  two before, two after  ",
    "trailing newline\n",
    "\n\n leading newlines",
    "tabs\tand\r\nreturns",
    "def f(x):\n    if x:\n        return  x + 1\n\n\n",
    "1234567890 3.14159 1,000",
    "   12",
    "don't you've it's I'm . , ! ?",
    "▁already ▁▁ marked▁",
    "naïve café Ångström ß",
    "e\u0301 n\u0303 combining",
    "\u212b \ufb01 \u2460 normalizable",
    "日本語のテキスト",
    "中文,没有空格",
    "한국어 텍스트",
    "नमस्ते दुनिया",
    "שלום עולם",
    "👍🏽 👨\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈",
    "a👍b 👍👍",
    "\x00 nul \x00\x00",
    "\x01\x1f\x7f\u0085\u00a0\u2028\u200b",
    "\ufeffbom",
    "\U0010ffff\ufffd\ue000",
    "<s>",
    "</s>Hello</s> world <s> x",
    "<s>[INST] <<SYS>>\nsys\n<</SYS>>\n\nhi [/INST] answer </s>",
    "<unk> <0x41> <0x0A>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "a <|reserved_special_token_3|> b<|eot_id|>  c",
    "<|extra|><|tool|> <|begin_of_text",
    "a <tool>b <pad> c <left> d<left>e  word sword word.",
    "▁<PRE> x <FILL_>▁<SUF>",
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "The quick brown fox jumps over the lazy dog. " * 30,
    "word " * 3000,
]


def random_text(rng: random.Random, longest: int = 40) -> str:
    """Text that likes whitespace, special tokens and characters outside every vocabulary."""
    alphabet = [
        *"abcdehilnorstuwy  ETA019.,;'\"()\t\n\r=éñü日本語한국😀👨\u200d\ufe0f🏽क्\x00▁\ufffd\u00a0",
        "  ",
        "    ",
    ]
    alphabet += [" the", " word", "<s>", "</s>", "<unk>", "<0x41>", "<|eot_id|>", "<tool>", "<left>", "<pad>", "<PRE>"]
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(longest)))


def goldens() -> Mapping[str, dict]:
    """By case: `ids` and `plain_ids` (without special tokens) for each of TEXTS, `decoded`, and more."""
    return json.loads((DATA / "goldens.json").read_text(encoding="utf-8"))


def digest_if_long(ids: list[int]) -> list[int]:
    """The ids; of very many, their number, the ends and a checksum, to keep the golden file small."""
    if len(ids) <= 400:
        return ids
    checksum = 0
    for index in ids:
        checksum = (checksum * 1_000_003 + index) % (1 << 31)
    return [len(ids), *ids[:20], *ids[-20:], checksum]
