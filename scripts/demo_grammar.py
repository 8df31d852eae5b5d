"""A small text grammar: choices, rules and slots.

Knows how to expand a template; knows nothing of stories.

    [a|b|c]   one of the alternatives, nested as deep as wanted; [|x] is an optional x
    <name>    one alternative of the rule `name`, itself a template
    {name}    the value of a slot, {Name} the same with a capital letter
"""

import random
import re
from collections.abc import Mapping, Sequence

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_RULE = re.compile(r"<(\w+)>")
_SLOT = re.compile(r"\{(\w+)\}")
_AN = re.compile(r"\b([Aa]) (?=[aeiou])(?!uni|use|one\b|once\b)")
_SPACES = re.compile(r"[ ]{2,}")


def capitalize(text: str) -> str:
    """The first letter in upper case, the rest as it is: `capitalize("the owl Olo") == "The owl Olo"`."""
    return text[:1].upper() + text[1:]


def expand(template: str, rules: Mapping[str, Sequence[str]], slots: Mapping[str, str], rng: random.Random) -> str:
    """Expand one template to plain text.

    >>> expand("[A|A] <who> saw {him}. {Him}!", {"who": ["owl"]}, {"him": "her"}, random.Random(0))
    'An owl saw her. Her!'
    """
    text = template
    while True:
        # Rules before choices: a rule inside a choice that is not taken costs time only.
        expanded = _RULE.sub(lambda m: rng.choice(rules[m[1]]), text)
        expanded = _CHOICE.sub(lambda m: rng.choice(m[1].split("|")), expanded)
        if expanded == text:
            break
        text = expanded

    def value(match: re.Match[str]) -> str:
        name = match[1]
        return slots[name] if name in slots else capitalize(slots[name.lower()])

    text = _SLOT.sub(value, text)
    return _SPACES.sub(" ", _AN.sub(r"\1n ", text)).strip()


def bind(
    declarations: Sequence[str], rules: Mapping[str, Sequence[str]], slots: dict[str, str], rng: random.Random
) -> None:
    """Choose a plot's own slots, in order, into `slots`.

    One declaration is `names = values | values ...`; several names, split by `,`, take values split by `;` together:
    `"fear, cure = the dark ; a lamp | the storm ; a song"`.
    """
    for line in declarations:
        names, _, options = line.partition("=")
        values = rng.choice(options.split(" | ")).split(";")
        for name, value in zip(names.split(","), values, strict=True):
            slots[name.strip()] = expand(value.strip(), rules, slots, rng)
