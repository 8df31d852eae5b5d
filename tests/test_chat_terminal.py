"""A chat in a real terminal: keys in, screen out, through a pseudo-terminal and the real command."""

import os
import re
import select
import subprocess
import sys
import time

import pytest

import edgellama

pty = pytest.importorskip("pty", reason="a pseudo-terminal needs a Unix")

PROMPT = ">>> "
_SEQUENCE = re.compile(r"\x1b\[[?\d;]*[A-Za-z]|[\x01\x02]")
_SECONDS = 120  # kernels may have to be compiled
_FOREIGN = ("COLUMNS", "LINES", "NO_COLOR")
_COMMAND = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C comes from the terminal that a process is controlled by
from edgellama.cli import main
sys.exit(main())
"""


class Terminal:
    """`edgellama *argv` on a terminal of `columns`; `env` is added to the environment."""

    def __init__(self, *argv, columns=80, **env):
        import fcntl
        import struct
        import termios

        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        environment |= {"TERM": "xterm-256color", "INPUTRC": os.devnull, **env}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.master = master
        self.raw = ""  # all that was shown
        self.seen = 0  # up to where `wait` has read, in `text`

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        os.close(self.master)

    @property
    def text(self):
        """What was shown, without colours."""
        return _SEQUENCE.sub("", self.raw).replace("\r\n", "\n")

    def type(self, keys):
        os.write(self.master, keys.encode())

    def wait(self, words, seconds=_SECONDS):
        """Everything from the last `wait` to the first `words` after it."""
        deadline = time.monotonic() + seconds
        while words not in self.text[self.seen :]:
            assert time.monotonic() < deadline, f"{words!r} does not come: {self.text[self.seen :]!r}"
            if not self._read(deadline):
                raise AssertionError(f"it ended before {words!r}: {self.text[self.seen :]!r}")
        start = self.seen
        self.seen = self.text.index(words, start) + len(words)
        return self.text[start : self.seen]

    def wait_for_words(self, n):
        """Until `n` words stand behind the last `wait`."""
        deadline = time.monotonic() + _SECONDS
        while len(self.text[self.seen :].split()) < n and self._read(deadline):
            assert time.monotonic() < deadline

    def say(self, line):
        """Type a line, and wait until the prompt is there again; what came in between."""
        self.type(line + "\n")
        self.wait("\n")
        return self.wait(PROMPT).removesuffix(PROMPT)

    def interrupt_prompt(self):
        """Ctrl-C while it waits for keys; what came until the next prompt.

        CPython's input() misses a signal between what it shows and its wait for keys, as a busy machine makes likely.
        """
        for _ in range(_SECONDS // 10):
            time.sleep(0.3)
            self.type("\x03")
            quiet = time.monotonic() + 10
            while PROMPT not in self.text[self.seen :] and time.monotonic() < quiet:
                self._read(quiet)
            if PROMPT in self.text[self.seen :]:
                break
        return self.wait(PROMPT)

    def end(self):
        """The exit code, and the last words."""
        while self._read(time.monotonic() + _SECONDS):
            pass
        return self.process.wait(_SECONDS), self.text[self.seen :]

    def _read(self, deadline):
        ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            return True
        try:
            data = os.read(self.master, 65536)
        except OSError:  # Linux's way to say that nobody holds the other end
            return False
        self.raw += data.decode(errors="replace")
        return bool(data)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo model that ships with the package: it continues text, and knows no chat template."""
    from edgellama.demo import checkpoint_dir
    from edgellama_convert import convert

    out = tmp_path_factory.mktemp("models") / "demo.edgellama"
    convert(checkpoint_dir(), out, method="rtn")
    return out


@pytest.fixture(scope="module")
def minimind(minimind_dir, tmp_path_factory):
    from edgellama_convert import convert

    out = tmp_path_factory.mktemp("models") / "minimind.edgellama"
    convert(minimind_dir, out, method="search")
    return out


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of its own for the data, the usual place for the compiled kernels."""
    from edgellama.backends.cpu.code_cache import cache_folder

    home, cache = tmp_path / "home", cache_folder().parent.parent
    home.mkdir()
    cache.mkdir(parents=True, exist_ok=True)
    (home / "cache").symlink_to(cache)
    monkeypatch.setenv("EDGELLAMA_HOME", str(home))
    return home


def test_a_session_with_the_demo_model(demo, home, tmp_path):
    with Terminal("chat", str(demo), "--seed", "1", "-n", "12") as terminal:
        start = terminal.wait(PROMPT)
        assert "demo; /? for help" in start
        assert "no chat template" in start
        first = terminal.say("Once upon a time")
        assert len(first.split()) > 3
        assert "cut after 12 tokens" in first
        assert len(terminal.say("The cat").split()) > 3
        assert "max_new_tokens is 100000" in terminal.say("/set parameter max_new_tokens 100000")
        terminal.say("/set parameter temperature 0")

        # Ctrl-C within a reply that would fill the context.
        terminal.type("The dog\n")
        terminal.wait("The dog\n")
        terminal.wait_for_words(2)
        terminal.type("\x03")
        stopped = terminal.wait(PROMPT)
        assert re.search(r"\(stopped after \d+ tokens\)", stopped)
        assert terminal.process.poll() is None

        assert "home/chats/first.json" in terminal.say("/save first").replace("\n", "")
        assert "forgotten" in terminal.say("/clear")
        assert "loaded 3 turns" in terminal.say("/load first")

        # Ctrl-C at the prompt: with a word it is thrown away, without one it says how to leave.
        terminal.type("half a wo")
        terminal.wait("half a wo")
        assert "/bye" not in terminal.interrupt_prompt()
        assert "Ctrl-D or /bye leaves" in terminal.interrupt_prompt()
        terminal.type("/bye\n")
        assert terminal.end()[0] == 0
    assert "Traceback" not in terminal.text
    assert (home / "chat_history").read_text().splitlines()[:2] == ["Once upon a time", "The cat"]


def test_ctrl_d_leaves_and_the_history_comes_back(demo, home):
    with Terminal("run", str(demo), "-n", "3") as terminal:
        terminal.wait(PROMPT)
        terminal.say("/set nohistory")
        terminal.say("secret")
        terminal.say("/set history")
        terminal.say("/show system")
        terminal.type("\x04")
        assert terminal.end()[0] == 0
    assert (home / "chat_history").read_text() == "/set nohistory\n/show system\n"
    with Terminal("run", str(demo), "-n", "3") as terminal:
        terminal.wait(PROMPT)
        terminal.type("\x1b[A")  # up
        terminal.wait("/show system")
        terminal.type("\n")
        assert "no system text" in terminal.wait(PROMPT)
        terminal.type("/sh\t")
        terminal.wait("/show")
        terminal.type("\x15/sav\n")  # Ctrl-U clears the line
        assert "did you mean '/save'?" in terminal.wait(PROMPT)
        terminal.type("\x04")
        assert terminal.end()[0] == 0


def test_pasted_lines_are_one_message(demo, home):
    with Terminal("run", str(demo), "-n", "3") as terminal:
        terminal.wait(PROMPT)
        terminal.type("\x1b[200~Once upon\na time\x1b[201~")
        terminal.wait("a time")
        terminal.type("\n")
        terminal.wait(PROMPT)
        terminal.say("/save pasted")
        terminal.type("\x04")
        terminal.end()
    assert '"Once upon\\na time"' in (home / "chats" / "pasted.json").read_text()


def test_colours_only_where_they_are_wanted(demo, home):
    def shown(*argv, **env):
        with Terminal("run", str(demo), "-n", "3", *argv, **env) as terminal:
            terminal.wait(PROMPT)
            terminal.say("/xyzzy")
            terminal.type("/bye\n")
            terminal.end()
            return re.findall(r"\x1b\[[\d;]*m", terminal.raw)

    assert shown()
    assert shown(NO_COLOR="1") == []


def test_words_are_not_broken_at_40_columns(demo, home):
    with Terminal("run", str(demo), "-n", "60", "--seed", "3", columns=40) as terminal:
        terminal.wait(PROMPT)
        reply = terminal.say("Once upon a time")
        terminal.say("/set nowordwrap")
        terminal.type("/bye\n")
        terminal.end()
    lines = reply.split("\n(")[0].splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 40


@pytest.mark.models
def test_a_session_with_a_chat_model(minimind, home):
    """Greedy, so that the screen must show what `llm.chat` says to the same conversation."""
    questions = ["What is the capital of France?", "And of Germany?"]
    with edgellama.load(minimind) as llm:
        messages = []
        for question in questions:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": llm.chat(messages, max_new_tokens=60, temperature=0).text})
    with Terminal("chat", str(minimind), "--temperature", "0", "-n", "60") as terminal:
        assert "no chat template" not in terminal.wait(PROMPT)
        terminal.say("/set verbose")
        first, second = (terminal.say(question) for question in questions)
        assert words(messages[1]["content"]) in words(first)
        assert words(messages[3]["content"]) in words(second)
        assert re.search(r"\(\d\d+ known\)", second)  # the first turn was not computed again
        assert "<|im_start|>" in terminal.say("/show template")
        assert "hidden 512" in terminal.say("/show info")

        terminal.say("/set parameter max_new_tokens 4000")
        terminal.type("Tell me a long story about the sea.\n")
        terminal.wait("sea.\n")
        terminal.wait_for_words(2)
        terminal.type("\x03")
        assert re.search(r"\((stopped|cut) after \d+ tokens", terminal.wait(PROMPT))

        terminal.say("/save talk")
        terminal.say("/clear")
        assert "loaded 3 turns" in terminal.say("/load talk")
        terminal.say("/set parameter max_new_tokens 5")
        assert "0 known" not in terminal.say("And of Italy?")
        terminal.type("/bye\n")
        assert terminal.end()[0] == 0
    assert "Traceback" not in terminal.text


def run_twice(minimind_dir, *options):
    """What `run` answers from a pipe when it converts, and when the model is stored; and the first time's stderr."""
    argv = [sys.executable, "-m", "edgellama", "run", str(minimind_dir), "-n", "20", "--temperature", "0"]
    question = "What is the capital of France?"
    first = subprocess.run([*argv, *options], input=question, capture_output=True, text=True, timeout=900, check=True)
    argv[4] = "minimind2-small"
    second = subprocess.run([*argv, "-p", question], capture_output=True, text=True, timeout=300, check=True)
    assert second.stderr == ""
    return first.stdout, second.stdout, first.stderr


@pytest.mark.models
def test_run_converts_a_checkpoint_and_answers_a_pipe(minimind_dir, home):
    first, second, stderr = run_twice(minimind_dir, "--method", "search")
    assert "France" in first and second == first
    assert "stored as minimind2-small" in stderr


@pytest.mark.slow
@pytest.mark.models
def test_run_calibrates_a_small_model_which_then_knows_its_capitals(minimind_dir, home):
    first, second, _ = run_twice(minimind_dir)
    assert first == second == "The capital of France is Paris.\n"


def words(text):
    """Without the line breaks that a terminal adds."""
    return " ".join(text.split())
