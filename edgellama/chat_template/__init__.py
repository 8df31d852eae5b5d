"""Chat templates: from a list of messages to the text of a prompt, in a sandbox with a budget.

    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    text = template.render([{"role": "user", "content": "Hi"}], tools=None)

Modules: `template` (`ChatTemplate`: transformers' rules around a template), `sandbox` (Jinja, and what a template can
reach), `codegen` (how it becomes Python), `budget` (what a rendering may cost), `methods` and `filters` (what is
allowed, and its price), `builtin` (templates by name), `functions` (JSON schemas of Python functions).

A template comes with a model file, so it is untrusted: it cannot run code, hang, or fill the memory. For a small
conversation a compilation and a rendering take at most 0.5 s each of processor time and 1 MB of output.
"""

from edgellama.chat_template.builtin import BUILT_IN, LLAMA_2_SYSTEM_PROMPT
from edgellama.chat_template.template import ChatTemplate

__all__ = ["BUILT_IN", "LLAMA_2_SYSTEM_PROMPT", "ChatTemplate"]
