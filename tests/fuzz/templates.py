"""Chat templates that do what no template should, and pieces of such that hypothesis puts together."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.fuzz.bases import TEMPLATE
from tests.fuzz.mutations import Draw

BOMBS = [
    "{% for i in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3,
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'x' * 10**9 }}",
    "{{ 'x' * 10**10 }}",
    "{% set s = namespace(x='x' * 999) %}{% for i in range(60) %}{% set s.x = s.x + s.x %}{% endfor %}done",
    "{% set s = namespace(x='xx') %}{% for i in range(40) %}{% set s.x = s.x ~ s.x %}{% endfor %}done",
    "{% set s = namespace(x=[0]) %}{% for i in range(60) %}{% set s.x = s.x + s.x %}{% endfor %}{{ s.x | length }}",
    "{{ [0] * 10**10 }}",
    "{{ (9 ** 9 ** 9) | string | length }}",
    "{{ 10 ** 10 ** 8 > 1 }}",
    "{{ '%0999999999d' | format(1) }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ ('x' * 99999).replace('', 'y' * 99999) | length }}",
    "{{ 'x' | center(10**10) }}",
    "{{ 'a\\nb' | indent(10**10) }}",
    "{{ range(10**10) | list | length }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ ('a' * 30 + 'b') | wordwrap(1) }}{{ 'x' | urlize(10**9) }}",
    "{{ lipsum(n=10**6) }}",
    "{{ (range(9999) | list | batch(10**9, 0) | list) | length }}",
    "{{ ('x,' * 10**8).split(',') | length }}",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}x{% endmacro %}{{ m(40) }}",
    "{% set ns = namespace(a=[]) %}{% set ns.a = [ns] %}{{ ns.a | string }}{{ ns.a | tojson }}",
]
"""What would take all time or memory."""

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('touch escaped').read() }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__globals__ }}",
    "{{ strftime_now.__closure__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__['__builtins__']['open']('escaped', 'w') }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''['__class__'] }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages.clear() }}x",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends 'x' %}",
    "{% from 'os' import path %}",
    "{{ (messages | map(attribute='__class__') | list) }}",
    "{{ [1] | map('attr', '__class__') | list }}",
    "{{ messages | groupby('__class__') }}",
]
REFUSALS = [
    "{{ raise_exception('no\\nlines\\x1b[31mred\\x07') }}",
    "{{ raise_exception('" + "long " * 5000 + "') }}",
    "{{ raise_exception() }}",
    "{{ raise_exception(messages) }}",
    "{{ raise_exception('\\ud800') }}",
    "{{ nothing.at.all }}",
    "{{ nothing() }}",
    "{{ messages[7].content }}",
    "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
    "{{ messages | nofilter }}",
    "{% if x is notest %}{% endif %}",
    "{{ messages[0].content.nomethod() }}",
    "{{ strftime_now('%Y' * 100000) | length }}",
    "{{ strftime_now('%') }}{{ strftime_now('\\x00') }}",
    "{{ strftime_now(5) }}",
    "{{ namespace(**{'a': 1}).a }}",
    "{{ namespace(5) }}",
    "{{ undefined_function(messages) }}",
    "{% generation %}{{ x }}{% endgeneration %}",
    "{% generation %}",
    "{% break %}",
    "{% for m in messages %}{% break %}{% endfor %}",
    "{% do messages %}",
    "{% trans %}x{% endtrans %}",
    "{% call x() %}{% endcall %}",
    "{{ messages | tojson(indent='x') }}",
    "{{ raise_exception | tojson }}",
    "{{ messages | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}",
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}",
    "{{ tools }}{{ documents }}{{ add_generation_prompt }}",
    "{{ '\\ud800' }}",
    "{{ '\\x1b[31m' }}{{ '\\x00' }}",
    "{{ caller() }}",
    "{{ super() }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% filter upper %}a{% endfilter %}",
    "{% raw %}{{ x }}{% endraw %}",
    "{# #}",
    "{{",
    "{% if %}",
    "{% for %}",
    "{% endfor %}",
    "}}",
    "",
    " \n",
    "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{% if 1 %}" * 150 + "{% endif %}" * 150,
    "{{ 1" + " + 1" * 5000 + " }}",
    "{{ not " * 3 + "1 }}",
    "{{ " + "not " * 2000 + "1 }}",
    "{{ " + "[" * 300 + "]" * 300 + " }}",
    "{{ 9" + "9" * 5000 + " }}",
    "{{ 1e999 }}",
    "{{ {'a': 1}[[]] }}",
    "{{ {[]: 1} }}",
]
_PIECES = [
    *(
        "{% for m in messages %}",
        "{% endfor %}",
        "{% if add_generation_prompt %}",
        "{% else %}",
        "{% endif %}",
        "{{ m }}",
    ),
    *(
        "{{ m.content }}",
        "{{ m['role'] }}",
        "{% set x = 1 %}",
        "{{ x }}",
        "{{- ' ' -}}",
        "{%- if x -%}",
        "\n",
        "  ",
        "text",
    ),
    *(
        "{{ loop.index }}",
        "{{ messages | length }}",
        "{% macro a(b) %}",
        "{% endmacro %}",
        "{{ a(1) }}",
        "{{ eos_token }}",
    ),
    *(
        "{{ m.content | trim | upper }}",
        "{% set ns = namespace(x=0) %}",
        "{% set ns.x = ns.x + 1 %}",
        "{{ ns.x }}",
        "{#",
        "#}",
    ),
]
_SMALL = [
    "content",
    "role",
    "messages",
    "trim",
    "==",
    "'system'",
    "-%}",
    "{{-",
    "{%-",
    "~",
    "[",
    "]",
    "endif",
    "in",
    "+",
]


@st.composite
def template_texts(draw: Draw) -> tuple[str, str]:
    """A template, and what it is."""
    way = draw(st.integers(0, 19))
    if way == 0:
        return draw(st.sampled_from(BOMBS)), "a bomb"
    if way <= 4:
        return draw(st.sampled_from(ESCAPES)), "an escape"
    if way <= 8:
        return draw(st.sampled_from(REFUSALS)), "what cannot be rendered"
    if way <= 11:
        return "".join(draw(st.lists(st.sampled_from(_PIECES), max_size=8))), "pieces"
    text = TEMPLATE
    for _ in range(draw(st.integers(1, 3))):
        word = draw(st.sampled_from(_SMALL))
        new = draw(st.sampled_from([*_SMALL, "", "x", "__class__", "'", "1", "\n", "."]))
        text = text.replace(word, new, draw(st.integers(1, 3)))
    return text, "a template with other words"
