"""Chat templates with the structure of published ones, our own words and no tools, and tokenizers that go with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.unit.fake_client import write_tokenizer
from tpctl.client.tokenizer import Tokenizer

_LAST_USER = """{%- set last = namespace(user=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
"""
_THOUGHT = """{%- set thought = '' %}{% set content = message.content %}
{%- if message.reasoning_content is string %}{% set thought = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}"""
# Thoughts of earlier turns are left out, those behind the last message of a user kept.
_CHATML = (
    _LAST_USER
    + """{%- for message in messages %}
{%- if message.role == 'assistant' %}"""
    + _THOUGHT
    + """
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > last.user %}{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
{{- content.lstrip('\\n') + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"""
)

QWEN3 = (
    _CHATML
    + """{% if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
)
OPENS = _CHATML + """{{- '<think>\\n' }}{% endif %}"""
"""As Qwen3's thinking models: the block is begun in the prompt."""

GLM4_MOE = (
    "[gMASK]<sop>"
    + _LAST_USER
    + """{%- for message in messages %}
{%- if message.role == 'user' %}<|user|>
{{ message.content }}{% if enable_thinking is defined and not enable_thinking %}/nothink{% endif %}
{%- elif message.role == 'assistant' %}"""
    + _THOUGHT
    + """<|assistant|>
{%- if loop.index0 > last.user and thought %}{{ '\\n<think>' + thought.strip() + '</think>' }}
{%- else %}{{ '\\n<think></think>' }}{% endif %}
{%- if content.strip() %}{{ '\\n' + content.strip() }}{% endif %}
{%- else %}<|system|>
{{ message.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{%- if enable_thinking is defined and not enable_thinking %}{{ '\\n<think></think>' }}{% endif %}{% endif %}"""
)

# All thoughts are kept.
MINIMAX_M2 = (
    """{%- for message in messages %}
{%- if message.role == 'assistant' %}"""
    + _THOUGHT
    + """{{- ']~b]ai\\n' }}
{%- if thought %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{- content + '[e~[\\n' }}
{%- else %}{{- ']~b]' + message.role + '\\n' + message.content + '[e~[\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- ']~b]ai\\n<think>\\n' }}{% endif %}"""
)

MISTRAL = """{{- bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}{{- '[INST]' + message.content + '[/INST]' }}
{%- elif message.role == 'system' %}{{- '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
{%- elif message.content is string %}{{- message.content + eos_token }}
{%- else %}{% for block in message.content %}
{%- if block.type == 'text' %}{{- block.text }}
{%- elif block.type == 'thinking' %}{{- '[THINK]' + block.thinking + '[/THINK]' }}{% endif %}
{%- endfor %}{{- eos_token }}{% endif %}{% endfor %}"""

# A thought goes again with the message that it led to, unless a final one came of it.
GPT_OSS = """{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- if '<|channel|>analysis' in message.content %}{{ raise_exception('thoughts belong into thinking') }}{% endif %}
{%- if message.thinking and loop.last and not add_generation_prompt %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
{%- else %}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""

GEMMA4 = """{{- bos_token }}{% for message in messages %}
{{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{%- if message.role == 'assistant' %}{{- message.content.split('<channel|>')[-1] }}
{%- else %}{{- message.content }}{% endif %}
{{- '<turn|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|turn>model\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<|channel>thought\\n<channel|>' }}{% endif %}
{%- endif %}"""

# As DeepSeek-R1's distillations and QwQ: thoughts are told from the content, and none are read.
R1 = """{{- bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}{{- '<｜User｜>' + message.content }}
{%- elif message.role == 'assistant' %}{% set content = message.content %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}
{%- else %}{{- message.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{% endif %}"""

# Command R7B and A: an answer has marks of its own; thoughts stand before calls alone, under another name.
COMMAND = """{{- bos_token }}{% for message in messages %}
{%- if message.role == 'assistant' %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}
{%- if message.tool_calls %}{{- '<|START_THINKING|>' + message.tool_plan + '<|END_THINKING|>' }}
{%- else %}{{- '<|START_RESPONSE|>' + message.content + '<|END_RESPONSE|>' }}{% endif %}
{%- else %}{{- '<|START_OF_TURN_TOKEN|><|' + message.role | upper + '_TOKEN|>' + message.content }}{% endif %}
{{- '<|END_OF_TURN_TOKEN|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""

INSTRUCT = """{% for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TURNS = ("<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")


@dataclass(frozen=True)
class Model:
    """A template, and the tokens that its tokenizer adds: control tokens, and others."""

    template: str
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    def tokenizer(self, folder: Path) -> Tokenizer:
        return Tokenizer(write_tokenizer(folder, template=self.template, special=self.special, added=self.added))


MODELS = {
    "qwen3": Model(QWEN3, TURNS, THINK),
    "qwen3 by text": Model(QWEN3, TURNS),
    "opens": Model(OPENS, TURNS, THINK),
    "opens by text": Model(OPENS, TURNS),
    "glm4_moe": Model(GLM4_MOE, ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"), ("/nothink", *THINK)),
    "minimax_m2": Model(MINIMAX_M2, ("]~b]", "[e~["), THINK),
    "mistral": Model(
        MISTRAL.replace("bos_token", "'<s>'"),
        ("<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]"),
    ),
    "gpt_oss": Model(
        GPT_OSS, ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
    ),
    "gemma4": Model(
        GEMMA4.replace("bos_token", "'<bos>'"), ("<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>")
    ),
    "r1": Model(
        R1.replace("bos_token", "'<s>'"), ("<s>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"), THINK
    ),
    "command": Model(
        COMMAND.replace("bos_token", "'<s>'"),
        ("<s>", *(f"<|{name}_TOKEN|>" for name in ("START_OF_TURN", "END_OF_TURN", "USER", "CHATBOT", "SYSTEM"))),
        tuple(f"<|{end}_{what}|>" for what in ("THINKING", "RESPONSE") for end in ("START", "END")),
    ),
    "no thoughts": Model(INSTRUCT, TURNS, THINK),
}
