# ruff: noqa: E501
"""Messages in, ids out: which template, which BOS, which end, and the mistakes that people make."""

import json

import pytest

from chat_fakes import CHATML, FakeLlm, make_tokenizer
from edgellama.chat import chat, checked_messages, encode_prompt, end_of_turn, prepare, template_of
from edgellama.errors import ChatTemplateError, TokenizerError
from edgellama.tokenizer import load_tokenizer

HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def text_of(llm: FakeLlm, **arguments) -> str:
    return prepare(llm, HI, **arguments).text


# -- which template ---------------------------------------------------------------------------------------------------


def test_the_models_own_template_gets_its_special_tokens():
    llm = FakeLlm(
        tokenizer=make_tokenizer(
            "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token }}{{ pad_token }}"
        )
    )
    assert text_of(llm) == "<s>Hi</s><unk>"


def test_named_templates():
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T {{ tools[0].function.name }}"}]
    llm = FakeLlm(tokenizer=make_tokenizer(named))
    assert text_of(llm) == "D"
    assert text_of(llm, tools=[TOOL]) == "T f"
    assert text_of(llm, template="tool_use", tools=[TOOL]) == "T f"
    with pytest.raises(ChatTemplateError, match=r"several chat templates; choose one with template=: a, b"):
        text_of(FakeLlm(tokenizer=make_tokenizer({"a": "A", "b": "B"})))


def test_a_model_without_template_says_which_option_helps():
    llm = FakeLlm(tokenizer=make_tokenizer(None))
    with pytest.raises(
        ChatTemplateError, match=r"no chat template; choose one with template= .*llama-2, llama-3, chatml, zephyr"
    ):
        text_of(llm)
    assert text_of(llm, template="chatml") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(llm, template="llama-2") == "<s>[INST] Hi [/INST]"
    assert "<<SYS>>\nYou are a helpful, respectful" in text_of(
        llm, template="llama-2", template_variables={"use_default_system_prompt": True}
    )
    assert text_of(llm, template="{{ messages[0].content }}!") == "Hi!"
    with pytest.raises(ChatTemplateError, match="there is no chat template 'chatlm'; choose llama-2"):
        text_of(llm, template="chatlm")


def test_compiled_once():
    llm = FakeLlm()
    assert template_of(llm) is template_of(llm) is not template_of(llm, "zephyr")


def test_tools_that_the_template_does_not_know_are_not_dropped():
    llm = FakeLlm(tokenizer=make_tokenizer("{{ messages[0].content }}"))
    with pytest.raises(ChatTemplateError, match="knows no tools: leave tools= out"):
        text_of(llm, tools=[TOOL])
    with pytest.raises(ChatTemplateError, match="knows no documents"):
        text_of(llm, documents=[{"title": "t", "text": "x"}])


# -- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writes_bos", [True, False])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_is_there_once_where_the_model_expects_it(writes_bos, adds_bos):
    tokenizer = make_tokenizer(bos=adds_bos)
    ids = encode_prompt(tokenizer, "<s>ab" if writes_bos else "ab")
    assert ids.count(1) == (1 if adds_bos or writes_bos else 0)
    assert ids == [*[1] * (adds_bos or writes_bos), 3 + ord("a"), 3 + ord("b")]


def test_special_tokens_become_their_ids():
    llm = FakeLlm(tokenizer=make_tokenizer(special=("<|im_start|>", "<|im_end|>"), bos=False))
    start, end = (llm.tokenizer.encode(text, add_special_tokens=False)[0] for text in ("<|im_start|>", "<|im_end|>"))
    ids = prepare(llm, HI).ids
    assert (ids[0], ids.count(start), ids.count(end)) == (start, 2, 1)
    assert llm.tokenizer.decode(ids) == prepare(llm, HI).text


def test_invalid_text_is_an_error():
    with pytest.raises(TokenizerError, match="lone surrogate"):
        prepare(FakeLlm(), [{"role": "user", "content": "\ud800"}])


# -- the end of a turn ------------------------------------------------------------------------------------------------


def test_the_templates_end_of_turn_ends_the_reply():
    special = ("<|im_start|>", "<|im_end|>")
    with_token = FakeLlm(tokenizer=make_tokenizer(special=special))
    end = with_token.tokenizer.encode("<|im_end|>", add_special_tokens=False)[0]
    assert end_of_turn(template_of(with_token), with_token.tokenizer) == ({end}, ())
    assert prepare(with_token, HI).eos_ids == {2, end}
    without = FakeLlm(tokenizer=make_tokenizer(CHATML))
    assert end_of_turn(template_of(without), without.tokenizer) == (frozenset(), ("<|im_end|>",))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}", ({2}, ())),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", (set(), ())),
        ("{% for m in messages %}{{ m.content }}. Next{% endfor %}", (set(), ())),
        ("{{ raise_exception('no') }}", (set(), ())),
        ("{{ messages[0].content }}", (set(), ())),
    ],
)
def test_ends_that_are_none(source, expected):
    llm = FakeLlm(tokenizer=make_tokenizer(source))
    assert end_of_turn(template_of(llm), llm.tokenizer) == expected


def test_generate_gets_ids_and_everything_else():
    llm = FakeLlm(tokenizer=make_tokenizer(CHATML))
    reply = chat(llm, HI, max_new_tokens=5, temperature=0, stop="x", seed=7)
    assert reply.text == "Hello"
    assert llm.calls[0] == {
        "prompt": prepare(llm, HI).ids,
        "max_new_tokens": 5,
        "stream": False,
        "stop": ["x", "<|im_end|>"],
        "eos_token_id": [2],
        "temperature": 0,
        "seed": 7,
    }
    assert "".join(chat(llm, HI, stream=True)) == "Hello"
    chat(llm, HI, eos_token_id=9, stop=["<|im_end|>"])
    assert llm.calls[-1]["eos_token_id"] == 9 and llm.calls[-1]["stop"] == ["<|im_end|>"]


def test_continuing_the_last_message():
    llm = FakeLlm()
    chat(llm, [*HI, {"role": "assistant", "content": "It is"}], continue_final_message=True)
    assert llm.tokenizer.decode(llm.calls[0]["prompt"]).endswith("<|im_start|>assistant\nIt is")


# -- messages ---------------------------------------------------------------------------------------------------------


def test_text_parts_are_joined_and_nothing_of_the_callers_is_changed():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = [{"role": "user", "content": parts, "name": "me"}]
    assert checked_messages(given) == [{"role": "user", "content": "a\nb", "name": "me"}]
    assert given == [{"role": "user", "content": parts, "name": "me"}]


def test_arguments_of_calls_become_objects():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    (message,) = checked_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert call["function"]["arguments"] == '{"x": 1}'


@pytest.mark.parametrize(
    ("messages", "kind", "words"),
    [
        ("Hi", TypeError, r"messages must be a list of .*, got str"),
        ({"role": "user", "content": "Hi"}, TypeError, "messages must be a list of .*, got dict"),
        (None, TypeError, "got NoneType"),
        ([], ValueError, "messages is empty"),
        (["Hi"], TypeError, r"messages\[0\] must be a dict with role and content, got str"),
        ([{"content": "Hi"}], ValueError, r"messages\[0\] has no role; roles are system,"),
        (
            [*HI, {"role": "asistant", "content": "x"}],
            ValueError,
            r"messages\[1\]: unknown role 'asistant'; did you mean 'assistant'\?",
        ),
        ([{"role": "zzz", "content": "x"}], ValueError, "unknown role 'zzz'; roles are system"),
        ([{"role": "user"}], ValueError, r"messages\[0\] has no content"),
        ([{"role": "assistant", "content": None}], ValueError, r"messages\[0\] has no content"),
        (
            [{"role": "user", "content": b"x"}],
            TypeError,
            r"messages\[0\]\.content must be text or a list of text parts, got bytes",
        ),
        ([{"role": "user", "content": ["x"]}], ValueError, r"content\[0\]: this model reads .*, got 'str'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], ValueError, "got 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], ValueError, r"content\[0\] has no text"),
        ([{"role": "assistant", "tool_calls": "x"}], TypeError, r"messages\[0\]\.tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], ValueError, r"tool_calls\[0\] names no function"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            ValueError,
            "not valid JSON: '{'",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(messages, kind, words):
    with pytest.raises(kind, match=words) as caught:
        chat(FakeLlm(), messages)
    assert "\n" not in str(caught.value)


# -- a real model's -----------------------------------------------------------------------------------------------------


@pytest.mark.models
def test_minimind(minimind_dir):
    files = {path.name: path.read_bytes() for path in minimind_dir.glob("*.json") if path.stem != "config"}
    llm = FakeLlm(tokenizer=load_tokenizer(files))
    prompt = prepare(llm, HI)
    start, end = llm.tokenizer.bos_id, llm.tokenizer.eos_id
    assert prompt.text.startswith("<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nHi")
    assert prompt.ids[0] == start and prompt.ids.count(start) == 3 and end in prompt.eos_ids
    assert prompt.stop == ()


@pytest.mark.torch
@pytest.mark.models
def test_minimind_ids_are_those_of_transformers(minimind_dir):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(minimind_dir)
    files = {path.name: path.read_bytes() for path in minimind_dir.glob("*.json") if path.stem != "config"}
    llm = FakeLlm(tokenizer=load_tokenizer(files))
    for messages, tools in [(HI, None), (HI, [TOOL]), ([{"role": "system", "content": "Sei kurz."}, *HI], None)]:
        ids = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
        assert prepare(llm, messages, tools=tools).ids == ids
    assert json.dumps(TOOL) in prepare(llm, HI, tools=[TOOL]).text
