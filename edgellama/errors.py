"""The errors a user can meet.

    EdgellamaError            anything below; `str(error)` is one line: what, where, what to do
    ├── FormatError           a `.edgellama` file breaks the format (names the field and the byte offset)
    ├── ConfigError           a model config value is missing, ill-typed or unsupported (names the key)
    ├── ConvertError          a source checkpoint cannot be found, read or converted
    ├── TokenizerError        a tokenizer is missing, damaged or of an unsupported kind
    ├── ChatTemplateError     a chat template is missing, broken, refuses the conversation or asks for too much
    ├── ContextError          the tokens do not fit into the KV cache
    ├── ConstraintError       a schema, expression or grammar for the output cannot be used, or is not obeyed
    ├── DeviceError           the device asked for is not there
    └── CancelledError        a computation was stopped on request

The command line prints `str(error)` and exits with 1. Bugs of ours stay `AssertionError` and friends.
"""


class EdgellamaError(Exception):
    """Base of every error that edgellama raises on purpose."""


class FormatError(EdgellamaError):
    """A file that is not a valid `.edgellama` file.

    `field` names the offending part (`"tensors[3].offset"`), `offset` is the byte where it lies, if known; `path` is
    the file, where there is one.

    >>> str(FormatError("tensors[3].offset", 128, "must be 4096, got 4095"))
    'tensors[3].offset (byte 128): must be 4096, got 4095'
    """

    def __init__(self, field: str, offset: int | None, problem: str, path: str | None = None):
        self.field, self.offset, self.problem, self.path = field, offset, problem, path
        where = field if offset is None else f"{field} (byte {offset})"
        super().__init__(f"{path}: {where}: {problem}" if path else f"{where}: {problem}")

    def __reduce__(self):
        return type(self), (self.field, self.offset, self.problem, self.path)


class ConfigError(EdgellamaError):
    """A config value that is missing, ill-typed or unsupported; the message names the key."""


class ConvertError(EdgellamaError):
    """A source checkpoint that cannot be found, read or converted."""


class TokenizerError(EdgellamaError):
    """A tokenizer that is missing, damaged or of an unsupported kind."""


class ChatTemplateError(EdgellamaError):
    """A chat template that is missing, broken, refuses the conversation or asks for too much."""


class ContextError(EdgellamaError):
    """More tokens than the KV cache holds."""


class ConstraintError(EdgellamaError):
    """A schema, regular expression or grammar that cannot be used, or a token that it does not allow."""


class DeviceError(EdgellamaError):
    """A device that this machine, or this installation, does not have."""


class CancelledError(EdgellamaError):
    """A computation that was stopped on request, from another thread."""
