# ruff: noqa: E501
"""Rendered prompts are transformers', template by template; the rules around them."""

import enum
import threading
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest

from chat_cases import CASES, TEMPLATES, TOKENS, WEATHER, golden, source
from edgellama.chat_template import BUILT_IN, LLAMA_2_SYSTEM_PROMPT, ChatTemplate
from edgellama.chat_template.functions import json_schema_of
from edgellama.errors import ChatTemplateError, EdgellamaError

HI = [{"role": "user", "content": "Hi"}]


def render(template: ChatTemplate, case) -> str | None:
    """None where the conversation is refused."""
    try:
        return template.render(case.messages, **case.arguments())
    except (EdgellamaError, ValueError):
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_are_those_of_transformers(name):
    template = ChatTemplate(source(name), **TOKENS)
    assert {case.name: render(template, case) for case in CASES} == golden()[name]


def test_the_golden_texts_are_worth_comparing():
    texts = golden()
    assert len(texts) >= 10
    assert all(sum(text is not None for text in each.values()) >= 8 for each in texts.values())
    assert any(text is None for each in texts.values() for text in each.values())


@pytest.mark.torch
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_golden_texts_are_up_to_date(name):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS.values())}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=source(name), **TOKENS)
    for case in CASES:
        try:
            text = tokenizer.apply_chat_template(case.messages, tokenize=False, **case.arguments())
        except Exception:
            text = None
        assert golden()[name][case.name] == text, case.name


# -- Jinja itself: what we generate behaves as what Jinja generates ---------------------------------------------------

SNIPPETS = [
    "{{ 1 + 2 * 3 ** 2 // 4 % 5 - 6 / 4 }} {{ -1 }} {{ +1 }} {{ 7 // 2 }} {{ 'a' * 3 }} {{ [1] * 2 + [3] }} {{ (1,) + (2,) }}",
    "{{ 'x' ~ 1 ~ none ~ [1, 'a'] }} {{ 1 < 2 < 3 }} {{ 'a' in 'abc' }} {{ 'k' in {'k': 1} }} {{ [1] == [1] }} {{ 1 not in [2] }}",
    "{{ 'Hello World'[1:-1:2] }} {{ [1, 2, 3][::-1] }} {{ (1, 2, 3)[:2] }} {{ 'abc'[-1] }} {{ [1, 2][5] }} {{ {'a': 1}['a'] }}",
    "{% for x in [1, 2, 3] %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }}{{ loop.cycle('a', 'b') }}"
    "{{ loop.previtem }}{{ loop.nextitem }}{{ loop.revindex0 }}{{ loop.changed(x) }},{% else %}none{% endfor %}",
    "{% for x in [] %}{% else %}empty{% endfor %}{% for k, v in {'a': 1, 'b': 2}.items() if v > 1 %}{{ k }}{{ loop.index }}{% endfor %}",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop.depth }}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}",
    "{% for x in range(9) %}{% if x == 3 %}{% continue %}{% endif %}{% if x > 5 %}{% break %}{% endif %}{{ x }}{% endfor %}",
    "{% for x in [3, 4] | map('string') %}{{ loop.length }}{{ loop.last }}{{ x }}{% endfor %}",
    "{% macro m(a, b='B') %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{{ caller() if caller }}{% endmacro %}"
    "{{ m(1) }}{{ m(1, 2, 3, c=4) }}{% call m('x') %}called{% endcall %}",
    "{% set a %}x{{ 1 }}{% endset %}{{ a }}{% set b | upper %}y{% endset %}{{ b }}{% filter upper %}z{{ a }}{% endfilter %}",
    "{% set ns = namespace(a=1, b=[]) %}{% for i in [1, 2] %}{% set ns.a = ns.a + i %}{% set ns.b = ns.b + [i] %}{% endfor %}{{ ns.a }}{{ ns.b }}",
    "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a }}{% block t %}in {{ d.k }}{% endblock %}{{ self.t() if false }}",
    "{{ 'a,b,,c'.split(',') }} {{ 'a b'.split() }} {{ 'abcabc'.replace('b', 'XX') }} {{ ' x '.strip() }} {{ 'xxaxx'.strip('x') }}"
    " {{ 'a-b-c'.rsplit('-', 1) }} {{ ', '.join(['a', 'b']) }} {{ 'abc'.startswith('a') }} {{ 'a'.center(5) }} {{ 'ab'.title() }}",
    "{{ '{} {x!r:>5} {0[0]}'.format('ab', x='c') }} {{ '%s|%5d|%-5s|%%|%(a)s' % {'a': 1} if false }} {{ '%s|%5d|%-5s|%%' % ('a', 2, 'b') }}",
    "{{ '%(a)s' % {'a': 1} }} {{ '{a.k}'.format(a=d) }} {{ '{a}'.format_map({'a': 1}) }} {{ 'x %s' | format(1) }} {{ '{:,.2f}'.format(1234.5) }}",
    "{{ d.k }} {{ d['k'] }} {{ d.items() | list }} {{ d.get('z', 5) }} {{ d.keys() | list }} {{ d | length }} {{ d.z }} {{ d.z is defined }}",
    "{{ [3, 1, 2] | sort }} {{ ['b', 'A'] | sort }} {{ [1, 1, 2] | unique | list }} {{ [1, 2, 3] | sum }} {{ [1, 5] | max }} {{ [1, 5] | min }}",
    "{{ users | map(attribute='n') | join('+') }} {{ users | selectattr('a') | list | length }} {{ users | rejectattr('a') | first }}",
    "{{ users | groupby('a') }} {% for g in users | groupby('a') %}{{ g.grouper }}{{ g.list | length }}{{ g[0] }}{% endfor %}",
    "{{ users | sort(attribute='n', reverse=true) | map(attribute='n') | list }} {{ users | sum(attribute='v') }} {{ d | dictsort }}",
    "{{ [1, 2, 3, 4] | batch(3, 0) | list }} {{ [1, 2, 3] | slice(2) | list }} {{ [1, 2] | reverse | list }} {{ 'abc' | reverse }} {{ 'ab' | list }}",
    "{{ 'a\nb' | indent }} {{ 'a\nb' | indent(2, true) }} {{ 'a b c' | replace('b', 'X') }} {{ 'x' | center(5) }} {{ 'abc' | truncate(2, true, '') }}",
    "{{ '<a>&\"' | e }} {{ '<' | safe }} {{ ('<' | safe) + '<' }} {{ ('<%s>' | safe) % '<' }} {{ '<' | forceescape }} {{ ('a' | e).join(['<', 'b']) }}",
    "{{ '42' | int }} {{ 'x' | int(7) }} {{ '1.5' | float }} {{ 1.256 | round(2) }} {{ 1.5 | round | int }} {{ -3 | abs }} {{ 'ff' | int(base=16) }}",
    "{{ none | default('d') }} {{ '' | default('d', true) }} {{ nothing | d('e') }} {{ 'a b' | wordcount }} {{ 'a b&c' | urlencode }} {{ 5 | string }}",
    "{{ {'b': 1, 'a': [1.5, none, true, 'ü<']} | tojson }} {{ [1] | tojson(indent=2) }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}"
    " {{ 'ü' | tojson(ensure_ascii=true) }} {{ {'a': 1} | tojson(separators=(',', ':')) }}",
    "{{ 1 is odd }} {{ 2 is even }} {{ 4 is divisibleby 2 }} {{ 'a' is string }} {{ d is mapping }} {{ [] is sequence }} {{ none is none }}"
    " {{ 1 is eq 1 }} {{ 1 is in [1] }} {{ 'A' is upper }} {{ true is true }} {{ 1.0 is float }} {{ 1 is integer }} {{ m is undefined }} {{ 1 is sameas 1 }}",
    "{{ 'x' if false }}{{ 'x' if true else 'y' }}{{ not true }}{{ 1 and 0 or 2 }}{{ (1, 2) }}{{ {'a': 1}.a }}{{ [] or 'e' }}{{ {}.a.b if false }}",
    "{% set x = joiner('|') %}{{ x() }}a{{ x() }}b{{ x() }}{% set c = cycler(1, 2) %}{{ c.next() }}{{ c.next() }}{{ c.current }}{{ c.reset() }}",
    "{{ dict(a=1, **{'b': 2}) }}{{ dict([('a', 1)]) }}{{ range(3) | list }}{{ range(5, 1, -2) | list }}{{ [1, 2].index(2) }}{{ [1, 1].count(1) }}",
    "  {%- if true %}  a  {% endif %}\n  {% if true %}\n  b\n  {% endif %}\n{# comment #}\n{% raw %}{{ x }}{% endraw %}\n{{- 'c' -}}\n d",
    "{% set d = {'x': 1} %}{% if d %}{% set d = 2 %}{% endif %}{{ d }}{% for i in [1] %}{% set d = 3 %}{% endfor %}{{ d }}",
    "{{ d.__class__ }}{{ d._x }}{{ 'a'.nothing }}{{ [1].append }}{{ users[0]['__class__'] }}",
    "{% generation %}{% set inner = 1 %}x{{ d.k }}{% endgeneration %}{{ inner }}",
]  # fmt: skip
DATA: dict[str, Any] = {
    "d": {"k": "v", "l": 2},
    "users": [{"n": "a", "a": 1, "v": 2}, {"n": "b", "a": 0, "v": 3}, {"n": "c", "a": 1, "v": 4}],
}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_render_as_in_jinja(snippet):
    """The same settings without our code generator, hooks, filters and lists of what is allowed."""
    import json

    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    plain.filters["tojson"] = tojson
    without_tag = snippet.replace("{% generation %}", "{% filter string %}").replace(
        "{% endgeneration %}", "{% endfilter %}"
    )
    expected = plain.from_string(without_tag).render(messages=HI, **DATA)
    assert ChatTemplate(snippet).render(HI, **DATA) == expected


# -- the rules around a template --------------------------------------------------------------------------------------


def test_variables_and_special_tokens():
    template = ChatTemplate("{{ bos_token }}{{ x }}{{ eos_token }}{{ pad_token }}", bos_token="<s>", eos_token="</s>")
    assert template.render(HI) == "<s></s>"
    assert template.render(HI, x=5, eos_token="!") == "<s>5!"


def test_the_generation_prompt_is_there_unless_a_message_goes_on():
    template = ChatTemplate("{{ messages[-1].content }}{{ '|' if add_generation_prompt }}")
    assert template.render(HI) == "Hi|"
    assert template.render(HI, add_generation_prompt=False) == "Hi"
    assert template.render(HI, continue_final_message=True) == "Hi"
    with pytest.raises(ValueError, match="exclude each other"):
        template.render(HI, continue_final_message=True, add_generation_prompt=True)


def test_continuing_what_cannot_be_continued():
    with pytest.raises(ChatTemplateError, match="leaves out the last message"):
        ChatTemplate("{{ messages[0].role }} content").render(HI, continue_final_message=True)
    with pytest.raises(ValueError, match="no 'content' to continue"):
        ChatTemplate("{{ messages[0].content }}").render([{"role": "user"}], continue_final_message=True)
    with pytest.raises(ValueError, match="does not use 'reasoning'"):
        ChatTemplate("{{ 1 }}").render([{"role": "user", "reasoning": "x"}], continue_final_message="reasoning")


def test_wrong_arguments():
    template = ChatTemplate("x")
    with pytest.raises(ValueError, match="no messages"):
        template.render([])
    with pytest.raises(TypeError, match=r"messages\[1\] must be a dict"):
        template.render([*HI, "Hi"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"tools\[0\] must be"):
        template.render(HI, tools=["f"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"documents\[0\] must be"):
        template.render(HI, documents=["d"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="must be str"):
        ChatTemplate(None)  # type: ignore[arg-type]


class _Colour(enum.StrEnum):
    RED = "red"


@dataclass
class _Point:
    x: int


def test_a_template_sees_plain_data_only():
    values = [_Colour.RED, np.float32(0.5), np.bool_(True), np.zeros(3), b"x", _Point(1), {"a": (1, None)}, {1}]
    template = ChatTemplate(
        "{% for x in v %}{{ x }};{% endfor %}{{ v[0].name is defined }}{{ v[3].tofile is defined }}"
    )
    assert template.render(HI, v=values) == "red;0.5;True;<ndarray>;<bytes>;{'x': 1};{'a': (1, None)};<set>;FalseFalse"


def test_a_long_conversation_renders():
    """The budget grows with the caller's own input."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": "Grüße! " * 200} for i in range(2000)]
    text = ChatTemplate(source("llama-3-instruct"), **TOKENS).render(messages)
    assert len(text) > 2_700_000
    many = [{"role": ("user", "assistant")[i % 2], "content": "x"} for i in range(5001)]
    assert ChatTemplate(source("mistral-instruct-v0.3"), **TOKENS).render(many).count("x") == 5001


def test_threads_take_turns():
    template = ChatTemplate(source("hermes-tools"), **TOKENS)
    case = next(case for case in CASES if case.name == "tools")
    texts: list[str | None] = []

    def work() -> None:
        for _ in range(20):
            texts.append(render(template, case))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 160 and set(texts) == {golden()["hermes-tools"]["tools"]}


@pytest.mark.parametrize(
    ("name", "golden_name"),
    [("llama-2", "llama-2-chat"), ("llama-3", "llama-3-instruct"), ("chatml", "chatml")],
)
def test_built_in_templates_are_the_models_own(name, golden_name):
    template = ChatTemplate(BUILT_IN[name], **TOKENS)
    for case in CASES:
        text = golden()[golden_name][case.name]
        if case.messages[-1].get("tool_calls") or case.name.startswith("tool-turns") or case.name == "continue-parts":
            continue  # conversations that neither template is made for
        assert render(template, case) == text, case.name


def test_built_in_zephyr():
    text = ChatTemplate(BUILT_IN["zephyr"], **TOKENS).render([{"role": "system", "content": "S"}, *HI])
    assert text == "<|system|>\nS</s>\n<|user|>\nHi</s>\n<|assistant|>\n"
    assert text == golden_like_zephyr()


def golden_like_zephyr() -> str:
    case = [{"role": "system", "content": "S"}, *HI]
    return ChatTemplate(source("zephyr"), **TOKENS).render(case)


def test_llama_2_default_system_prompt_by_option():
    template = ChatTemplate(BUILT_IN["llama-2"], default_system_prompt=LLAMA_2_SYSTEM_PROMPT, **TOKENS)
    assert template.render(HI) == "<s>[INST] Hi [/INST]"
    text = template.render(HI, use_default_system_prompt=True)
    assert text == f"<s>[INST] <<SYS>>\n{LLAMA_2_SYSTEM_PROMPT}\n<</SYS>>\n\nHi [/INST]"
    own = [{"role": "system", "content": "Mine"}, *HI]
    assert template.render(own, use_default_system_prompt=True) == "<s>[INST] <<SYS>>\nMine\n<</SYS>>\n\nHi [/INST]"


# -- Python functions as tools ----------------------------------------------------------------------------------------


class _Unit(enum.Enum):
    C = "celsius"
    F = "fahrenheit"


def get_weather(
    city: str,
    unit: _Unit,
    days: int | None = None,
    style: Literal["short", "long"] = "short",
    tags: list[str] | None = None,
) -> dict[str, float]:
    """
    The weather of a city.

    Over two paragraphs.

    Args:
        city: The city's name,
            in any language
        unit: What to measure in
        days: How many days
        style: How much to say (choices: ["short", "long"])
        tags: Labels

    Returns:
        Temperatures by day
    """
    raise NotImplementedError


def shapes(a: tuple[int, str], b: dict[str, list[int]], c: int | str, d: float | list[int], e: Any, f: dict) -> None:
    """Many shapes.

    Args:
        a: A
        b: B
        c: C
        d: D
        e: E
        f: F
    """


FUNCTIONS = [get_weather, shapes]


def test_the_schema_of_a_function():
    schema = json_schema_of(get_weather)["function"]
    assert schema["name"] == "get_weather"
    assert schema["description"] == "The weather of a city.\n\nOver two paragraphs."
    assert schema["parameters"]["required"] == ["city", "unit"]
    assert schema["parameters"]["properties"] == {
        "city": {"type": "string", "description": "The city's name, in any language"},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "description": "What to measure in"},
        "days": {"type": "integer", "nullable": True, "description": "How many days"},
        "style": {"type": "string", "enum": ["short", "long"], "description": "How much to say"},
        "tags": {"type": "array", "items": {"type": "string"}, "nullable": True, "description": "Labels"},
    }
    text = ChatTemplate("{{ tools[0].function.name }}").render(HI, tools=[get_weather])
    assert text == "get_weather"


@pytest.mark.torch
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda each: each.__name__)
def test_schemas_are_those_of_transformers(function):
    from transformers.utils import get_json_schema

    assert json_schema_of(function) == get_json_schema(function)


def test_functions_without_a_schema():
    def bare(x: int): ...
    def untold(x: int):
        """No arguments are described."""

    def untyped(x):
        """U.

        Args:
            x: X
        """

    def strange(x: threading.Thread):
        """S.

        Args:
            x: X
        """  # fmt: skip

    for function, words in [
        (bare, "needs a docstring"), (untold, "does not describe argument x"), (untyped, "argument x has no type hint"),
        (strange, "no JSON schema for the type"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            json_schema_of(function)


def test_tools_are_passed_on_unchanged():
    text = ChatTemplate("{{ tools | tojson }}{{ documents | tojson }}").render(
        HI, tools=[WEATHER], documents=[{"text": "x"}]
    )
    import json

    assert text == json.dumps([WEATHER], ensure_ascii=False) + '[{"text": "x"}]'
