"""Writes `tests/data/golden`: what transformers computes on the models of `tests/golden_cases.py`.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/data/make_golden.py [CASE ...]

Each model is made from its seed, converted with `rtn`, exported again as a float32 checkpoint and run by transformers
in float32 with eager attention: the logits depend on edgellama's quantizer and exporter, but not on its forward pass.
Each case's file holds `tokens` int64 [T], `logits` float32 [16, vocab_size] of the last positions, and the hash of the
dequantized weights. `rope.json` holds inverse frequencies for the cases of `tests/test_rope.py`.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden_cases import CASES, GOLDEN_DIR, KEPT_ROWS, Case, convert_case, weights_sha256
from test_rope import CASES as ROPE_CASES
from test_rope import transformers_frequencies


def transformers_logits(checkpoint: Path, tokens: np.ndarray) -> np.ndarray:
    """float32 [T, vocab_size] of one sequence in one call."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None]).logits[0].numpy()


def write_case(name: str, case: Case) -> None:
    from edgellama.format import open_model
    from edgellama_convert import export_hf

    with tempfile.TemporaryDirectory() as directory:
        path = convert_case(case, Path(directory))
        export_hf(path, Path(directory) / "exported", dtype="float32")
        logits = transformers_logits(Path(directory) / "exported", case.tokens())
        with open_model(path) as model_file:
            digest = weights_sha256(model_file)
    np.savez_compressed(
        GOLDEN_DIR / f"{name}.npz", tokens=case.tokens(), logits=logits[-KEPT_ROWS:], weights_sha256=digest
    )
    print(f"{name}: logits {logits.std():.2f} +- {np.ptp(logits):.1f}")


def write_rope() -> None:
    golden = {}
    for name in ROPE_CASES:
        frequencies, scaling = transformers_frequencies(name)
        # float32 values, shortest decimal form that reads back the same
        golden[name] = {"inv_freq": [float(str(f)) for f in frequencies], "attention_scaling": scaling}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in golden.items())
    (GOLDEN_DIR / "rope.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def main() -> None:
    import torch

    torch.set_num_threads(1)
    GOLDEN_DIR.mkdir(parents=True, exist_ok=True)
    names = sys.argv[1:] or ["rope", *CASES]
    for name in names:
        if name == "rope":
            write_rope()
        else:
            write_case(name, CASES[name])


if __name__ == "__main__":
    main()
