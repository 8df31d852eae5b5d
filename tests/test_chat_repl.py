"""The chat's loop and commands, over a fake terminal and a fake model."""

import json
import signal

import pytest

from edgellama.cli import conversation
from edgellama.cli.conversation import Conversation
from edgellama.cli.lines import LineReader, read_message
from edgellama.cli.repl import Repl
from edgellama.errors import ContextError, EdgellamaError
from edgellama.generate import Generation, Timings


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr("edgellama.cli.conversation.data_dir", lambda: tmp_path / "home")
    monkeypatch.setattr("edgellama.cli.repl.data_dir", lambda: tmp_path / "home")
    return tmp_path / "home"


class FakeStream:
    """Says the words; `interrupt_at` presses Ctrl-C before that one."""

    def __init__(self, words, interrupt_at=None, reason="stop"):
        self.words, self.interrupt_at, self.reason = list(words), interrupt_at, reason
        self.token_ids, self.said, self.cancelled, self.closed = [], [], False, False

    def __iter__(self):
        return self

    def __next__(self):
        if len(self.said) == self.interrupt_at and not self.cancelled:
            signal.raise_signal(signal.SIGINT)
        if self.cancelled or len(self.said) == len(self.words):
            raise StopIteration
        self.said.append(self.words[len(self.said)])
        self.token_ids.append(len(self.said))
        return self.said[-1]

    def cancel(self):
        self.cancelled = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    @property
    def result(self):
        reason = "cancelled" if self.cancelled else self.reason
        timings = Timings(0.0, 0.1, 10.0, 20.0, 0.1)
        return Generation("".join(self.said), list(self.token_ids), [0], reason, timings)


class FakePartner:
    """Answers with what is in `replies`, a list of words or an exception, else with "ok"; notes what it was shown."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.seen, self.parameters, self.streams = [], [], []

    def reply(self, talk):
        self.seen.append([(each["role"], each["content"]) for each in talk.prompt()])
        self.parameters.append(dict(talk.parameters))
        reply = self.replies.pop(0) if self.replies else ["ok"]
        if isinstance(reply, BaseException):
            raise reply
        self.streams.append(reply if isinstance(reply, FakeStream) else FakeStream(reply))
        return self.streams[-1]

    def room(self, result):
        return 100

    def show(self, what):
        return f"about {what}"


def chat(partner, *lines, **options):
    """Type `lines` (or press what an exception stands for); Ctrl-D at the end. Returns the Repl."""
    repl = Repl(partner, Conversation("fake"), **options)
    typed = list(lines)

    def read(prompt):
        line = typed.pop(0) if typed else EOFError()
        if isinstance(line, BaseException) or line is KeyboardInterrupt:
            raise line
        return line

    repl.lines.read = read
    repl.run()
    assert not typed, "left before the last line"
    return repl


# -- talking ---------------------------------------------------------------------------------------------------------


def test_a_conversation_grows_and_only_replies_go_to_stdout(capsys):
    partner = FakePartner(["Hel", "lo"], ["Bye\n"])
    chat(partner, "Hi", "", "   ", "And now?")
    out, err = capsys.readouterr()
    assert out == "Hello\n\nBye\n\n"
    assert err == "\n"  # Ctrl-D
    assert partner.seen == [[("user", "Hi")], [("user", "Hi"), ("assistant", "Hello"), ("user", "And now?")]]
    assert all(stream.closed for stream in partner.streams)


def test_a_message_of_several_lines():
    partner = FakePartner()
    chat(partner, '"""one', "two", '"""', '"""', " three", 'four"""', '"""five"""', 'say """ so')
    assert [seen[-1][1] for seen in partner.seen] == ["one\ntwo", " three\nfour", "five", 'say """ so']


def test_ctrl_c_stops_the_reply_and_what_was_said_stays(capsys):
    partner = FakePartner(FakeStream(["one ", "two ", "three"], interrupt_at=2), ["fine"])
    before = signal.getsignal(signal.SIGINT)
    chat(partner, "count", "more")
    out, err = capsys.readouterr()
    assert out == "one two \n\nfine\n\n"
    assert "(stopped after 2 tokens)" in err
    assert partner.seen[1] == [("user", "count"), ("assistant", "one two "), ("user", "more")]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_the_first_word_takes_the_message_back(capsys):
    partner = FakePartner(FakeStream(["one"], interrupt_at=0), KeyboardInterrupt(), ["fine"])
    chat(partner, "count", "count again", "more")
    assert "your message was taken back" in capsys.readouterr().err
    assert partner.seen[2] == [("user", "more")]


def test_ctrl_c_at_the_prompt_says_how_to_leave_once_nothing_was_typed(capsys):
    partner = FakePartner()
    repl = Repl(partner, Conversation("fake"))
    steps = iter(["", "half a line", EOFError])

    def read(_):
        step = next(steps)
        if step is EOFError:
            raise EOFError
        repl.lines.interrupted_text = step
        raise KeyboardInterrupt

    repl.lines.read = read
    repl.run()
    assert capsys.readouterr().err.count("/bye") == 1
    assert partner.seen == []


def test_ctrl_c_within_several_lines_drops_them():
    partner = FakePartner()
    chat(partner, '"""one', KeyboardInterrupt, "two")
    assert partner.seen == [[("user", "two")]]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ContextError("the prompt has 9 tokens"), "error: the prompt has 9 tokens\n"),
        (EdgellamaError("bad \x1b[2J"), "error: bad ?[2J\n"),
        (MemoryError(), "out of memory"),
    ],
)
def test_an_error_is_one_line_and_the_chat_goes_on(capsys, error, says):
    partner = FakePartner(error, ["fine"])
    chat(partner, "a", "b")
    out, err = capsys.readouterr()
    assert out == "fine\n\n"
    assert says in err
    assert partner.seen[1] == [("user", "b")]


def test_a_bug_is_not_hidden():
    with pytest.raises(AssertionError, match="ours"):
        chat(FakePartner(AssertionError("ours")), "a")


def test_why_a_reply_ended_is_told(capsys):
    chat(FakePartner(FakeStream(["a"] * 100, reason="length"), FakeStream(["a"], reason="length"), []), "1", "2", "3")
    err = capsys.readouterr().err
    assert err.index("the context is full") < err.index("cut after 1 tokens") < err.index("nothing to say")


def test_speed_on_request(capsys):
    chat(FakePartner(), "a", "/set verbose", "b", "/set quiet", "c")
    assert capsys.readouterr().err.count("20.0/s") == 1
    chat(FakePartner(), "a", verbose=True)
    assert capsys.readouterr().err.count("20.0/s") == 1


# -- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["/bye", "/exit", "/quit"])
def test_bye(word):
    repl = Repl(FakePartner(), Conversation("fake"))
    repl.lines.read = lambda _: word
    repl.run()


def test_help_lists_every_command(capsys):
    repl = chat(FakePartner(), "/?", "/help", "/set", "/set parameter")
    err = capsys.readouterr().err
    assert "\nrepetition_penalty " in err
    for name in ("/set", "/show", "/save", "/load", "/clear", "/bye", '"""', "Ctrl-C"):
        assert err.count(name) >= 2
    for name in repl._settings:
        assert name in err
    assert max(map(len, err.splitlines())) <= 80


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/sav x", "unknown command '/sav'; did you mean '/save'?"),
        ("/xyzzy", "unknown command '/xyzzy'; /? lists them"),
        ("/set sistem x", "did you mean 'system'?"),
        ("/set parameter temprature 1", "did you mean 'temperature'?"),
        ("/set parameter temperature hot", "temperature: 'hot' is not a number"),
        ("/set parameter top_p 0", "top_p: must be above 0"),
        ("/set parameter temperature", "temperature is the default"),
        ("/set parameter num_ctx 5", "start with -c N"),
        ("/set parameter draft_model x", "start with --draft"),
        ("/set parameter num_beams 3", "start with --num-beams"),
        ("/set parameter xyzzy 3", "unknown parameter 'xyzzy'; /set parameter lists them"),
        ('/set parameter stop "open', "stop: "),
        ("/set system", "/set system TEXT"),
        ("/show me", "/show info|parameters|system|template"),
        ("/show infos", "did you mean 'info'?"),
        ("/save", "/save NAME"),
        ("/save x:z?", "is no name for a chat"),
        ("/load nothing", "no saved chat: nothing; /save NAME makes one"),
    ],
)
def test_a_mistyped_command_gets_one_line_and_is_never_sent(capsys, line, says):
    partner = FakePartner()
    chat(partner, line)
    err = capsys.readouterr().err
    assert says in err
    assert err.strip().count("\n") == 0
    assert partner.seen == []


def test_a_space_sends_what_looks_like_a_command():
    partner = FakePartner()
    chat(partner, " /etc/passwd is what?")
    assert partner.seen == [[("user", " /etc/passwd is what?")]]


def test_parameters_are_set_shown_and_taken_back(capsys):
    partner = FakePartner()
    chat(
        partner,
        "/set parameter temperature 0.5",
        "/set parameter num_predict 7",  # ollama's name
        '/set parameter stop "a b" \\n',
        "hi",
        "/show parameters",
        "/set parameter temperature default",
        "hi",
    )
    assert partner.parameters[0] == {"temperature": 0.5, "max_new_tokens": 7, "stop": ["a b", "\n"]}
    assert "temperature" not in partner.parameters[1]
    out = capsys.readouterr().out
    assert "0.5 (set)" in out
    assert "about parameters" in out


def test_the_system_text(capsys):
    partner = FakePartner()
    chat(
        partner,
        "/show system",
        "/set system Be brief.",
        "a",
        "/show system",
        '/set system """one',
        'two"""',
        "b",
        '/set system ""',
        "c",
    )
    assert [seen[0] for seen in partner.seen] == [("system", "Be brief."), ("system", "one\ntwo"), ("user", "a")]
    assert "\nBe brief.\n" in capsys.readouterr().out


def test_clear_forgets_what_was_said_but_not_the_settings():
    partner = FakePartner()
    chat(partner, "/set system S", "/set parameter top_k 3", "a", "/clear", "b")
    assert partner.seen[1] == [("system", "S"), ("user", "b")]
    assert partner.parameters[1] == {"top_k": 3}


def test_show_asks_the_model(capsys):
    chat(FakePartner(), "/show info", "/show template")
    assert capsys.readouterr().out == "about info\nabout template\n"


# -- saved chats -----------------------------------------------------------------------------------------------------


def test_save_and_load_by_name(capsys, home):
    chat(FakePartner(["ja"]), "/set system S", "/set parameter stop x", "hi é", "/save my chat.1")
    file = home / "chats" / "my chat.1.json"
    assert file.stat().st_mode & 0o077 == 0
    partner = FakePartner()
    chat(partner, "/load", "/load my chat.1", "again")
    assert partner.seen == [[("system", "S"), ("user", "hi é"), ("assistant", "ja"), ("user", "again")]]
    assert partner.parameters == [{"stop": ["x"]}]
    err = capsys.readouterr().err
    assert "saved: my chat.1" in err
    assert "loaded 1 turn; the last words were: ja" in err


def test_save_and_load_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat(FakePartner(), "hi", "/save c.json", "/save ./d", "/save c.json")
    partner = FakePartner()
    chat(partner, f"/load {tmp_path}/d", "/load c.json", "again")
    assert partner.seen[0][:2] == [("user", "hi"), ("assistant", "ok")]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["c.json", "d"]


def test_load_names_what_there_is(capsys):
    chat(FakePartner(), "hi", "/save holiday", "/load holyday", "/load xyzzy")
    err = capsys.readouterr().err
    assert "no saved chat: holyday; did you mean 'holiday'?" in err
    assert "no saved chat: xyzzy; there are holiday" in err


def test_save_overwrites_no_other_file(capsys, tmp_path):
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    chat(FakePartner(), "hi", f"/save {tmp_path}/notes.json", f"/save {tmp_path}/none/x.json")
    assert "is no saved chat: take another name" in capsys.readouterr().err
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'
    assert list(tmp_path.glob(".*")) == []


def test_another_models_chat_is_named(capsys, tmp_path):
    Conversation("llama", None, [{"role": "user", "content": "x" * 100}]).save(tmp_path / "c.json")
    repl = chat(FakePartner(), f"/load {tmp_path}/c.json")
    assert "loaded 1 turn, with llama; the last words were: ..." in capsys.readouterr().err
    assert repl.talk.model == "fake"


GOOD = {"kind": "edgellama chat", "version": 1, "model": "m", "system": None, "parameters": {}, "messages": []}


@pytest.mark.parametrize(
    "value",
    [
        "",
        "[]",
        "{}",
        "{" * 100_000,
        json.dumps({**GOOD, "kind": "other"}),
        json.dumps({**GOOD, "version": 2}),
        json.dumps({**GOOD, "system": 1}),
        json.dumps({**GOOD, "parameters": []}),
        json.dumps({**GOOD, "parameters": {"eval": 1}}),
        json.dumps({**GOOD, "parameters": {"draft_model": "x"}}),
        json.dumps({**GOOD, "messages": {}}),
        json.dumps({**GOOD, "messages": ["hi"]}),
        json.dumps({**GOOD, "messages": [{"role": "tool", "content": "x"}]}),
        json.dumps({**GOOD, "messages": [{"role": "user", "content": None}]}),
        json.dumps({**GOOD, "model": "\ud800"}),
    ],
)
def test_a_saved_chat_is_checked(tmp_path, value):
    path = tmp_path / "c.json"
    path.write_text(value)
    with pytest.raises(EdgellamaError) as caught:
        conversation.load(path)
    assert str(path) in str(caught.value)
    path.write_text(json.dumps(GOOD))
    assert conversation.load(path) == Conversation("m")


# -- lines -----------------------------------------------------------------------------------------------------------


def test_without_a_terminal_lines_come_from_stdin_and_the_prompt_goes_to_stderr(capsys, monkeypatch, tmp_path):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo"))
    reader = LineReader(tmp_path / "history", lambda line: [])
    assert [reader.read("> "), reader.read("> ")] == ["one", "two"]
    with pytest.raises(EOFError):
        reader.read("> ")
    assert capsys.readouterr() == ("", "> > > ")
    assert not (tmp_path / "history").exists()


def test_the_end_of_input_within_several_lines_is_the_end():
    lines = iter(['"""one', "two"])

    def read(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    with pytest.raises(EOFError):
        read_message(read, "> ")


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("/s", "/save"),
        ("/set par", "parameter"),
        ("/set parameter te", "temperature"),
        ("/show t", "template"),
        ("hi", None),
    ],
)
def test_completion(line, word):
    repl = Repl(FakePartner(), Conversation("fake"))
    words = repl._complete(line)
    assert (word in words) if word else words == []
