"""Makes the tokenizers and goldens beside it: `python tests/data/tokenizers/make_tokenizers.py [--goldens-only]`.

Trains a SentencePiece BPE shaped like Llama-2's and a byte-level BPE shaped like Llama-3's and SmolLM2's on text made
here, and stores what transformers (5.23 when the goldens were made) does with each case of tests/tokenizer_cases.py.
Needs sentencepiece and transformers with protobuf.
"""

import argparse
import io
import json
import os
import random
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

from tokenizer_cases import CASES, TEXTS, digest_if_long  # noqa: E402

WORDS = """the a of and to in is was he for it with as his on be at by had not are but from or have an they which one
you were all her she there would their we him been has when who will no more if out so up said what its about than
into them can only other time new some could these two may first then do any like my now over such our man me even
most made after also did many off before must well back through years much where your way down should because long
each just state those people too mr how little good world make very year still see work life men here get both
between being under three never know same last another while us might great old go come since against right came take
used himself few house use place during high without again home around small however found mrs thought went say part
once general upon school every don't does got united left number course war until always away something fact water
less public put think almost hand enough far took head yet government system set better told nothing night end why
called didn't eyes find going look asked later knew test hello token model quick brown fox jumps lazy dog return def
class self import print value number string list index length café naïve Größe señor""".split()


def corpus() -> list[str]:
    """Some 6,000 lines: sentences, code with indentation, numbers."""
    rng = random.Random(1)
    lines = []
    for _ in range(5000):
        sentence = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(4, 14)))
        lines.append(sentence[0].upper() + sentence[1:] + rng.choice([".", ".", "!", "?", ", and so on."]))
    for _ in range(1000):
        name, value = rng.choice(WORDS), rng.randrange(10 ** rng.randrange(1, 6))
        lines.append(f"    {name} = {rng.choice(WORDS)}({value})")
        lines.append(f"        return {name}  # {value}.{value % 7}")
    return lines


def make_spm_model(lines: list[str]) -> bytes:
    """800 pieces: <unk> <s> </s>, 256 bytes, merges by score, characters; no normalization, like Llama-2's."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=800,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def make_spm_json(model: bytes) -> str:
    """The tokenizer.json of that model as transformers 4 wrote it, and as Llama-2's repository has it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    sys.path.insert(0, str(HERE.parents[2]))
    from edgellama.tokenizer.sentencepiece_model import read_spm_model

    spm = read_spm_model(model)
    vocab = {piece: index for index, piece in enumerate(spm.pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, spm.merges(), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return tokenizer.to_str(pretty=False)


def make_bytelevel_json(lines: list[str]) -> str:
    """768 tokens and 20 special ones after them; digits apart as in SmolLM2, BOS by post-processor as in Llama-3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=768, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special += [f"<|reserved_special_token_{number}|>" for number in range(15)]
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.ByteLevel()
    bos = special[0]
    template = processors.TemplateProcessing(f"{bos} $A", None, [(bos, tokenizer.token_to_id(bos))])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer.to_str(pretty=False)


def make_goldens() -> dict[str, dict]:
    from transformers import AutoTokenizer

    goldens = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in case.files().items():
                Path(folder, name).write_bytes(content)
            Path(folder, "config.json").write_text('{"model_type": "llama"}')
            tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer.encode(text) for text in TEXTS]
        goldens[case.name] = {
            "class": type(tokenizer).__name__,
            "size": len(tokenizer),
            "bos_id": tokenizer.bos_token_id,
            "eos_id": tokenizer.eos_token_id,
            "ids": [digest_if_long(each) for each in ids],
            "plain_ids": [digest_if_long(tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS],
            "decoded": [tokenizer.decode(each) for each in ids[:-2]],
            "skipped": [tokenizer.decode(each, skip_special_tokens=True) for each in ids[:-2]],
        }
    return goldens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--goldens-only", action="store_true", help="keep the tokenizers")
    if not parser.parse_args().goldens_only:
        lines = corpus()
        for folder in ("spm-model", "spm-json", "bytelevel"):
            (HERE / folder).mkdir(exist_ok=True)
        model = make_spm_model(lines)
        (HERE / "spm-model" / "tokenizer.model").write_bytes(model)
        (HERE / "spm-json" / "tokenizer.json").write_text(make_spm_json(model), encoding="utf-8")
        (HERE / "bytelevel" / "tokenizer.json").write_text(make_bytelevel_json(lines), encoding="utf-8")
    text = json.dumps(make_goldens(), ensure_ascii=True, separators=(",", ":"))
    (HERE / "goldens.json").write_text(text.replace('},"', '},\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
