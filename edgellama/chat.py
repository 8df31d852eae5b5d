"""A conversation with a model: messages in, a reply out.

Knows: which template a model has, the mistakes that people make in messages, how a rendered prompt becomes ids, which
tokens end the model's turn. Does not know how a template is run (`chat_template`) or a reply made (`llm.generate`,
which gets ids).

BOS: the template's text is encoded without special tokens added, as transformers does it. But where the checkpoint's
own tokenizer begins every text with BOS and the template does not write it (Zephyr's, for one), it is put in front: the
model has never seen a text without. So there is always exactly the BOS that the model expects.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from edgellama.errors import ChatTemplateError

if TYPE_CHECKING:
    from edgellama.chat_template import ChatTemplate
    from edgellama.generate import Generation, Stream
    from edgellama.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
BUILT_IN_NAMES = ("llama-2", "llama-3", "chatml", "zephyr")
"""Templates that come along: `chat_template.builtin`."""

Tools = Sequence[Mapping[str, Any] | Callable[..., Any]]

_PROBE = "edgellama-probe"
_A_DATE = "01 Jan 2026"
_MARKER = re.compile(r"<[^<>\s]{1,40}>")


class ChatModel(Protocol):
    """What a conversation needs of a model: see `Llama`."""

    @property
    def tokenizer(self) -> "Tokenizer": ...
    @property
    def eos_ids(self) -> frozenset[int]: ...
    @property
    def generate(self) -> Callable[..., Any]: ...


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation made ready: `text` as rendered, `ids` to generate from, what ends the model's turn."""

    text: str
    ids: list[int]
    eos_ids: frozenset[int]
    stop: tuple[str, ...]


def template_of(llm: ChatModel, name: str | None = None, *, tools: bool = False) -> "ChatTemplate":
    """The model's chat template, compiled.

    `name`: one of the model's own by its name, a built-in one ("llama-2", "llama-3", "chatml", "zephyr"), or Jinja
    source; None: the model's, the one for tools where there are several and `tools` says so. ChatTemplateError: there
    is none, or it does not compile.
    """
    tokenizer = llm.tokenizer
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {}
    variables: dict[str, str] = {}
    if name is None:
        source = own if isinstance(own, str) else named.get("tool_use") if tools else None
        source = source or named.get("default")
        if source is None:
            raise ChatTemplateError(
                f"the model has several chat templates; choose one with template=: {', '.join(sorted(named))}"
                if named
                else "the model has no chat template; choose one with template= (--template): "
                f"{', '.join(BUILT_IN_NAMES)}"
            )
    elif name in named:
        source = named[name]
    elif name in BUILT_IN_NAMES:
        from edgellama.chat_template.builtin import BUILT_IN, VARIABLES

        source, variables = BUILT_IN[name], VARIABLES.get(name, {})
    elif "{{" in name or "{%" in name:
        source = name
    else:
        known = ", ".join([*sorted(named), *BUILT_IN_NAMES])
        raise ChatTemplateError(f"there is no chat template {name!r:.80}; choose {known}, or give Jinja source")
    return _compiled(source, tuple({**tokenizer.special_tokens, **variables}.items()))


def repeatable_text(
    tokenizer: "Tokenizer", messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> str | None:
    """`messages` by the model's own chat template, the same on any day; None if there is none, it refuses them, or it
    tells the time whatever it is given."""
    if tokenizer.chat_template is None:
        return None
    try:
        template = template_of(SimpleNamespace(tokenizer=tokenizer))  # it asks for no more of a model
        if "strftime_now" in template.source and "date_string" not in template.source:
            return None
        copies = [dict(message) for message in messages]
        return template.render(copies, add_generation_prompt=add_generation_prompt, date_string=_A_DATE)
    except ChatTemplateError:
        return None


@lru_cache(maxsize=16)
def _compiled(source: str, variables: tuple[tuple[str, str], ...]) -> "ChatTemplate":
    from edgellama.chat_template import ChatTemplate

    return ChatTemplate(source, **dict(variables))


def prepare(
    llm: ChatModel,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Tools | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    template: str | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | str = False,
    template_variables: Mapping[str, Any] | None = None,
) -> ChatPrompt:
    """The prompt of a conversation; arguments and errors as in `chat`."""
    compiled = template_of(llm, template, tools=bool(tools))
    for given, word in ((tools, "tools"), (documents, "documents")):
        if given and word not in compiled.source:
            raise ChatTemplateError(f"the model's chat template knows no {word}: leave {word}= out")
    text = compiled.render(
        checked_messages(messages),
        tools=tools,
        documents=documents,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        **(template_variables or {}),
    )
    eos_ids, stop = end_of_turn(compiled, llm.tokenizer)
    return ChatPrompt(text, encode_prompt(llm.tokenizer, text), llm.eos_ids | eos_ids, stop)


@overload
def chat(
    llm: ChatModel, messages: Sequence[Mapping[str, Any]], *, stream: Literal[False] = False, **options: Any
) -> "Generation": ...


@overload
def chat(
    llm: ChatModel, messages: Sequence[Mapping[str, Any]], *, stream: Literal[True], **options: Any
) -> "Stream": ...


def chat(
    llm: ChatModel,
    messages: Sequence[Mapping[str, Any]],
    *,
    stream: bool = False,
    tools: Tools | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    template: str | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | str = False,
    template_variables: Mapping[str, Any] | None = None,
    stop: str | Iterable[str] | None = None,
    eos_token_id: int | Iterable[int] | None = None,
    **options: Any,
) -> "Generation | Stream":
    """The model's reply to `messages`, a list of `{"role": ..., "content": ...}`; the caller keeps the conversation.

        reply = llm.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
        for piece in llm.chat(messages, stream=True): ...

    `content` is a text or a list of `{"type": "text", "text": ...}`. `tools`: JSON schemas, or Python functions with
    type hints and a docstring. `template`: another than the model's own, see `template_of`; `template_variables`: what
    else it reads (`enable_thinking`, ...). `continue_final_message`: the model goes on with the last message instead of
    answering it. The rest is `generate`'s: max_new_tokens, temperature, seed, stop, ... The turn ends at the model's
    end-of-text tokens and at whatever the template writes after an assistant's message.

    Returns what `generate` returns. Raises ChatTemplateError (no template, or it refuses the conversation), ValueError
    or TypeError (a message is wrong), ContextError (too long).
    """
    prompt = prepare(
        llm,
        messages,
        tools=tools,
        documents=documents,
        template=template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        template_variables=template_variables,
    )
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    stops += [each for each in prompt.stop if each not in stops]
    return llm.generate(
        prompt.ids,
        stream=stream,
        stop=stops or None,
        eos_token_id=sorted(prompt.eos_ids) if eos_token_id is None else eos_token_id,
        **options,
    )


def encode_prompt(tokenizer: "Tokenizer", text: str) -> list[int]:
    """The ids of a rendered prompt: special tokens by their names, BOS exactly as the model expects it."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_id
    if bos is not None and ids[:1] != [bos] and tokenizer.encode("", add_special_tokens=True)[:1] == [bos]:
        return [bos, *ids]
    return ids


def end_of_turn(template: "ChatTemplate", tokenizer: "Tokenizer") -> tuple[frozenset[int], tuple[str, ...]]:
    """What the template writes after an assistant's message: a special token's id, or a marker's text as a stop string.

    Found out by trying: a model's list of end-of-text tokens often lacks it, and a built-in template's marker
    ("<|im_end|>") may be no token of this model.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = template.render(messages, add_generation_prompt=False)
    except ChatTemplateError:
        return frozenset(), ()
    rest = text.rpartition(_PROBE)[2].lstrip()
    ids = tokenizer.encode(rest, add_special_tokens=False) if rest else []
    if not ids:
        return frozenset(), ()
    marker = _MARKER.match(rest)
    if ids[0] in tokenizer.special_ids or (marker and tokenizer.decode(ids[:1]) == marker[0]):
        return frozenset(ids[:1]), ()
    return frozenset(), (marker[0],) if marker else ()


def checked_messages(messages: object) -> list[dict[str, Any]]:
    """Copies of `messages` as templates expect them: contents are texts, the arguments of tool calls are objects.

    ValueError or TypeError, one line that names the message, for what is no conversation.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise TypeError(f'messages must be a list of {{"role": ..., "content": ...}}, got {type(messages).__name__}')
    checked = [_checked(f"messages[{index}]", message) for index, message in enumerate(messages)]
    if not checked:
        raise ValueError('messages is empty: give at least one {"role": "user", "content": ...}')
    return checked


def _checked(where: str, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} must be a dict with role and content, got {type(message).__name__}")
    result = dict(message)
    role = result.get("role")
    if not isinstance(role, str):
        raise ValueError(f"{where} has no role; roles are {', '.join(ROLES)}")
    if role not in ROLES:
        close = difflib.get_close_matches(role.lower(), ROLES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"roles are {', '.join(ROLES)}"
        raise ValueError(f"{where}: unknown role {role!r}; {hint}")
    calls = result.get("tool_calls")
    if calls is not None:
        result["tool_calls"] = _checked_calls(f"{where}.tool_calls", calls)
    content = result.get("content")
    if content is None and not (role == "assistant" and calls):
        raise ValueError(f"{where} has no content")
    if content is not None:
        result["content"] = _checked_content(f"{where}.content", content)
    return result


def _checked_content(where: str, content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise TypeError(f"{where} must be text or a list of text parts, got {type(content).__name__}")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind != "text":
            raise ValueError(f'{where}[{index}]: this model reads {{"type": "text"}} parts only, got {kind!r}')
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}[{index}] has no text")
        texts.append(part["text"])
    return "\n".join(texts)


def _checked_calls(where: str, calls: object) -> list[dict[str, Any]]:
    """OpenAI writes a call's arguments as JSON text, templates want the object."""
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise TypeError(f'{where} must be a list of {{"function": {{"name": ..., "arguments": ...}}}}')
    checked = []
    for index, call in enumerate(calls):
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}[{index}] names no function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                raise ValueError(f"{where}[{index}]: the arguments are not valid JSON: {arguments!r:.80}") from None
        function = {**function, "arguments": arguments}
        checked.append({**call, "function": function} if "function" in call else function)
    return checked
