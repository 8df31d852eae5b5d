"""Templates of hostile model files: nothing is executed, nothing hangs, nothing fills the memory."""

import contextlib
import json
import os
import subprocess
import sys

import pytest

from chat_bombs import BOMBS, ESCAPES, MARK
from edgellama.chat_template import ChatTemplate
from edgellama.errors import ChatTemplateError

SECONDS = 1.0
CHARACTERS = 1_000_000
MEGABYTES = 200

_watched: list[str] | None = None


_EVENTS = {"open", "exec", "compile", "import", "os", "subprocess", "socket", "sys", "ctypes", "shutil", "pickle"}


def _audit(event: str, _: tuple) -> None:
    if _watched is not None and event.split(".", maxsplit=1)[0] in _EVENTS:
        _watched.append(event)


@pytest.fixture(scope="module")
def watch():
    """A context manager: what the interpreter reports of files, processes and code meanwhile."""
    sys.addaudithook(_audit)  # there is no way back, so it looks at `_watched`

    @contextlib.contextmanager
    def watching():
        global _watched  # noqa: PLW0603
        _watched = events = []
        try:
            yield events
        finally:
            _watched = None

    return watching


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_escapes(name, watch, capfd):
    messages = [{"role": "user", "content": "Hi"}]
    text = ""
    try:
        template = ChatTemplate(ESCAPES[name])
    except ChatTemplateError:
        return  # refused before it could run
    with watch() as events, contextlib.suppress(ChatTemplateError):
        text = template.render(messages)
    assert events == []
    assert MARK not in sys.modules
    assert MARK not in capfd.readouterr().out
    assert messages == [{"role": "user", "content": "Hi"}]
    for evidence in ("class '", "<function ", "<module", "<built-in", "object at 0x", "__builtins__", "root:"):
        assert evidence not in text


def test_the_watch_sees_what_it_should(watch, tmp_path):
    with watch() as events:
        open(tmp_path / "x", "w").close()
        exec("1")
    assert {"open", "exec"} <= set(events)


def test_there_are_as_many_as_promised():
    assert len(ESCAPES) >= 25 and len(BOMBS) >= 15


def test_bombs_end_early():
    """All in one process of its own, under hard limits: a guard that fails fails this test, not the machine."""
    pytest.importorskip("resource")
    run = subprocess.run(
        [sys.executable, "-c", "import chat_bombs; chat_bombs.main()"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, f"after {results[-1:]}: {run.stderr[-2000:]}"
    assert [each["name"] for each in results] == list(BOMBS)
    assert {each["name"]: each["seconds"] for each in results if each["seconds"] > SECONDS} == {}
    assert {each["name"]: each["length"] for each in results if each["length"] > CHARACTERS} == {}
    assert max(each["mb"] for each in results) < MEGABYTES
    for each in results:
        if each["error"] is not None:
            assert "\n" not in each["error"] and len(each["error"]) < 400, each


def test_a_stopped_template_can_be_used_again():
    template = ChatTemplate("{% for i in range(n) %}{% for j in range(n) %}x{% endfor %}{% endfor %}")
    for _ in range(2):
        with pytest.raises(ChatTemplateError, match="asks for too"):
            template.render([{"role": "user", "content": ""}], n=99_999)
        assert template.render([{"role": "user", "content": ""}], n=3) == "x" * 9


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ 'a' * 9999999 }}", "stopped: it asks for too long a text"),
        ("{{ messages[0].content + 1 }}", "failed at line 1: TypeError"),
        ("a\nb\n{{ nothing.at.all }}", "failed at line 3: UndefinedError: 'nothing' is undefined"),
        ("a\n{% if %}", "does not compile at line 2: TemplateSyntaxError"),
        (
            "{{ x | nosuchfilter }}",
            "does not compile at line 1: TemplateAssertionError: No filter named 'nosuchfilter'",
        ),
        ("{{ 'a' | urlize }}", "No filter named 'urlize'"),
        ("{% autoescape true %}{% endautoescape %}", "'autoescape' is not offered"),
        ("{{ raise_exception('only\n\x1b[31muser') }}", r"refuses this conversation: only \\x1b\[31muser$"),
        ("{{ raise_exception('x' * 9999) }}", r"refuses this conversation: x{190,}\.\.\.$"),
    ],
)
def test_errors_are_one_clear_line(source, words):
    with pytest.raises(ChatTemplateError, match=words) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "Hi"}])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
