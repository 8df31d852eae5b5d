"""Trains the demo model that ships in `edgellama/demo/checkpoint` - from nothing, offline, on one CPU core.

    python scripts/train_demo.py --minutes 55 --out edgellama/demo/checkpoint

The stories come from our own grammar (demo_stories.py), so the corpus, and with it the model, is this project's own
work: no text, tokenizer or weights of anybody else are used. Needs torch and transformers (the `dev` extra).

What it does: writes stories; trains a byte-level BPE tokenizer on them; trains a small Llama on one pass over fresh
stories, one story a row (so that position 0 is always <s>); in the last part of the run the forward pass sees weights
rounded to int4 (straight-through), so that conversion costs next to nothing; saves everything in Hugging Face layout.

The shipped checkpoint: 53 minutes at 3,400 tokens/s on one shared core (11 million tokens, 2,631 steps, seed 0), then
`--resume` for 5.5 minutes more (`--rate 7e-4 --seed 100`), after one sentence of the plots had been put right.

With `--minutes` the learning rate follows the clock, so a busy machine does fewer steps; `--steps` gives a run that the
seed alone decides.
"""

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from demo_stories import stories, story

BOS, EOS = "<s>", "</s>"
VOCAB_SIZE = 1280
CONTEXT = 512
GROUP_SIZE = 128  # input channels that share one int4 scale
ROWS = 16  # stories a step
QAT_FROM = 0.6  # part of the run after which the forward pass sees int4 weights
PROMPTS = ["Once upon a time", "One day, a little robot", "Lily was", "There once was a brave dragon", "Tom and Mia"]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with <s> = 0 and </s> = 1; encoding puts <s> in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A random Llama: 1.9 M parameters, grouped-query attention, tied embeddings."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=None,
        use_cache=True,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # at these sizes a quarter faster on a CPU than the fused one
    return model


def batches(tokenizer: Tokenizer, rng: random.Random, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, labels), int64 [rows, longest]; rows of alike length share a batch; padding has label -100."""
    eos = tokenizer.token_to_id(EOS)
    while True:
        pool = [[*e.ids, eos] for e in tokenizer.encode_batch([story(rng) for _ in range(rows * 32)])]
        pool.sort(key=len)
        chunks = [pool[i : i + rows] for i in range(0, len(pool), rows)]
        rng.shuffle(chunks)
        for chunk in chunks:
            longest = max(map(len, chunk))
            ids = torch.tensor([row + [eos] * (longest - len(row)) for row in chunk])
            labels = torch.tensor([row + [-100] * (longest - len(row)) for row in chunk])
            yield ids, labels


def fake_quantize(weight: torch.Tensor) -> torch.Tensor:
    """Round float [out, in] to symmetric int4 in groups of 128 inputs (scale: largest magnitude / 7) and back."""
    parts = []
    for part in weight.split(GROUP_SIZE, dim=1):
        scale = (part.abs().amax(dim=1, keepdim=True) / 7).clamp_min(1e-8)
        parts.append((part / scale).round().clamp(-8, 7) * scale)
    return torch.cat(parts, dim=1)


def linear_weights(model: LlamaForCausalLM) -> list[torch.Tensor]:
    """The weights that conversion makes int4: all matrices of the layers, not the embedding."""
    return [p for name, p in model.model.layers.named_parameters() if p.ndim == 2]


class Int4Weights:
    """Context in which the model computes with int4 weights; on leaving, the float ones are back."""

    def __init__(self, model: LlamaForCausalLM, active: bool = True):
        self.weights = linear_weights(model) if active else []

    def __enter__(self) -> None:
        self.kept = [w.data for w in self.weights]
        for weight in self.weights:
            weight.data = fake_quantize(weight.data)

    def __exit__(self, *_: object) -> None:
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data = kept


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, held_out: list[tuple[torch.Tensor, torch.Tensor]], int4: bool) -> float:
    """Mean loss in nats a token over held-out stories."""
    with Int4Weights(model, int4):
        return sum(float(model(input_ids=ids, labels=labels).loss) for ids, labels in held_out) / len(held_out)


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, temperature: float, int4: bool = True) -> str:
    """Prompt and continuation up to </s>."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    with Int4Weights(model, int4):
        out = model.generate(ids, max_new_tokens=400, attention_mask=torch.ones_like(ids), pad_token_id=1, **how)
    text: str = tokenizer.decode(out[0].tolist())
    return text + ("" if out[0, -1] == tokenizer.token_to_id(EOS) else " [no end]")


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the checkpoint in Hugging Face layout, float16, replacing what `directory` held."""
    shutil.rmtree(directory, ignore_errors=True)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    eos = tokenizer.token_to_id(EOS)
    copy.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=eos, do_sample=True, temperature=0.8)
    copy.half().save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)  # transformers leaves it unreadable to others
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, content in (
        ("tokenizer_config.json", tokenizer_config),
        ("special_tokens_map.json", {"bos_token": BOS, "eos_token": EOS}),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def train(
    out: Path, *, minutes: float, steps: int, seed: int, rate: float, save_every: float, resume: Path | None = None
) -> None:
    """Run the whole job; every `save_every` minutes `out` holds the averaged weights of the moment.

    With `resume`, tokenizer and weights are those of that checkpoint, and all steps see int4 weights.
    """
    torch.manual_seed(seed)
    if resume:
        tokenizer = Tokenizer.from_file(str(resume / "tokenizer.json"))
        model = LlamaForCausalLM.from_pretrained(resume, dtype=torch.float32, attn_implementation="eager")
    else:
        tokenizer = train_tokenizer(list(stories(6000, seed + 1)))
        model = new_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.get_vocab_size()} tokens", flush=True)
    stream = batches(tokenizer, random.Random(seed + 2), ROWS)
    held_out_stream = batches(tokenizer, random.Random(seed + 3), ROWS)
    held_out = [next(held_out_stream) for _ in range(8)]

    matrices = linear_weights(model)
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=1.0, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1.0, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    average = [p.detach().clone() for p in model.parameters()]
    start = last_save = time.monotonic()
    step = seen = 0
    running = math.nan
    while True:
        elapsed = time.monotonic() - start
        progress = step / steps if steps else elapsed / (60 * minutes)
        if progress >= 1:
            break
        warm = min(1.0, (step + 1) / 100)
        now = rate * warm * (0.5 + 0.5 * math.cos(math.pi * progress))
        ids, labels = next(stream)
        with Int4Weights(
            model, bool(resume) or progress >= QAT_FROM
        ):  # straight-through: gradients at the rounded weights
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = now
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        seen += ids.numel()
        decay = min(0.99, step / (step + 10))
        for mean, p in zip(average, model.parameters(), strict=True):
            mean.lerp_(p.detach(), 1 - decay)
        value = float(loss.detach())
        running = value if math.isnan(running) else 0.97 * running + 0.03 * value
        if step % 50 == 0:
            speed = seen / (time.monotonic() - start)
            print(f"step {step} progress {progress:.3f} loss {running:.4f} {speed:.0f} tokens/s", flush=True)
        if time.monotonic() - last_save > 60 * save_every:
            last_save = time.monotonic()
            report(model, average, tokenizer, held_out, out)
    report(model, average, tokenizer, held_out, out)
    print(f"done: {step} steps, {seen:,} tokens, {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


def report(
    model: LlamaForCausalLM,
    average: list[torch.Tensor],
    tokenizer: Tokenizer,
    held_out: list[tuple[torch.Tensor, torch.Tensor]],
    out: Path,
) -> None:
    """Save the averaged weights to `out`, print their losses and two stories."""
    kept = [p.data for p in model.parameters()]
    for p, mean in zip(model.parameters(), average, strict=True):
        p.data = mean
    save(model, tokenizer, out)
    print(f"held out: {evaluate(model, held_out, False):.4f}, int4 {evaluate(model, held_out, True):.4f}", flush=True)
    for temperature in (0.0, 0.8):
        print(f"--- temperature {temperature}\n{sample(model, tokenizer, PROMPTS[0], temperature)}\n", flush=True)
    for p, data in zip(model.parameters(), kept, strict=True):
        p.data = data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint; what it holds is replaced")
    parser.add_argument("--minutes", type=float, default=55, help="budget of the training loop (default 55)")
    parser.add_argument("--steps", type=int, default=0, help="a fixed number of steps in place of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate (default 4e-3)")
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from, best with a tenth of the rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=float, default=8, help="minutes between saves (default 8)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(
        args.out,
        minutes=args.minutes,
        steps=args.steps,
        seed=args.seed,
        rate=args.rate,
        save_every=args.save_every,
        resume=args.resume,
    )


if __name__ == "__main__":
    main()
