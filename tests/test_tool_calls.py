"""Tool calls in replies, whole and streamed."""

import json

import pytest

from edgellama.tool_calls import Call, HoldBack, forcing_schema, parse_calls

NAMES = ["get_weather", "add"]
ONE = '{"name": "add", "arguments": {"a": 1}}'
ADD = Call("add", '{"a": 1}')

REPLIES = [
    ("Hello.", "Hello.", []),
    ("", "", []),
    (f"<tool_call>\n{ONE}\n</tool_call>", "", [ADD]),
    (f"I look.\n<tool_call>{ONE}</tool_call>\n<tool_call>{ONE}</tool_call>", "I look.", [ADD, ADD]),
    (f"<tool_call>\n{ONE}", "", [ADD]),  # the end is a token of its own, or was cut off
    (f"<tool_call>\n{ONE}\n{ONE}</tool_call>", "", [ADD, ADD]),
    ('<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', "", [Call("unknown", "{}")]),
    ('<tool_call>{"name": "add", "argum', '<tool_call>{"name": "add", "argum', []),
    (f"<tool_call>{ONE}</tool_call><tool_call>oops</tool_call>", None, []),
    ("<tool_call></tool_call>", "<tool_call></tool_call>", []),
    ('{"name": "get_weather", "parameters": {"city": "Zürich"}}', "", [Call("get_weather", '{"city": "Zürich"}')]),
    (f" {ONE}; {ONE} ", "", [ADD, ADD]),
    ('{"type": "function", "function": {"name": "add", "parameters": {}}}', "", [Call("add", "{}")]),
    ('{"name": "add", "parameters": null}', "", [Call("add", "{}")]),
    ('{"name": "add", "arguments": "{\\"a\\": 1}"}', "", [ADD]),
    ('{"name": "nobody", "parameters": {}}', None, []),  # an answer that is JSON
    ('{"name": "add", "parameters": [1]}', None, []),
    ('{"name": "add", "parameters": {"a": 1', None, []),
    ('{"answer": 42}', None, []),
    ("[1, 2]", None, []),
    ("{" * 5000, None, []),
    ('{"a":' * 5000, None, []),
    (f"As JSON: {ONE}", None, []),
]


@pytest.mark.parametrize(("text", "words", "calls"), REPLIES, ids=range(len(REPLIES)))
def test_calls_are_found(text, words, calls):
    assert parse_calls(text, NAMES) == (text if words is None else words, calls)


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(("text", "words", "calls"), REPLIES, ids=range(len(REPLIES)))
def test_streamed_in_pieces_of_any_size(text, words, calls, size):
    hold = HoldBack()
    shown = "".join(hold.push(text[i : i + size]) for i in range(0, len(text), size))
    assert "<tool_call>" not in shown and not shown.lstrip().startswith("{")
    rest, found = hold.finish(NAMES)
    assert found == calls
    assert (shown + rest).strip() == (text if words is None else words).strip()
    if not calls:
        assert shown + rest == text


def test_text_without_calls_is_shown_at_once():
    hold = HoldBack()
    assert [hold.push(piece) for piece in ("He", "llo <", "b>", " <tool", "s>")] == [
        "He",
        "llo ",
        "<b>",
        " ",
        "<tools>",
    ]


def test_the_schema_that_forces_a_call():
    tools = [
        {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
        {"name": "go"},
    ]
    both = forcing_schema(tools, "arguments")["anyOf"]
    assert both[0]["properties"] == {"name": {"const": "add"}, "arguments": tools[0]["parameters"]}
    assert both[1]["properties"]["arguments"] == {"type": "object"}
    assert forcing_schema(tools[:1], "parameters") == {
        "type": "object",
        "properties": {"name": {"const": "add"}, "parameters": tools[0]["parameters"]},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
    json.dumps(both)
