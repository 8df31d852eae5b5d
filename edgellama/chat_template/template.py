"""`ChatTemplate`: a conversation in, the model's prompt text out, exactly as transformers' `apply_chat_template`.

Knows the rules around a template: what the template is given, how the last message is left open. Does not know Jinja's
dangers (`sandbox`), tokens or models.
"""

import dataclasses
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any

from jinja2 import Template, TemplateSyntaxError

from edgellama.chat_template.budget import TooMuch
from edgellama.chat_template.functions import json_schema_of
from edgellama.chat_template.sandbox import MAX_SOURCE, GuardedEnvironment, RaisedByTemplate
from edgellama.errors import ChatTemplateError
from edgellama.tokenizer.guard import one_line

Message = Mapping[str, Any]

_OPEN_END = "CONTINUE_FINAL_MESSAGE_TAG "  # as in transformers: a template that strips texts strips the same
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled chat template. Safe to share between threads, which take turns.

    `source`: Jinja. `variables`: what every rendering is given, `bos_token` and `eos_token` first of all.
    ChatTemplateError: it does not compile, or asks for too much.

    >>> template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", bos_token="<s>")
    >>> template.render([{"role": "user", "content": "Hi"}])
    '<s>Hi'
    """

    def __init__(self, source: str, **variables: Any):
        if not isinstance(source, str):
            raise TypeError(f"a chat template must be str, got {type(source).__name__}")
        if len(source) > MAX_SOURCE:
            raise ChatTemplateError(
                f"the chat template has {len(source)} characters, at most {MAX_SOURCE} are accepted"
            )
        self.source = source
        self.variables = variables
        self._lock = threading.Lock()
        self._environment = GuardedEnvironment()
        self._template = self._run("does not compile", lambda: self._environment.from_string(source))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> str:
        """The prompt of `messages` (dicts with `role` and `content`), as transformers renders it.

        `tools`: JSON schemas, or Python functions with type hints and a docstring. `add_generation_prompt` opens the
        assistant's turn; None: yes, unless the last message is to be continued. `continue_final_message` leaves the
        last message open (a string names the field to leave open). `variables`: anything else that the template
        reads (`enable_thinking`, `date_string`, ...).

        ChatTemplateError: the template refuses the conversation, fails, or asks for too much. ValueError, TypeError:
        the arguments do not go together.
        """
        if not messages:
            raise ValueError("there are no messages")
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        chat = [_with_reasoning(_message(index, message)) for index, message in enumerate(messages)]
        final = self._leave_open(chat, continue_final_message) if continue_final_message else None
        given = {
            **self.variables,
            **_plain(variables),
            "messages": chat,
            "tools": None if tools is None else [_tool(index, tool) for index, tool in enumerate(tools)],
            "documents": None if documents is None else _plain(_documents(documents)),
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._run("failed", lambda: self._render(given))
        return text if final is None else _cut_at_tag(text, final)

    def _render(self, given: dict[str, Any]) -> str:
        budget = self._environment.budget
        budget.start(given.values())
        parts = []
        for part in self._template.generate(given):
            budget.emit(part)
            parts.append(part)
        return "".join(parts)

    def _run(self, problem: str, work: Callable[[], Any]) -> Any:
        """`work`, whose every failure is one line: the template is nobody's code."""
        with self._lock:
            self._environment.budget.start(())
            try:
                return work()
            except RaisedByTemplate as error:
                raise ChatTemplateError(f"the chat template refuses this conversation: {one_line(error)}") from None
            except TooMuch as error:
                raise ChatTemplateError(f"the chat template was stopped: it asks for {error}") from None
            except Exception as error:
                line = error.lineno if isinstance(error, TemplateSyntaxError) else self._line(error)
                where = "" if line is None else f" at line {line}"
                raise ChatTemplateError(
                    f"the chat template {problem}{where}: {type(error).__name__}: {one_line(error)}"
                ) from None

    def _line(self, error: Exception) -> int | None:
        """The template's line where a rendering failed."""
        template: Template | None = getattr(self, "_template", None)
        trace, found = error.__traceback__, None
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == "<template>":
                found = trace.tb_lineno
            trace = trace.tb_next
        return None if template is None or found is None else template.get_corresponding_lineno(found)

    def _leave_open(self, chat: list[dict], field: bool | str) -> str:
        """Marks the end of the last message; returns the text that the prompt must end with."""
        name = field if isinstance(field, str) else "content"
        final = chat[-1].get(name)
        if final is None:
            raise ValueError(f"continue_final_message: the last message has no {name!r} to continue")
        # Reasoning goes by three names; the template reads one of them.
        names = [each for each in _REASONING if chat[-1].get(each) == final] if name in _REASONING else [name]
        if not any(each in self.source for each in names):
            raise ValueError(f"continue_final_message: the chat template does not use {name!r}")
        if isinstance(final, list | tuple):
            for part in reversed(final):
                if isinstance(part, dict) and isinstance(part.get("text"), str):
                    text = part["text"]
                    part["text"] = text + _OPEN_END
                    return text
            raise ValueError("continue_final_message: the last message has no text to continue")
        if not isinstance(final, str):
            raise TypeError(f"continue_final_message: the last message's {name!r} must be text")
        for each in names:
            chat[-1][each] = final + _OPEN_END
        return final


def _cut_at_tag(text: str, final: str) -> str:
    tag = _OPEN_END.strip()
    if final.strip() not in text or tag not in text:
        raise ChatTemplateError("the chat template leaves out the last message, so it cannot be continued")
    at = text.rindex(tag)
    if text.startswith(_OPEN_END, at):
        return text[:at]
    return text[:at].rstrip()  # the template strips the message: so its own end is stripped, too


def _message(index: int, message: object) -> dict[str, Any]:
    plain = _plain(message)
    if not isinstance(plain, dict):
        raise TypeError(f"messages[{index}] must be a dict with role and content, got {type(message).__name__}")
    return {key: value for key, value in plain.items() if value is not None}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _tool(index: int, tool: object) -> Any:
    if isinstance(tool, Mapping):
        return _plain(tool)
    if isinstance(tool, FunctionType | MethodType):
        return _plain(json_schema_of(tool))
    raise TypeError(f"tools[{index}] must be a JSON schema (dict) or a function, got {type(tool).__name__}")


def _documents(documents: Sequence[object]) -> Sequence[object]:
    for index, document in enumerate(documents):
        if not isinstance(document, Mapping):
            raise TypeError(f"documents[{index}] must be a dict with title and text, got {type(document).__name__}")
    return documents


def _plain(value: Any) -> Any:
    """A copy of `value` made of `str`, `int`, `float`, `bool`, `None`, `list`, `tuple` and `dict` alone.

    So a template cannot meet an object with methods of its own, and a rendering never changes the caller's data.
    What has no such form becomes its type's name, as in transformers: "<ndarray>".
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # subclasses, such as enums
        return str.__str__(value)
    if isinstance(value, int):
        return int.__pos__(value)
    if isinstance(value, float):
        return float.__pos__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"
