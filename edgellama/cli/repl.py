"""The chat on a terminal: reads messages and ollama's commands, shows replies, until Ctrl-D or /bye.

Knows lines, commands and the conversation; the model is a `Partner`, which this module asks and never looks into.
Notes go to stderr, replies to stdout.
"""

import shlex
import shutil
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from edgellama.cli import console, conversation, parameters
from edgellama.cli.conversation import Conversation
from edgellama.cli.lines import LineReader, read_message
from edgellama.cli.reply import WholeReply, note_end, speed, stream_reply
from edgellama.errors import EdgellamaError
from edgellama.paths import data_dir

if TYPE_CHECKING:
    from edgellama.generate import Generation, Stream

PROMPT = ">>> "
HOW_TO_LEAVE = "Ctrl-D or /bye leaves"
# Other runtimes' names for the same things.
_ALIASES = {
    "num_predict": "max_new_tokens",
    "temp": "temperature",
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "penalty_last_n",
}


class Partner(Protocol):
    """Who answers."""

    def reply(self, conversation: Conversation) -> AbstractContextManager["Stream | WholeReply"]:
        """A stream of the answer to the last message, closed at the end of `with`. Raises EdgellamaError."""

    def show(self, what: str) -> str:
        """What is known about "info", "parameters" (the model's own) or "template", for people."""

    def room(self, result: "Generation") -> int:
        """How many tokens of the context were left for this reply."""


class _Leave(Exception):
    """The chat is over."""


class Repl:
    """One chat. `run()` returns when the user leaves; `verbose` tells the speed after each reply."""

    def __init__(self, partner: Partner, talk: Conversation, *, verbose: bool = False, word_wrap: bool = True):
        self.partner, self.talk = partner, talk
        self.verbose, self.word_wrap = verbose, word_wrap
        self.lines = LineReader(data_dir() / "chat_history", self._complete)
        self._commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "/set": (self._set, "/set ...", "change how the chat goes on; /set alone lists what there is"),
            "/show": (self._show, "/show ...", "info, parameters, system or template: what is in use"),
            "/save": (self._save, "/save NAME|FILE", "keep the chat"),
            "/load": (self._load, "/load NAME|FILE", "go on with a chat that was kept; /load alone lists them"),
            "/clear": (self._clear, "/clear", "start anew: forget what was said"),
            "/bye": (self._bye, "/bye", "leave (Ctrl-D does, too)"),
            "/?": (self._help, "/?, /help", "this list"),
        }
        self._synonyms = {"/help": "/?", "/exit": "/bye", "/quit": "/bye"}
        self._settings: dict[str, tuple[Callable[[str], None], str]] = {
            "parameter": (self._set_parameter, "parameter NAME VALUE: how to generate; default takes it back"),
            "system": (self._set_system, 'system TEXT: what the model is told first; "" takes it back'),
            "verbose": (self._switch("verbose", True), "verbose, quiet: tell the speed after each reply, or not"),
            "quiet": (self._switch("verbose", False), ""),
            "wordwrap": (
                self._switch("word_wrap", True),
                "wordwrap, nowordwrap: break lines between words, or anywhere",
            ),
            "nowordwrap": (self._switch("word_wrap", False), ""),
            "history": (self._set_history(True), "history, nohistory: remember what you type, or not"),
            "nohistory": (self._set_history(False), ""),
        }
        self._shows = ("info", "parameters", "system", "template")

    def run(self) -> None:
        try:
            while True:
                self._turn()
        except _Leave:
            pass
        finally:
            self.lines.close()

    def _turn(self) -> None:
        try:
            message = read_message(self.lines.read, console.styled(PROMPT, "bold", sys.stdout))
        except EOFError:
            console.note()
            raise _Leave from None
        except KeyboardInterrupt:
            typed, self.lines.interrupted_text = self.lines.interrupted_text, ""
            console.note()
            if not typed:
                self._note(HOW_TO_LEAVE)
            return
        try:
            if message.startswith("/"):
                self._command(message)
            elif message.strip():
                self._answer(message)
        except KeyboardInterrupt:
            console.note()
        except Exception as error:
            line = console.one_line(error)
            if line is None:
                raise
            console.note(line.removeprefix("edgellama: "), "error")

    # -- talking -----------------------------------------------------------------------------------------------------

    def _answer(self, message: str) -> None:
        """Ask and show the reply. What the user saw stays in the conversation; without a word the message goes."""
        self.talk.messages.append({"role": "user", "content": message})
        said = ""
        try:
            with self.partner.reply(self.talk) as stream:
                code = self._show_reply(stream)
                result = stream.result
            said = result.text
        finally:
            if said:
                self.talk.messages.append({"role": "assistant", "content": said})
            else:
                self.talk.messages.pop()
        if not said:
            self._note("(stopped; your message was taken back)" if code else "(the model had nothing to say)")
        else:
            self._note(note_end(result, room=self.partner.room(result)))
        if said and self.verbose:
            self._note(f"[{speed(result)}]")

    def _show_reply(self, stream: "Stream | WholeReply") -> int:
        width = shutil.get_terminal_size().columns
        if self.word_wrap and console.is_terminal(sys.stdout) and width >= 20:
            wrap = console.WordWrap(console.write, width)
            code = stream_reply(stream, wrap.push, patient=True)
            wrap.flush()
        else:
            code = stream_reply(stream, console.write, patient=True)
        if stream.result.text:
            console.say("" if stream.result.text.endswith("\n") else "\n")
        return code

    # -- commands ----------------------------------------------------------------------------------------------------

    def _command(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        name = self._synonyms.get(word, word)
        if name not in self._commands:
            known = [*self._commands, *self._synonyms]
            hint = console.did_you_mean(word, known)
            raise EdgellamaError(
                f"unknown command {word!r}{hint or '; /? lists them'} (a space first sends it as text)"
            )
        self._commands[name][0](rest.strip())

    def _help(self, _: str) -> None:
        rows = [(usage, text) for _, usage, text in self._commands.values()]
        rows += [('"""', "begins and ends a message of several lines"), ("Ctrl-C", "stops the reply, not the chat")]
        self._note(console.table(rows))

    def _bye(self, _: str) -> None:
        raise _Leave

    def _clear(self, _: str) -> None:
        self.talk.messages.clear()
        self._note("forgotten what was said")

    def _save(self, name: str) -> None:
        if not name:
            raise EdgellamaError("/save NAME keeps the chat; a name with / or .json is a file")
        path = conversation.path_of(name)
        self.talk.save(path)
        self._note(f"saved in {console.shell_path(path)}; /load {name} goes on with it")

    def _load(self, name: str) -> None:
        if not name:
            names = conversation.saved_names()
            self._note(f"saved: {', '.join(names)}" if names else "nothing saved yet; /save NAME keeps this chat")
            return
        loaded = conversation.load(conversation.path_of(name))
        model, loaded.model = loaded.model, self.talk.model
        self.talk = loaded
        other = f", with {model}" if model and model != self.talk.model else ""
        turns = f"{self.talk.turns} turn{'' if self.talk.turns == 1 else 's'}"
        self._note(f"loaded {turns}{other}; {self._last_words()}")

    def _last_words(self) -> str:
        if not self.talk.messages:
            return "nothing was said"
        text = " ".join(self.talk.messages[-1]["content"].split())
        return "the last words were: " + (text if len(text) <= 50 else "..." + text[-47:])

    def _show(self, what: str) -> None:
        if what not in self._shows:
            hint = console.did_you_mean(what, list(self._shows)) if what else ""
            raise EdgellamaError(f"/show {'|'.join(self._shows)}{hint}")
        if what == "system":
            console.say(self.talk.system or "(no system text; /set system TEXT)")
        elif what == "parameters":
            rows = [(name, f"{value} (set)") for name, value in self.talk.parameters.items()]
            console.say("\n".join(filter(None, [console.table(rows) if rows else "", self.partner.show(what)])))
        else:
            console.say(self.partner.show(what))

    def _set(self, rest: str) -> None:
        word, _, value = rest.partition(" ")
        if not word:
            self._note("\n".join(f"/set {text}" for _, text in self._settings.values() if text))
            return
        if word not in self._settings:
            hint = console.did_you_mean(word, list(self._settings))
            raise EdgellamaError(f"unknown setting {word!r}{hint or '; /set lists them'}")
        self._settings[word][0](value.strip())

    def _set_system(self, text: str) -> None:
        if not text:
            raise EdgellamaError('/set system TEXT; /set system "" takes it back')
        if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
            text = text[1:-1]
        self.talk.system = text or None
        self._note("the system text is set" if text else "no system text any more")

    def _set_parameter(self, rest: str) -> None:
        name, _, text = rest.partition(" ")
        name = _ALIASES.get(name, name)
        if name == "num_ctx":
            raise EdgellamaError("the context is as long as it was when the model was opened; start with -c N")
        if not name:
            self._note("/set parameter NAME VALUE, where NAME is one of")
            self._note(console.table([(each, parameters.BY_NAME[each].help) for each in parameters.SETTABLE]))
            return
        if name in parameters.AT_START:
            raise EdgellamaError(f"{name} is chosen when the model is opened; start with {_option(name)}")
        parameter = parameters.BY_NAME.get(name)
        if parameter is None:
            hint = console.did_you_mean(name, parameters.SETTABLE)
            raise EdgellamaError(f"unknown parameter {name!r}{hint or '; /set parameter lists them'}")
        if not text:
            pass  # only tell
        elif text == "default":
            self.talk.parameters.pop(name, None)
        else:
            self.talk.parameters[name] = _value(parameter, text.strip())
        self._note(f"{name} is {self.talk.parameters.get(name, 'the default')} ({parameter.help})")

    def _switch(self, attribute: str, value: bool) -> Callable[[str], None]:
        return lambda _: setattr(self, attribute, value)

    def _set_history(self, keep: bool) -> Callable[[str], None]:
        return lambda _: setattr(self.lines, "keep_history", keep)

    def _complete(self, line: str) -> Sequence[str]:
        """What may stand for the last word of `line`."""
        first, *others = line.split(" ")
        if not others:
            return [*self._commands, *self._synonyms] if first.startswith("/") else []
        if first == "/set":
            return list(self._settings) if len(others) == 1 else parameters.SETTABLE if others[0] == "parameter" else []
        if first == "/show":
            return list(self._shows)
        return conversation.saved_names() if first in ("/load", "/save") else []

    def _note(self, text: str) -> None:
        for line in text.splitlines():
            console.note(line, "dim")


def _value(parameter: parameters.Parameter, text: str) -> Any:
    try:
        words = _words(text) if parameter.repeated else [text]
        values = [parameter.parse(word) for word in words]
    except (ArgumentTypeError, ValueError) as error:
        raise EdgellamaError(f"{parameter.name}: {error}") from None
    return values if parameter.repeated else values[0]


def _option(name: str) -> str:
    return parameters.BY_NAME[name].options[0]


def _words(text: str) -> list[str]:
    """Words as a shell splits them, quoted where they hold spaces; a backslash stays."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    return list(lexer)
