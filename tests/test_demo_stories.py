"""The grammar that writes the demo model's corpus (scripts/demo_*.py)."""

import random
import re
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def stories(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import demo_stories

    return demo_stories.stories


@pytest.fixture
def expand(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import demo_grammar

    return demo_grammar.expand


def test_the_seed_decides(stories):
    assert list(stories(5, 1)) == list(stories(5, 1))
    assert list(stories(5, 1)) != list(stories(5, 2))


def test_no_markup_and_no_broken_sentence_is_left(stories):
    texts = list(stories(400, 0))
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert not re.search(r"[\[\]{}<>|]", text), text
        assert not re.search(r"  | [.,!?]|[!?][.,]|\ba [aeio]", text), text
        assert text.isascii() and text[0].isupper() and text[-1] in '.!?"', text
        assert all(paragraph.count('"') % 2 == 0 for paragraph in text.split("\n\n")), text


def test_expand_fills_choices_rules_and_slots(expand):
    rules, slots = {"who": ["owl", "[old |]ant"]}, {"him": "her"}
    texts = {expand("[A|A] <who> saw {him}. {Him}!", rules, slots, random.Random(i)) for i in range(50)}
    assert texts == {"An owl saw her. Her!", "An ant saw her. Her!", "An old ant saw her. Her!"}
