"""The demo model: a small trained Llama in Hugging Face layout that ships with the package.

It has 1.9 M parameters and was trained by this project on stories this project's own grammar wrote
(`scripts/train_demo.py` regenerates it), so nobody else's licence is on it. It writes short English stories for
children and knows nothing else. This module knows where the checkpoint lies, not how to convert or run it.
"""

from pathlib import Path

from edgellama.errors import EdgellamaError

# Beginnings the model goes on from in its own words; the first is the default.
PROMPTS = (
    "Once upon a time",
    "Once upon a time, there was a little robot named Pip.",
    "There once was a brave dragon named Luna.",
    "Lily and Tom were best friends.",
    "This is the story of a small owl named Bella.",
    "Far away, in a cave at the top of a mountain, there lived",
)


def checkpoint_dir() -> Path:
    """Folder of the checkpoint: config.json, model.safetensors (float16), tokenizer.json and their companions.

    Raises EdgellamaError if the installation lacks it.
    """
    directory = Path(__file__).parent / "checkpoint"
    if not (directory / "model.safetensors").is_file():
        raise EdgellamaError(f"{directory}: the demo model is not there; install edgellama again")
    return directory
