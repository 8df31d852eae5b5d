"""Writes data/chat/golden.json: what transformers' `apply_chat_template` makes of every template and case.

Needs transformers. Run from the repository: PYTHONPATH=tests python tests/data/make_chat_golden.py
"""

import json

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from chat_cases import CASES, FOLDER, TEMPLATES, TOKENS, source


def reference_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that only carries the template and the special tokens."""
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS.values())}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=source(template), **TOKENS)


def main() -> None:
    texts: dict[str, dict[str, str | None]] = {}
    for template in TEMPLATES:
        tokenizer = reference_tokenizer(template)
        texts[template] = {}
        for case in CASES:
            try:
                text = tokenizer.apply_chat_template(case.messages, tokenize=False, **case.arguments())
            except Exception:
                text = None
            texts[template][case.name] = text
    data = json.dumps(texts, ensure_ascii=False, indent=0)
    (FOLDER / "golden.json").write_text(data + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
