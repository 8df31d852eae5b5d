"""OpenAI's result shapes, made of edgellama's replies: whole ones, and chunks of streamed ones.

A token's `logprob` is the model's own, before penalties and temperature. The token that ended a text is not part of it,
so it is neither counted nor told. A cancelled reply has the finish_reason "stop", one that ran out of time "length".
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, Protocol, cast

from edgellama.openai_types import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    Completion,
    CompletionLogprobs,
    FinishReason,
    ToolCall,
    TopLogprob,
    Usage,
)
from edgellama.tool_calls import Call, HoldBack, parse_calls


class TokenLogprob(Protocol):
    """What is known of a token: see `edgellama.generate`."""

    text: str
    logprob: float | None
    top: list[tuple[int, str, float]]


class Reply(Protocol):
    """A `Generation`."""

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str
    logprobs: list[Any] | None
    stop: str | None


class ReplyStream(Protocol):
    """A `Stream`."""

    def __iter__(self) -> Iterator[str]: ...
    def close(self) -> None: ...
    @property
    def result(self) -> Reply: ...


def completion(reply: Reply, head: dict[str, Any], offset: int) -> Completion:
    """`offset`: where the reply begins, in characters, if it does not begin with the prompt."""
    logprobs = None if reply.logprobs is None else _completion_logprobs(_shown(reply), offset)
    choice = {"text": reply.text, "index": 0, "logprobs": logprobs, "finish_reason": _finish_reason(reply)}
    return cast(Completion, {**head, "object": "text_completion", "choices": [choice], "usage": _usage(reply)})


def head_of(kind: str, llm: Any, model: str | None) -> dict[str, Any]:
    name = llm.file.path.name if model is None else model
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}


def _finish_reason(reply: Reply) -> FinishReason:
    return "length" if reply.finish_reason in ("length", "time") else "stop"


def _ended_by_token(reply: Reply) -> bool:
    return reply.finish_reason == "stop" and reply.stop is None


def _usage(reply: Reply) -> Usage:
    n_prompt = len(reply.prompt_token_ids)
    n_new = len(reply.token_ids) - _ended_by_token(reply)
    return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


def _shown(reply: Reply) -> list[TokenLogprob]:
    """The log-probabilities without that of the token that ended the text."""
    tokens = reply.logprobs or []
    return tokens[:-1] if _ended_by_token(reply) else tokens


def _completion_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> CompletionLogprobs:
    """The first token of an echoed prompt has nothing before it, so no probability."""
    result: CompletionLogprobs = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
    for token in tokens:
        top = {text: logprob for _, text, logprob in token.top}
        if token.logprob is not None:
            top[token.text] = token.logprob
        result["tokens"].append(token.text)
        result["text_offset"].append(offset)
        result["token_logprobs"].append(token.logprob)
        result["top_logprobs"].append(None if token.logprob is None else top)
        offset += len(token.text)
    return result


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    content: list[ChatTokenLogprob] = [
        {**_top(token.text, token.logprob), "top_logprobs": [_top(text, value) for _, text, value in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _top(text: str, logprob: Any) -> TopLogprob:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def completion_chunks(stream: ReplyStream, head: dict[str, Any]) -> Iterator[Completion]:
    with closing(stream):
        tokens = _NewTokens(stream)
        for piece in stream:
            new = tokens.take()
            yield _completion_chunk(head, piece, None if new is None else _completion_logprobs(new, tokens.offset(new)))
        reply = stream.result
        new = tokens.take()
        rest = None if not new else _completion_logprobs(new, tokens.offset(new))
        yield _completion_chunk(head, "", rest, _finish_reason(reply))


def _completion_chunk(
    head: dict[str, Any], text: str, logprobs: CompletionLogprobs | None, reason: FinishReason | None = None
) -> Completion:
    choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": reason}
    return cast(Completion, {**head, "object": "text_completion", "choices": [choice]})


class _NewTokens:
    """The log-probabilities that a stream has got since the last look."""

    def __init__(self, stream: ReplyStream):
        self._stream, self._seen, self._length = stream, 0, 0

    def take(self) -> list[TokenLogprob] | None:
        reply = self._stream.result
        if reply.logprobs is None:
            return None
        tokens = _shown(reply)
        new, self._seen = tokens[self._seen :], len(tokens)
        return new

    def offset(self, new: list[TokenLogprob]) -> int:
        """Where the first of `new` begins, in characters of what was told before."""
        begin, self._length = self._length, self._length + sum(len(token.text) for token in new)
        return begin


def chat_completion(reply: Reply, head: dict[str, Any], names: list[str]) -> ChatCompletion:
    words, calls = parse_calls(reply.text, names) if names else (reply.text, [])
    message: ChatMessage = {"role": "assistant", "content": words or None if calls else words}
    if calls:
        message["tool_calls"] = [_tool_call(call) for call in calls]
    choice = {
        "index": 0,
        "message": message,
        "logprobs": None if reply.logprobs is None else _chat_logprobs(_shown(reply)),
        "finish_reason": "tool_calls" if calls else _finish_reason(reply),
    }
    return cast(ChatCompletion, {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(reply)})


def chat_chunks(stream: ReplyStream, head: dict[str, Any], names: list[str]) -> Iterator[ChatCompletionChunk]:
    """The role first, then text and calls, the reason of the end last."""

    def chunk(delta: ChatDelta, reason: FinishReason | None = None) -> ChatCompletionChunk:
        new = tokens.take()
        logprobs = _chat_logprobs(new) if new else None
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return cast(ChatCompletionChunk, {**head, "object": "chat.completion.chunk", "choices": [choice]})

    with closing(stream):
        tokens = _NewTokens(stream)
        hold = HoldBack() if names else None
        yield chunk({"role": "assistant", "content": ""})
        for piece in stream:
            shown = piece if hold is None else hold.push(piece)
            if shown:
                yield chunk({"content": shown})
        words, calls = ("", []) if hold is None else hold.finish(names)
        if words:
            yield chunk({"content": words})
        for index, call in enumerate(calls):
            yield chunk({"tool_calls": [{"index": index, **_tool_call(call)}]})
        yield chunk({}, "tool_calls" if calls else _finish_reason(stream.result))


def _tool_call(call: Call) -> ToolCall:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
