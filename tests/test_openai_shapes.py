# ruff: noqa: E501
"""llama-cpp-python's arguments, OpenAI's results."""

import inspect
import json

import pytest

from chat_fakes import CHATML, FakeLlm, make_tokenizer
from edgellama.model import Llama
from edgellama.openai_shapes import create_chat_completion, create_completion, create_embedding

HI = [{"role": "user", "content": "Hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "add"}},
]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'


def head(result: dict) -> dict:
    """What every answer begins with, checked; the rest."""
    assert result.pop("id").startswith(("cmpl-", "chatcmpl-")) and isinstance(result.pop("created"), int)
    assert result.pop("model") == "fake.edgellama"
    json.dumps(result)
    return result


# -- signatures -------------------------------------------------------------------------------------------------------

COMPLETION = (
    "prompt suffix=None max_tokens=16 temperature=0.8 top_p=0.95 min_p=0.05 typical_p=1.0 logprobs=None echo=False stop=() "
    "frequency_penalty=0.0 presence_penalty=0.0 repeat_penalty=1.0 top_k=40 stream=False seed=None tfs_z=1.0 mirostat_mode=0 "
    "mirostat_tau=5.0 mirostat_eta=0.1 model=None stopping_criteria=None logits_processor=None grammar=None logit_bias=None"
)
CHAT = (
    "messages functions=None function_call=None tools=None tool_choice=None temperature=0.2 top_p=0.95 top_k=40 min_p=0.05 "
    "typical_p=1.0 stream=False stop=() seed=None response_format=None max_tokens=None presence_penalty=0.0 "
    "frequency_penalty=0.0 repeat_penalty=1.0 tfs_z=1.0 mirostat_mode=0 mirostat_tau=5.0 mirostat_eta=0.1 model=None "
    "logits_processor=None grammar=None logit_bias=None logprobs=None top_logprobs=None"
)


@pytest.mark.parametrize(
    ("method", "expected"),
    [("create_completion", COMPLETION), ("__call__", COMPLETION), ("create_chat_completion", CHAT)],
)
def test_signatures_are_those_of_llama_cpp_python(method, expected):
    parameters = list(inspect.signature(getattr(Llama, method)).parameters.values())[1:]
    shown = (p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    assert " ".join(shown) == expected


# -- completions ------------------------------------------------------------------------------------------------------


def test_a_completion():
    llm = FakeLlm(says="Hello")
    result = head(create_completion(llm, "Say: "))
    assert result == {
        "object": "text_completion",
        "choices": [{"text": "Hello", "index": 0, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 6, "completion_tokens": 5, "total_tokens": 11},
    }
    assert llm.calls[0] == {
        "prompt": "Say: ", "max_new_tokens": 16, "stream": False, "stop": None, "echo": False, "temperature": 0.8,
        "top_p": 0.95, "min_p": 0.05, "typical_p": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "top_k": 40,
        "seed": None, "repetition_penalty": 1.0, "mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1,
        "logit_bias": None, "logits_processor": None, "grammar": None,
    }  # fmt: skip


def test_arguments_reach_generate():
    llm = FakeLlm()
    processor = [lambda ids, logits: logits]
    create_completion(
        llm, [5, 6], None, 7, 0.1, 0.2, 0.3, 0.4, None, False, "x", 0.5, 0.6, 1.7, 8, seed=9, mirostat_mode=2,
        mirostat_tau=1.0, mirostat_eta=0.2, model="m", logits_processor=processor, grammar="root ::= [a]",
        logit_bias={"12": -100},
    )  # fmt: skip
    assert llm.calls[0] == {
        "prompt": [5, 6], "max_new_tokens": 7, "stream": False, "stop": ["x"], "echo": False, "temperature": 0.1,
        "top_p": 0.2, "min_p": 0.3, "typical_p": 0.4, "frequency_penalty": 0.5, "presence_penalty": 0.6, "top_k": 8,
        "seed": 9, "repetition_penalty": 1.7, "mirostat": 2, "mirostat_tau": 1.0, "mirostat_eta": 0.2,
        "logit_bias": {12: -100}, "logits_processor": processor, "grammar": "root ::= [a]",
    }  # fmt: skip


@pytest.mark.parametrize("unlimited", [None, 0, -1])
def test_max_tokens_without_limit(unlimited):
    llm = FakeLlm(n_ctx=99)
    create_completion(llm, "x", max_tokens=unlimited)
    create_chat_completion(llm, HI, max_tokens=unlimited)
    assert [call["max_new_tokens"] for call in llm.calls] == [99, 99]


@pytest.mark.parametrize(
    ("reason", "stop", "told", "n"),
    [("stop", None, "stop", 5), ("stop", "!", "stop", 5), ("length", None, "length", 5), ("time", None, "length", 5)],
)
def test_why_it_ended_and_what_counts(reason, stop, told, n):
    llm = FakeLlm(says="Hello", finish_reason=reason, stop=stop)
    for result in (create_completion(llm, "x"), create_chat_completion(llm, HI)):
        assert result["choices"][0]["finish_reason"] == told
        assert result["usage"]["completion_tokens"] == n


def test_the_models_name_can_be_chosen():
    assert create_completion(FakeLlm(), "x", model="gpt-x")["model"] == "gpt-x"


def test_completion_logprobs():
    llm = FakeLlm(says="ab")
    result = create_completion(llm, "Say: ", logprobs=2)
    assert llm.calls[0]["logprobs"] is True and llm.calls[0]["top_logprobs"] == 2
    assert result["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "text_offset": [5, 6],
        "token_logprobs": [0.0, -1.0],
        "top_logprobs": [{"t0": 0.0, "t1": -1.0, "a": 0.0}, {"t0": 0.0, "t1": -1.0, "b": -1.0}],
    }


def test_echo():
    llm = FakeLlm(says="ab")
    result = create_completion(llm, "Say: ", echo=True, logprobs=0)
    assert result["choices"][0]["text"] == "Say: ab"
    assert result["choices"][0]["logprobs"]["text_offset"][0] == 0


def test_a_streamed_completion():
    llm = FakeLlm(says="Hello you", finish_reason="length")
    chunks = list(create_completion(llm, "x", stream=True, logprobs=1))
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hel", "lo ", "you", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert "".join(token for each in logprobs if each for token in each["tokens"]) == "Hello you"
    assert [each["text_offset"][0] for each in logprobs[:3]] == [0, 3, 6]
    assert all(set(head(chunk)) == {"object", "choices"} for chunk in chunks)
    assert llm.streams[0].closed


def test_a_stream_that_is_dropped_frees_the_model():
    llm = FakeLlm(says="Hello you")
    chunks = create_completion(llm, "x", stream=True)
    next(chunks)
    chunks.close()
    assert llm.streams[0].closed


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("suffix", "x", "suffix is not supported"),
        ("tfs_z", 0.5, "tfs_z is not supported"),
        ("stopping_criteria", [1], "stopping_criteria is not supported"),
        ("mirostat_mode", 1, "mirostat_mode must be 0 or 2"),
        ("grammar", object(), "grammar must be the text of a GBNF grammar"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_is_not_supported_is_refused_at_once(argument, value, words, stream):
    with pytest.raises((ValueError, TypeError), match=words):
        create_completion(FakeLlm(), "x", stream=stream, **{argument: value})


# -- chat completions -------------------------------------------------------------------------------------------------


def test_a_chat_completion():
    llm = FakeLlm(says="Hello")
    result = head(create_chat_completion(llm, HI))
    assert result.pop("usage")["completion_tokens"] == 5
    assert result == {
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
    }
    assert llm.tokenizer.decode(llm.calls[0]["prompt"]).endswith("Hi<|im_end|>\n<|im_start|>assistant\n")
    assert llm.calls[0]["temperature"] == 0.2 and llm.calls[0]["stop"] == ["<|im_end|>"]
    assert "json_schema" not in llm.calls[0] and "logprobs" not in llm.calls[0]


def test_chat_logprobs():
    llm = FakeLlm(says="é")
    result = create_chat_completion(llm, HI, logprobs=True, top_logprobs=1)
    assert result["choices"][0]["logprobs"] == {
        "content": [
            {"token": "é", "logprob": 0.0, "bytes": [195, 169], "top_logprobs": [{"token": "t0", "logprob": 0.0, "bytes": [116, 48]}]}
        ],
        "refusal": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match="top_logprobs needs logprobs=True"):
        create_chat_completion(llm, HI, top_logprobs=1)


def test_a_streamed_chat():
    llm = FakeLlm(says="Hello you")
    chunks = [head(chunk) for chunk in create_chat_completion(llm, HI, stream=True, logprobs=True)]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello you"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    told = [
        token["token"] for chunk in chunks for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert "".join(told) == "Hello you"


def test_tool_calls():
    llm = FakeLlm(says="I look.\n" + CALL)
    result = create_chat_completion(llm, HI, tools=TOOLS)
    choice = result["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    (call,) = choice["message"]["tool_calls"]
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}
    assert json.dumps(TOOLS) in llm.tokenizer.decode(llm.calls[0]["prompt"])
    # the answer goes back into the conversation as it is
    again = [*HI, {**choice["message"], "tool_calls": [{**call, "id": "1"}]}, {"role": "tool", "content": "sunny"}]
    create_chat_completion(llm, again, tools=TOOLS)


def test_content_is_null_beside_calls_alone():
    message = create_chat_completion(FakeLlm(says=CALL), HI, tools=TOOLS)["choices"][0]["message"]
    assert message["content"] is None and len(message["tool_calls"]) == 1


def test_without_tools_a_reply_is_a_reply():
    message = create_chat_completion(FakeLlm(says=CALL), HI)["choices"][0]["message"]
    assert message == {"role": "assistant", "content": CALL}
    llm = FakeLlm(says=CALL)
    message = create_chat_completion(llm, HI, tools=TOOLS, tool_choice="none")["choices"][0]["message"]
    assert message == {"role": "assistant", "content": CALL}
    assert "get_weather" not in llm.tokenizer.decode(llm.calls[0]["prompt"])


@pytest.mark.parametrize("piece", [1, 4, 1000])
def test_streamed_tool_calls(piece):
    llm = FakeLlm(says="I look. " + CALL + CALL, piece=piece)
    chunks = list(create_chat_completion(llm, HI, tools=TOOLS, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "I look. "
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 1]
    assert calls[1]["function"] == {"name": "get_weather", "arguments": '{"city": "Bern"}'}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls" and deltas[-1] == {}


def test_a_call_can_be_forced():
    llm = FakeLlm(says='{"name": "add", "arguments": {}}')
    result = create_chat_completion(llm, HI, tools=TOOLS, tool_choice="required")
    assert [each["properties"]["name"] for each in llm.calls[0]["json_schema"]["anyOf"]] == [
        {"const": "get_weather"},
        {"const": "add"},
    ]
    assert result["choices"][0]["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": "{}"}
    choice = {"type": "function", "function": {"name": "get_weather"}}
    create_chat_completion(llm, HI, tools=TOOLS, tool_choice=choice)
    assert llm.calls[1]["json_schema"]["properties"]["arguments"] == PARAMETERS


def test_llama_3_calls_have_parameters():
    source = CHATML + """{% if tools %}Respond in the format {"name": f, "parameters": dictionary of ...}{% endif %}"""
    llm = FakeLlm(tokenizer=make_tokenizer(source), says='{"name": "add", "parameters": {"a": 1}}')
    result = create_chat_completion(llm, HI, tools=TOOLS, tool_choice="required")
    assert "parameters" in llm.calls[0]["json_schema"]["anyOf"][0]["properties"]
    assert result["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_object", "schema": PARAMETERS}, PARAMETERS),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": PARAMETERS}}, PARAMETERS),
    ],
)
def test_response_formats(response_format, schema):
    llm = FakeLlm()
    create_chat_completion(llm, HI, response_format=response_format)
    assert llm.calls[0].get("json_schema") == schema


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"functions": []}, "functions is not supported"),
        ({"function_call": "auto"}, "function_call is not supported"),
        ({"tfs_z": 0.5}, "tfs_z is not supported"),
        ({"response_format": {"type": "xml"}}, "type must be text, json_object or json_schema, got 'xml'"),
        ({"response_format": "json"}, "type must be text"),
        ({"response_format": {"type": "json_schema"}}, r'"json_schema" must be'),
        ({"tools": [{"name": "f"}]}, r"tools\[0\] must be"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": TOOLS, "tool_choice": "always"}, r"tool_choice must be .*get_weather"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "nobody"}}}, "tool_choice must be"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "exclude each other"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_wrong_arguments_are_refused_at_once(arguments, words, stream):
    with pytest.raises(ValueError, match=words):
        create_chat_completion(FakeLlm(), HI, stream=stream, **arguments)


def test_embeddings():
    result = create_embedding(FakeLlm(), ["ab", "c"])
    assert result == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.0, 1.0]},
            {"object": "embedding", "index": 1, "embedding": [2.0, 3.0]},
        ],
        "model": "fake.edgellama",
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }
    assert len(create_embedding(FakeLlm(), "ab")["data"]) == 1


def test_the_ending_token_is_never_told():
    llm = FakeLlm(says="ab", piece=10)
    chunks = list(create_completion(llm, "x", stream=True, logprobs=0))
    assert [token for chunk in chunks for token in (chunk["choices"][0]["logprobs"] or {"tokens": []})["tokens"]] == [
        "a",
        "b",
    ]
