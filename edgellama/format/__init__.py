"""The `.edgellama` file: one file that holds everything a model needs, mapped and used in place.

The sole owner of file bytes. `FORMAT.md` beside this file is the specification; the code follows its sections:

    container.py                prologue and trailer (sections 2, 5)
    strict_json.py, fields.py   JSON from strangers (section 3)
    schema.py                   the tensors that a config demands (section 3)
    layout.py                   sizes of the layouts (section 4)
    metadata.py                 embedded files, the chain of edits (section 5)
    validate.py                 all rules, in order (section 6)
    reader.py                   open, map, verify
    writer.py, storage.py       the atomic writer (section 7)
    atomic.py                   the same for small files, as sessions are
    edit.py                     change metadata, keep the weights (section 8)
"""

from .edit import append_metadata, recover
from .layout import GROUP_SIZE, LAYOUTS, ROW_BLOCK, Layout
from .metadata import FILE_NAMES, has_tokenizer
from .reader import ModelFile, open_model
from .schema import TensorSpec, model_tensors, unit_names
from .validate import TensorEntry
from .writer import ModelWriter

__all__ = [
    "FILE_NAMES",
    "GROUP_SIZE",
    "LAYOUTS",
    "ROW_BLOCK",
    "Layout",
    "ModelFile",
    "ModelWriter",
    "TensorEntry",
    "TensorSpec",
    "append_metadata",
    "has_tokenizer",
    "model_tensors",
    "open_model",
    "recover",
    "unit_names",
]
