"""Text to token ids and back, from a checkpoint's tokenizer files alone.

    tokenizer = load_tokenizer(files, config)          # files: name -> bytes, as embedded in a model file
    ids = tokenizer.encode("Hello this is a test")     # Llama-2's: [1, 15043, 445, 338, 263, 1243]
    text = tokenizer.decode(ids)
    stream = tokenizer.stream(); stream.push(id) -> str; stream.flush() -> str

Modules: `loader` (which files, which class, assembly), `settings` (the small JSON files), `rebuild` (what transformers'
tokenizer classes change about a tokenizer.json), `sentencepiece_model` (reads tokenizer.model), `stream` (incremental
decode), `token_bytes`, `core` (encode, decode), `special` (special tokens), `limits` and `batch` (padding, truncation),
`dropout` (sampling), `api` (`Tokenizer`: all of it, as transformers calls it), `screening` (what no library should
see), `guard` (other people's exceptions and panics become `TokenizerError`).

Knows nothing of models, files on disk or the network. Importing it is cheap: `tokenizers` is imported by the first
`load_tokenizer`. Which behaviour is Hugging Face's, where its versions differ: see `loader`.
"""

from edgellama.tokenizer.api import Tokenizer
from edgellama.tokenizer.batch import BatchEncoding
from edgellama.tokenizer.loader import load_tokenizer
from edgellama.tokenizer.stream import StreamDecoder

__all__ = ["BatchEncoding", "StreamDecoder", "Tokenizer", "load_tokenizer"]
