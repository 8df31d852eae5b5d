"""edgellama_convert: Hugging Face checkpoints to `.edgellama` files, and back."""
