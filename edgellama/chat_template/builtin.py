"""Chat templates for models that bring none, by name. Written for this project; the texts are the models' formats.

`llama-2`: Llama-2-chat; the variable `use_default_system_prompt` adds Meta's where a conversation has no system
message. `llama-3`: Llama-3 Instruct. `chatml`: `<|im_start|>role`. `zephyr`: Zephyr, TinyLlama-Chat.
"""

LLAMA_2_SYSTEM_PROMPT = """\
You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your \
answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure \
that your responses are socially unbiased and positive in nature.

If a question does not make any sense, or is not factually coherent, explain why instead of answering something not \
correct. If you don't know the answer to a question, please don't share false information."""
"""What Llama-2-chat was trained with; Meta later advised to leave it out."""

_LLAMA_2 = """\
{%- set system = default_system_prompt if use_default_system_prompt else none %}
{%- if messages and messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) or message.role not in ('user', 'assistant') %}
        {{- raise_exception('roles must alternate: user, assistant, user, ... (after one system message at most)') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- bos_token ~ '[INST] ' }}
        {%- if loop.first and system is not none %}
            {{- '<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' ~ message.content.strip() }}
        {%- else %}
            {{- message.content.strip() }}
        {%- endif %}
        {{- ' [/INST]' }}
    {%- else %}
        {{- ' ' ~ message.content.strip() ~ ' ' ~ eos_token }}
    {%- endif %}
{%- endfor %}"""

_LLAMA_3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

_ZEPHYR = """\
{%- for message in messages %}
    {{- '<|' ~ message.role ~ '|>\\n' ~ message.content ~ eos_token ~ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}"""

BUILT_IN = {"llama-2": _LLAMA_2, "llama-3": _LLAMA_3, "chatml": _CHATML, "zephyr": _ZEPHYR}
"""Name -> Jinja source."""

VARIABLES: dict[str, dict[str, str]] = {"llama-2": {"default_system_prompt": LLAMA_2_SYSTEM_PROMPT}}
"""What a built-in template is given besides the special tokens."""
