"""Chat templates render here as transformers renders them, `{% generation %}` blocks included."""

from __future__ import annotations

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from rayloom.data.chat_jinja import ChatTemplate, compile_template

MESSAGES = [
    {"role": "system", "content": "<b> & 'quotes' ünï 日本"},
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "two"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "3"},
    {"role": "assistant", "content": "four\n"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"ü": ["<", 1.5, None]}}}]
ANSWERS = (
    "{% if m.role == 'assistant' %}A{% generation %}{{ m.content }}!{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}"
)
TEMPLATES = {
    "loop": f"{{% for m in messages %}}\n  {ANSWERS}\n{{% endfor %}}",
    "controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{% if loop.last %}{% break %}"
    f"{{% endif %}}{ANSWERS}{{% endfor %}}",
    "macro": f"{{% macro say(m) %}}[{ANSWERS}]{{% endmacro %}}{{% for m in messages %}}{{{{ say(m) }}}}{{% endfor %}}",
    "set": f"{{% for m in messages %}}{{% set text %}}{ANSWERS}{{% endset %}}{{{{ text }}}}{{% endfor %}}",
    "tools": "{% if tools %}{{ tools | tojson }}{{ tools | tojson(indent=2) }}{% endif %}{{ messages[0] | tojson }}",
    "variables": "{{ bos_token }}{{ messages | length }}{% if add_generation_prompt %}go{% endif %}{{ documents }}",
    "time": "{{ strftime_now('%Y') }}{% if tools is none %}none{% endif %}",
    "namespace": "{% set n = namespace(k=0) %}{% for m in messages %}{% set n.k = n.k + 1 %}{{ n.k }}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [[], TOOLS])
@pytest.mark.parametrize("prompt", [False, True])
def test_as_transformers(name, tools, prompt):
    source = TEMPLATES[name]
    variables = {"bos_token": "<s>", "add_generation_prompt": prompt}
    arguments = {"conversations": [MESSAGES], "tools": tools or None, "chat_template": source, **variables}
    (text,), (spans,) = render_jinja_template(return_assistant_tokens_mask=True, **arguments)
    for _ in range(2):  # a compiled template is used again
        assert compile_template(source).render(MESSAGES, tools, **variables) == (text, spans)
    (plain,), _ = render_jinja_template(**arguments)
    assert text == plain


def test_what_a_template_refuses_leaves_nothing_behind():
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% if m.content == 'no' %}"
    template = ChatTemplate(source + "{{ raise_exception('not so') }}{% endif %}{% endfor %}")
    with pytest.raises(jinja2.TemplateError, match="not so"):
        template.render([{"content": "yes"}, {"content": "no"}], [])
    assert template.render([{"content": "yes"}], []) == ("yes", [(0, 3)])


@pytest.mark.parametrize("attack", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_templates_run_in_a_sandbox(attack):
    with pytest.raises(jinja2.sandbox.SecurityError):
        ChatTemplate(attack).render([], [])


def test_a_template_that_does_not_compile():
    with pytest.raises(jinja2.TemplateSyntaxError):
        compile_template("{% for m in messages %}")
