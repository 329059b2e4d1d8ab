"""Chat templates as model hubs have them, shortened, and some that are written in other ways."""

# As LLaMA-3.1's: tools stand in the first user's turn, a call is written instead of words.
LLAMA_3_1 = """{{- bos_token }}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- if not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
    {%- else %}{{- raise_exception("There's no first user message!") }}{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("Only one call!") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}" }}{{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# As Mistral's third: tools stand before the last user's turn, ids of calls are checked.
MISTRAL_V3 = """{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}{%- set ns.index = 0 %}
{%- for message in messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}{{- raise_exception("Roles!") }}{%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}{{- '{"type": "function", "function": ' }}{{- tool | tojson }}{{- "}" }}
                {%- if not loop.last %}{{- ", " }}{%- endif %}
            {%- endfor %}{{- "] [/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}{{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}{{- raise_exception("IDs!") }}{%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""

# As Phi-3's: what closes the text begins as the header of a turn does.
PHI_3 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
# The same text: roles between literals, and all of it gathered before it is written.
PHI_3_BY_ROLE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
PHI_3_AT_ONCE = (
    "{% set ns = namespace(all='') %}{% for m in messages %}"
    "{% set ns.all = ns.all + '<|' + m.role + '|>\n' + m.content + '<|end|>\n' %}{% endfor %}"
    "{{ ns.all + ('<|assistant|>\n' if add_generation_prompt else '<|endoftext|>') }}"
)
# As gpt-oss's: the last turn has an end of its own.
RETURN = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)
THOUGHTS = (
    "{% for t in tools or [] %}{{ t | tojson }};{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.reasoning_content or '' }}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS_AT_ONCE = (
    "{% set ns = namespace(all=tools | tojson) %}{% for m in messages %}"
    "{% set ns.all = ns.all + '<|im_start|>' + m.role + '\n' %}{% if m.role == 'assistant' %}"
    "{% set ns.all = ns.all + '<think>' %}{% endif %}{% set ns.all = ns.all + m.content + '<|im_end|>\n' %}{% endfor %}"
    "{{ ns.all + ('<|im_start|>assistant\n' if add_generation_prompt else '') }}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{% endfor %}"
_TURN += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PARTS_ONLY = _TURN.replace("%s", "{% for p in m.content %}{{ p.text }}{% endfor %}")
# As Gemma-3's.
PARTS_TRIMMED = _TURN.replace(
    "%s",
    "{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text | trim }}{% endif %}{% endfor %}{% endif %}",
)
# As Qwen3's with parts.
TEXT_ONLY = _TURN.replace("%s", "{% if m.content is string %}{{ m.content }}{% endif %}")
# As Gemma's: the assistant is called model, and turns alternate.
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# As DeepSeek-R1's: the prompt begins the thoughts that an answer is written without.
THOUGHTS_BEGUN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% endif %}"
    "{% if m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# Consecutive turns of one speaker are one.
MERGED = (
    "{% for m in messages %}{% if loop.first or m.role != loop.previtem.role %}<{{ m.role }}>{% else %}+{% endif %}"
    "{{ m.content }}{% if loop.last or loop.nextitem.role != m.role %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_TURNS = _TURN.replace("%s", "{{ m.content }}")
# As Qwen3.5's.
ASKED_FIRST = (
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('No user!') }}{% endif %}"
) + _TURNS
# A tool goes by one name alone.
OBSERVATION = (
    "{% for m in messages %}{% if m.role == 'observation' %}<o>{{ m.content }}{% elif m.role != 'tool' %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
TOOL = OBSERVATION.replace("tool", "ipython").replace("observation", "tool")
# As SmolLM3's: what is marked begins with the header of the turn, and calls are left out.
MARKED_WHOLE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n"
    "{{ m.content or '' }}<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As gpt-oss's: a turn that calls a tool ends otherwise.
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    " to={{ c.function.name }}\n<tool_call>{{ c.function.arguments | tojson }}</tool_call>{% endfor %}<|call|>"
    "{% else %}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
