"""Chat templates with tools: the structure of published ones, in our own words, and tokenizers that go with them."""

from __future__ import annotations

from tests.unit.thinking import THINK, TURNS, Model

_TURNS = """{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}{% set function = call.function %}CALL{% endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
_LISTED = """{%- if tools %}{{- '<|im_start|>system\\nHOW<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{% endfor %}{{- '\\n</tools><|im_end|>\\n' }}{% endif %}"""


def turns(call: str, how: str = "") -> str:
    """A template in ChatML's form, with a call written so."""
    return (_LISTED + _TURNS).replace("CALL", call).replace("HOW", how)


HERMES = turns(
    """{{- '\\n<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}{{- function.arguments | tojson }}
{{- '}\\n</tool_call>' }}"""
)
XML = turns(
    """{{- '\\n<tool_call>\\n<function=' + function.name + '>\\n' }}
{%- for key, value in function.arguments | items %}
{{- '<parameter=' + key + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' }}
{%- endfor %}{{- '</function>\\n</tool_call>' }}"""
)
SEED = turns(
    """{{- '\\n<seed:tool_call>\\n<function=' + function.name + '>' }}
{%- for key, value in function.arguments | items %}
{{- '\\n<parameter=' + key + '>' + (value if value is string else value | tojson) + '</parameter>' }}
{%- endfor %}{{- '\\n</function>\\n</seed:tool_call>' }}"""
)
MINIMAX = turns(
    """{{- '\\n<minimax:tool_call>' if loop.first else '' }}{{- '\\n<invoke name="' + function.name + '">\\n' }}
{%- for key, value in function.arguments | items %}
{{- '<parameter name="' + key + '">' + (value if value is string else value | tojson) + '</parameter>\\n' }}
{%- endfor %}{{- '</invoke>' }}{{- '\\n</minimax:tool_call>' if loop.last else '' }}"""
)
GLM = turns(
    """{{- '\\n<tool_call>' + function.name }}
{%- for key, value in function.arguments | items %}
{{- '\\n<arg_key>' + key + '</arg_key>\\n<arg_value>' + (value if value is string else value | tojson) }}
{{- '</arg_value>' }}{% endfor %}{{- '\\n</tool_call>' }}"""
)
LLAMA = turns(
    """{%- if message.tool_calls | length > 1 %}{{- raise_exception('one call only') }}{% endif %}
{{- '{"name": "' + function.name + '", ' }}{{- '"parameters": ' }}{{- function.arguments | tojson }}{{- '}' }}"""
)
MISTRAL_LIST = turns(
    """{%- if call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{% endif %}
{{- '[TOOL_CALLS] [' if loop.first else ', ' }}{{- (function | tojson)[:-1] }}{{- ', "id": "' + call.id + '"}' }}
{{- ']' if loop.last else '' }}"""
)
MISTRAL_NAMED = turns(
    """{{- '[TOOL_CALLS]' + function.name + '[ARGS]' }}
{{- function.arguments if function.arguments is string else function.arguments | tojson }}"""
)
DEEPSEEK_V3 = turns(
    """{{- '<｜tool▁calls▁begin｜>' if loop.first else '\\n' }}
{{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' }}
{{- function.name + '\\n```json\\n' + function.arguments + '\\n```<｜tool▁call▁end｜>' }}
{{- '<｜tool▁calls▁end｜>' if loop.last else '' }}"""
)
DEEPSEEK_V31 = turns(
    """{{- '<｜tool▁calls▁begin｜>' if loop.first else '' }}{{- '<｜tool▁call▁begin｜>' + function.name }}
{{- '<｜tool▁sep｜>' + function.arguments + '<｜tool▁call▁end｜>' }}
{{- '<｜tool▁calls▁end｜>' if loop.last else '' }}"""
)
KIMI = turns(
    """{{- '<|tool_calls_section_begin|>' if loop.first else '' }}{{- '<|tool_call_begin|>' + call.id }}
{{- '<|tool_call_argument_begin|>' }}{{- function.arguments | tojson }}{{- '<|tool_call_end|>' }}
{{- '<|tool_calls_section_end|>' if loop.last else '' }}"""
)
_GEMMA = """{%- macro shown(value) %}
{%- if value is string %}{{- '<|"|>' + value + '<|"|>' }}
{%- elif value is boolean %}{{- 'true' if value else 'false' }}
{%- elif value is mapping %}{{- '{' }}{% for key, one in value | dictsort %}{{- ',' if not loop.first else '' }}
{{- key + ':' + shown(one) }}{% endfor %}{{- '}' }}
{%- elif value is sequence %}{{- '[' }}{% for one in value %}{{- ',' if not loop.first else '' }}{{- shown(one) }}
{%- endfor %}{{- ']' }}
{%- else %}{{- value }}{% endif %}
{%- endmacro %}"""
GEMMA = _GEMMA + turns("""{{- '<|tool_call>call:' + function.name + shown(function.arguments) + '<tool_call|>' }}""")

GPT_OSS = """{%- if tools %}{{- '<|start|>developer<|message|>namespace functions {' }}
{%- for tool in tools %}{{- tool.function.name + ' ' }}{% endfor %}{{- '}<|end|>' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}
{%- for call in message.tool_calls %}
{{- '<|start|>assistant to=functions.' + call.function.name + '<|channel|>commentary json<|message|>' }}
{{- call.function.arguments | tojson }}{{- '<|call|>' }}{% endfor %}
{%- elif message.role == 'assistant' %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
{%- elif message.role == 'tool' %}
{{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' + message.content + '<|end|>' }}
{%- else %}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""

_TAGS = ("<tool_call>", "</tool_call>")
_DEEPSEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)
_KIMI = (
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_end|>",
    "<|tool_call_argument_begin|>",
)

MODELS = {
    "hermes": Model(HERMES, TURNS, _TAGS),
    "hermes by text": Model(HERMES, TURNS),
    "hermes, thinking": Model(HERMES + "{# </think> #}", TURNS, (*_TAGS, *THINK)),
    "qwen-xml": Model(XML, TURNS, _TAGS),
    "qwen-xml by text": Model(XML, TURNS),
    "seed": Model(SEED, (*TURNS, "<seed:tool_call>", "</seed:tool_call>")),
    "minimax": Model(MINIMAX, TURNS, ("<minimax:tool_call>", "</minimax:tool_call>")),
    "glm": Model(GLM, TURNS, (*_TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")),
    "glm by text": Model(GLM, TURNS),
    "llama": Model(LLAMA, (*TURNS, "<|python_tag|>")),
    "mistral, a list": Model(MISTRAL_LIST, (*TURNS, "[TOOL_CALLS]")),
    "mistral, named": Model(MISTRAL_NAMED, (*TURNS, "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")),
    "deepseek v3": Model(DEEPSEEK_V3, TURNS, _DEEPSEEK),
    "deepseek v3.1": Model(DEEPSEEK_V31, TURNS, _DEEPSEEK),
    "kimi": Model(KIMI, TURNS, _KIMI),
    "gemma": Model(GEMMA, (*TURNS, "<|tool_call>", "<tool_call|>", '<|"|>')),
    "gpt-oss": Model(
        GPT_OSS, ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
    ),
}
"""By the form's name, in which what is behind a comma or "by" is only for people."""
