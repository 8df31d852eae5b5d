# ruff: noqa: E501
"""Conversations and public chat templates: what our rendering and transformers' must agree on.

`data/chat/*.jinja` are the templates as the models publish them (Llama-2-chat, Llama-3, Llama-3.2, Mistral 0.1 and 0.3,
Zephyr and TinyLlama, SmolLM2, Vicuna, DeepSeek-R1-Distill, MiniMind2, ChatML) or as serving projects hand them out
(Hermes, Alpaca); `generation-tag` is our own. `data/chat/golden.json` is what transformers made of them
(`data/make_chat_golden.py`).
"""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "data" / "chat"
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather now, in "words" & numbers <b>',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "A city, e.g. Zürich"},
                "days": {"type": ["integer", "null"], "description": " how many "},
            },
            "required": ["city"],
        },
    },
}


@dataclass(frozen=True)
class Case:
    """Arguments of `apply_chat_template`; `extra` are template variables."""

    name: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    documents: list[dict[str, str]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool | str = False
    extra: dict[str, Any] = field(default_factory=lambda: {"date_string": "24 Nov 2026"})

    def arguments(self) -> dict[str, Any]:
        return {
            "tools": self.tools,
            "documents": self.documents,
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
            **self.extra,
        }


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


_SYSTEM = {"role": "system", "content": " You answer briefly.\n"}
_CALL = {
    "id": "abcdefgh1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}},
}
_TURNS = [_user("Hi"), _assistant(" Hello! "), _user("  How are you?\n\nTell me. ")]
_TOOL_TURNS = [
    _user("Weather?"),
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefgh1", "content": "sunny, 21 °C"},
]
_STRING_CALL = {**_CALL, "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}

CASES = [
    Case("one", [_user("Hi")]),
    Case("one-no-prompt", [_user("Hi")], add_generation_prompt=False),
    Case("system", [_SYSTEM, _user("Hi")]),
    Case("turns", _TURNS),
    Case("system-turns", [_SYSTEM, *_TURNS]),
    Case("unicode", [_user("𝔘ñï<|im_end|>çødé 漢字 👩‍🚀 \u200b</s>\t{{ 7 * 7 }}{% raw %}")]),
    Case("tools", [_SYSTEM, _user("Weather?")], tools=[WEATHER, {"type": "function", "function": {**WEATHER["function"], "name": "b"}}]),
    Case("tools-no-system", [_user("Weather?")], tools=[WEATHER]),
    Case("tool-turns", _TOOL_TURNS, tools=[WEATHER]),
    Case("tool-turns-no-tools", [*_TOOL_TURNS, _assistant("Sunny."), _user("Thanks")]),
    Case("tool-arguments-text", [_user("W?"), {"role": "assistant", "content": "", "tool_calls": [_STRING_CALL]}]),
    Case("continue", [_user("Hi"), _assistant("The answer is")], add_generation_prompt=False, continue_final_message=True),
    Case("continue-space", [_user("Hi"), _assistant("So: ")], add_generation_prompt=False, continue_final_message=True),
    Case(
        "continue-parts",
        [_user("Hi"), _assistant([{"type": "text", "text": "So"}])],  # type: ignore[arg-type]
        add_generation_prompt=False,
        continue_final_message=True,
    ),
    Case("wrong-order", [_assistant("Hi"), _user("Hi")]),
    Case("reasoning", [_user("Hi"), _assistant("<think>\nhm\n</think>\n\nYes", reasoning="hm"), _user("Why?")]),
    Case("documents", [_user("Hi")], documents=[{"title": "a", "text": "x\ny"}]),
    Case("no-thinking", [_user("Hi")], extra={"enable_thinking": False, "date_string": "1 Jan 2026"}),
    Case("tools-first", [_SYSTEM, _user("W?")], tools=[WEATHER], extra={"tools_in_user_message": False, "date_string": "x"}),
]  # fmt: skip

PAIRS = list(itertools.product(TEMPLATES, CASES))
IDS = [f"{template}-{case.name}" for template, case in PAIRS]


def source(template: str) -> str:
    return (FOLDER / f"{template}.jinja").read_text(encoding="utf-8")


def golden() -> dict[str, dict[str, str | None]]:
    """Template -> case -> text; None where transformers raises."""
    return json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
