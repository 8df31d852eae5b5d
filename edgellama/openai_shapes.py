"""llama-cpp-python's calls with OpenAI's results: its users change an import.

The functions are `Llama`'s methods. Names, order and defaults of the arguments are llama-cpp-python's (0.3), also where
ours differ (`temperature`); results are plain dicts of OpenAI's shapes (`openai_types`, made by `openai_results`). What
edgellama does not do is refused by name unless it is left at its default: nothing is ignored.

Other than llama-cpp-python: penalties look at the whole text, not at its last 64 tokens; tools go to the model's own
template, and calls are read from the reply (`tool_calls`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from edgellama.chat import ChatModel, chat, template_of
from edgellama.openai_results import chat_chunks, chat_completion, completion, completion_chunks, head_of
from edgellama.openai_types import ChatCompletion, ChatCompletionChunk, Completion, Embeddings
from edgellama.tool_calls import forcing_schema

Processors = Sequence[Callable[..., Any]]


class Model(ChatModel, Protocol):
    """What these functions need of a model: see `Llama`."""

    @property
    def n_ctx(self) -> int: ...
    @property
    def file(self) -> Any: ...


def create_completion(
    llm: Model,
    prompt: str | Sequence[int],
    suffix: str | None = None,
    max_tokens: int | None = 16,
    temperature: float = 0.8,
    top_p: float = 0.95,
    min_p: float = 0.05,
    typical_p: float = 1.0,
    logprobs: int | None = None,
    echo: bool = False,
    stop: str | Sequence[str] | None = (),
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    repeat_penalty: float = 1.0,
    top_k: int = 40,
    stream: bool = False,
    seed: int | None = None,
    tfs_z: float = 1.0,
    mirostat_mode: int = 0,
    mirostat_tau: float = 5.0,
    mirostat_eta: float = 0.1,
    model: str | None = None,
    stopping_criteria: Any = None,
    logits_processor: Processors | None = None,
    grammar: str | None = None,
    logit_bias: Mapping[int, float] | None = None,
) -> Completion | Iterator[Completion]:
    """The text that follows `prompt` (text, or ids): OpenAI's completion; with `stream`, an iterator of its chunks.

    `max_tokens` None or below 1: until the context is full. `logprobs`: how many of the likeliest tokens to tell at
    each place. `grammar`: GBNF. `suffix`, `tfs_z`, `stopping_criteria` and mirostat 1 are refused. Raises what
    `generate` raises.
    """
    _refuse(suffix=(suffix, None), stopping_criteria=(stopping_criteria, None))
    request = {
        **_sampling(locals()),
        "max_new_tokens": _max_new_tokens(llm, max_tokens),
        "stop": _strings(stop),
        "echo": echo,
        "stream": stream,
        **({} if logprobs is None else {"logprobs": True, "top_logprobs": logprobs}),
    }
    head = head_of("cmpl", llm, model)
    reply = llm.generate(prompt, **request)
    if stream:
        return completion_chunks(reply, head)
    offset = 0 if echo or logprobs is None else len(prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt))
    return completion(reply, head, offset)


def create_chat_completion(
    llm: Model,
    messages: Sequence[Mapping[str, Any]],
    functions: Any = None,
    function_call: Any = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    temperature: float = 0.2,
    top_p: float = 0.95,
    top_k: int = 40,
    min_p: float = 0.05,
    typical_p: float = 1.0,
    stream: bool = False,
    stop: str | Sequence[str] | None = (),
    seed: int | None = None,
    response_format: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    repeat_penalty: float = 1.0,
    tfs_z: float = 1.0,
    mirostat_mode: int = 0,
    mirostat_tau: float = 5.0,
    mirostat_eta: float = 0.1,
    model: str | None = None,
    logits_processor: Processors | None = None,
    grammar: str | None = None,
    logit_bias: Mapping[int, float] | None = None,
    logprobs: bool | None = None,
    top_logprobs: int | None = None,
) -> ChatCompletion | Iterator[ChatCompletionChunk]:
    """The reply to `messages`: OpenAI's chat completion; with `stream`, an iterator of its chunks.

    `tools` go to the model's template; calls in the reply become `tool_calls`. `tool_choice`:
    "none", "auto", "required" or `{"type": "function", "function": {"name": ...}}`; the last two hold the reply to a
    call's form. `response_format`: `{"type": "json_object"}`, with a `schema` if you like, or `{"type": "json_schema",
    "json_schema": {"schema": ...}}`. Both need the extra `edgellama[constrain]`. `functions`, `function_call`, `tfs_z`
    and mirostat 1 are refused. Raises what `chat` raises.
    """
    _refuse(functions=(functions, None), function_call=(function_call, None))
    if top_logprobs is not None and not logprobs:
        raise ValueError("top_logprobs needs logprobs=True")
    names = [_tool_name(index, tool) for index, tool in enumerate(tools or ())]
    forced = _forced_tools(tools or (), names, tool_choice)
    schema = _response_schema(response_format)
    if forced and (schema is not None or grammar is not None):
        raise ValueError(f"tool_choice {tool_choice!r} and response_format or grammar exclude each other")
    if tool_choice == "none":
        tools, names = None, []
    request = {
        **_sampling(locals()),
        "max_new_tokens": _max_new_tokens(llm, max_tokens),
        "stop": _strings(stop),
        "tools": tools or None,
        "stream": stream,
        **({"logprobs": True, "top_logprobs": top_logprobs or 0} if logprobs else {}),
    }
    if forced:
        request["json_schema"] = forcing_schema(forced, _arguments_key(llm))
    elif schema is not None:
        request["json_schema"] = schema
    head = head_of("chatcmpl", llm, model)
    reply: Any = chat(llm, messages, **request)
    return chat_chunks(reply, head, names) if stream else chat_completion(reply, head, names)


def create_embedding(llm: Any, input: str | Sequence[str], model: str | None = None) -> Embeddings:
    """OpenAI's embeddings of a text or several: `llm.embed`, normalized."""
    texts = [input] if isinstance(input, str) else list(input)
    vectors = llm.embed(texts)
    n_tokens = sum(len(llm.tokenizer.encode(text)) for text in texts)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector.tolist()}
            for index, vector in enumerate(vectors)
        ],
        "model": head_of("", llm, model)["model"],
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }


# -- arguments --------------------------------------------------------------------------------------------------------


def _refuse(**arguments: tuple[Any, Any]) -> None:
    """ValueError for an argument (value, default) that is not at its default."""
    for name, (value, default) in arguments.items():
        if value != default:
            raise ValueError(f"{name} is not supported by edgellama; leave it at {default!r}")


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """`generate`'s sampling options, from the arguments that both calls share."""
    _refuse(tfs_z=(given["tfs_z"], 1.0))
    if given["mirostat_mode"] not in (0, 2):
        raise ValueError(f"mirostat_mode must be 0 or 2, got {given['mirostat_mode']!r}")
    if given["grammar"] is not None and not isinstance(given["grammar"], str):
        raise TypeError(f"grammar must be the text of a GBNF grammar, got {type(given['grammar']).__name__}")
    same = ("temperature", "top_p", "min_p", "typical_p", "frequency_penalty", "presence_penalty", "top_k", "seed")
    bias = given["logit_bias"]
    return {
        **{name: given[name] for name in same},
        "repetition_penalty": given["repeat_penalty"],
        "mirostat": given["mirostat_mode"],
        "mirostat_tau": given["mirostat_tau"],
        "mirostat_eta": given["mirostat_eta"],
        "logit_bias": {int(token): value for token, value in bias.items()} if bias else None,
        "logits_processor": given["logits_processor"],
        "grammar": given["grammar"],
    }


def _max_new_tokens(llm: Model, max_tokens: int | None) -> int:
    return llm.n_ctx if max_tokens is None or max_tokens < 1 else max_tokens


def _strings(stop: str | Sequence[str] | None) -> list[str] | None:
    return [stop] if isinstance(stop, str) else list(stop or ()) or None


def _tool_name(index: int, tool: object) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(
            f'tools[{index}] must be {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}'
        )
    return function["name"]


def _forced_tools(
    tools: Sequence[Mapping[str, Any]], names: list[str], choice: str | Mapping[str, Any] | None
) -> list[Mapping[str, Any]]:
    """The functions one of which must be called; none where the model is free."""
    if choice is None or choice in ("none", "auto"):
        return []
    functions = [tool["function"] for tool in tools]
    if not functions:
        raise ValueError(f"tool_choice {choice!r} needs tools")
    if choice == "required":
        return functions
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name not in names:
        raise ValueError(
            f'tool_choice must be "none", "auto", "required" or {{"type": "function", "function": {{"name": one of '
            f"{names}}}}}, got {choice!r}"
        )
    return [function for function in functions if function["name"] == name]


def _arguments_key(llm: Model) -> str:
    """How this model's calls name their arguments: Llama-3's template says "parameters"."""
    source = template_of(llm, tools=True).source
    return "parameters" if "tool_call>" not in source and '"parameters": dictionary' in source else "arguments"


def _response_schema(response_format: Mapping[str, Any] | None) -> Any:
    """The JSON schema that the reply must have; None for free text."""
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return response_format.get("schema") or {"type": "object"}
    if kind == "json_schema":
        wrapper = response_format.get("json_schema")
        if isinstance(wrapper, Mapping) and isinstance(wrapper.get("schema"), Mapping):
            return wrapper["schema"]
        raise ValueError('response_format: "json_schema" must be {"schema": ...}')
    raise ValueError(f"response_format: type must be text, json_object or json_schema, got {kind!r}")
