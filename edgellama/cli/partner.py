"""A model to talk to: from a conversation to a running reply. Shared by `chat` and `run`.

A model with a chat template, its own or a named one, is shown the whole conversation. One without continues the last
message as plain text, which is all that a base model can do.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgellama.cli import console
from edgellama.cli.conversation import Conversation
from edgellama.cli.info import describe, rows
from edgellama.cli.progress import Progress
from edgellama.cli.reply import WholeReply, start
from edgellama.errors import EdgellamaError

if TYPE_CHECKING:
    from edgellama.chat_template import ChatTemplate
    from edgellama.generate import Generation, Stream
    from edgellama.model import Llama

_USUAL = ("temperature", "top_k", "top_p", "min_p")


class ModelPartner:
    """`template` names a built-in template, in place of the model's own; `extra` are keyword arguments of each reply
    (an open draft model); `patience` shows how far a long prompt is."""

    def __init__(
        self,
        llm: "Llama",
        template: str | None,
        extra: dict[str, Any],
        patience: "Patience",
    ):
        self._llm, self._extra, self._patience = llm, extra, patience
        self._template_name = template
        self.template = _template(llm, template)

    @contextlib.contextmanager
    def reply(self, conversation: Conversation) -> Iterator["Stream | WholeReply"]:
        self._patience.begin()
        try:
            with self._start(conversation) as stream:
                yield stream
        finally:
            self._patience.end()

    def _start(self, conversation: Conversation) -> "Stream | WholeReply":
        options = {
            "max_new_tokens": self._most(),
            **conversation.parameters,
            **self._extra,
            "progress": self._patience.update,
        }
        if self.template is not None:
            return start(self._llm.chat, conversation.prompt(), template=self._template_name, **options)
        if conversation.system:
            raise EdgellamaError(
                "this model has no chat template, so a system text has no place; --template NAME gives it one"
            )
        return start(self._llm.generate, conversation.messages[-1]["content"], **options)

    def room(self, result: "Generation") -> int:
        return self._llm.n_ctx - len(result.prompt_token_ids)

    def show(self, what: str) -> str:
        if what == "info":
            return console.table(rows(describe(self._llm.file)))
        if what == "template":
            return self.template.source if self.template is not None else "(none: messages are continued as plain text)"
        assert what == "parameters"
        from edgellama.sampling import SamplingParams

        # The usual ones, and what this model does unlike others.
        own, usual = self._llm.defaults, SamplingParams()
        names = [name for name in vars(own) if name in _USUAL or getattr(own, name) != getattr(usual, name)]
        return console.table([(name, f"{getattr(own, name)} (default)") for name in names])

    def _most(self) -> int:
        """A reply may be as long as the model's own limit, else as the context: Ctrl-C is at hand."""
        value = self._llm.generation_config.get("max_new_tokens")
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else self._llm.n_ctx


def _template(llm: "Llama", name: str | None) -> "ChatTemplate | None":
    """The template by this name, else the model's own; None where it has none."""
    if name is None and llm.tokenizer.chat_template is None:
        return None
    from edgellama.chat import template_of

    return template_of(llm, name)


class Patience:
    """Progress of a prompt, shown by `bar` once it takes longer than `delay` seconds."""

    def __init__(self, bar: Progress, delay: float = 0.5):
        self._bar, self._delay = bar, delay
        self._begun = 0.0

    def begin(self) -> None:
        """A new prompt."""
        self._begun = time.monotonic()

    def end(self) -> None:
        """The bar goes, should the prompt have been cancelled."""
        self._bar.close()

    def update(self, done: int, total: int) -> None:
        """What `generate` calls after each pass."""
        if done >= total:
            self._bar.close()
        elif time.monotonic() - self._begun >= self._delay:
            self._bar.update(done, total)
