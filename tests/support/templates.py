"""Chat templates of many families, shortened to their formats of tools, calls, results and thoughts."""

_JSON_LIST = """{%- for tool in tools or [] %}{{- tool.function.description }}{%- endfor %}{%- for m in messages %}\
{{- '<|im_start|>' + m.role + '\n' }}{%- if m.tool_calls %}{{- 'BEGIN[' }}{%- for call in m.tool_calls %}\
{{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}' }}\
{{- ', ' if not loop.last }}{%- endfor %}{{- ']END' }}{%- endif %}{{- m.content + '<|im_end|>\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def _of_list(begin: str, end: str) -> str:
    return _JSON_LIST.replace("BEGIN", begin).replace("END", end)


TOOL_TEMPLATES = {
    "qwen2.5": """{%- if tools %}{{- '<|im_start|>system\n# Tools\n<tools>' }}{%- for tool in tools %}{{- "\n" }}\
{{- tool | tojson }}{%- endfor %}{{- '\n</tools>\n<tool_call>\n{"name": <function-name>, "arguments": <args>}\n\
</tool_call><|im_end|>\n' }}{%- endif %}{%- for message in messages %}{%- if message.role == "assistant" %}\
{{- '<|im_start|>assistant' }}{%- if message.content %}{{- '\n' + message.content }}{%- endif %}\
{%- for tool_call in message.tool_calls %}{%- if tool_call.function is defined %}\
{%- set tool_call = tool_call.function %}{%- endif %}{{- '\n<tool_call>\n{"name": "' }}{{- tool_call.name }}\
{{- '", "arguments": ' }}{{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}\
{%- endfor %}{{- '<|im_end|>\n' }}\
{%- elif message.role == "tool" %}{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response>' }}\
{{- '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}\
{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
    "llama3.1": """{{- bos_token }}{%- if tools is not none %}{{- 'Respond in the format {"name": function name, \
"parameters": dictionary of argument name and its value}.' }}{%- for t in tools %}{{- t | tojson(indent=4) }}\
{%- endfor %}{%- endif %}{%- for message in messages %}{%- if 'tool_calls' in message %}\
{%- set tool_call = message.tool_calls[0].function %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}\
{{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}\
{%- elif message.role == "tool" %}{{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}\
{{- message.content | tojson }}{%- else %}{{- '<|start_header_id|>' + message['role'] }}\
{{- '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}""",
    "llama3.2_pythonic": """{%- if tools is not none %}{{- 'Respond in the format [func_name1(params_name1=\
params_value1), func_name2(params)] ' }}{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}\
{%- for message in messages %}{%- if 'tool_calls' in message %}{{- '[' }}{%- for tool_call in message.tool_calls %}\
{{- tool_call.function.name + '(' }}{%- for p in tool_call.function.arguments %}{{- p + '=' }}\
{{- tool_call.function.arguments[p] | tojson }}{{- ', ' if not loop.last else '' }}{%- endfor %}{{- ')' }}{%- endfor %}\
{{- ']<|eot_id|>' }}{%- else %}\
{{- message['content'] }}{%- endif %}{%- endfor %}""",
    "mistral": """{{- bos_token }}{%- if tools is not none %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + \
'[/AVAILABLE_TOOLS]' }}{%- endif %}{%- for message in messages %}{%- if message.tool_calls is defined and \
message.tool_calls is not none %}{{- '[TOOL_CALLS] [' }}{%- for tool_call in message.tool_calls %}\
{%- set out = tool_call.function | tojson %}{{- out[:-1] }}{%- if tool_call.id | length != 9 %}\
{{- raise_exception('ids have 9 characters') }}{%- endif %}{{- ', "id": "' + tool_call.id + '"}' }}{%- endfor %}\
{{- ']' + eos_token }}{%- elif message.role == 'tool' %}{%- if message.tool_call_id | length != 9 %}\
{{- raise_exception('ids have 9 characters') }}{%- endif %}{{- '[TOOL_RESULTS] {"content": ' + message.content + \
', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}{%- else %}\
{{- '[INST] ' + message.content + '[/INST]' }}{%- endif %}{%- endfor %}""",
    "qwen3_coder": """{%- for tool in tools or [] %}{{- tool.function.description }}{%- endfor %}{{- '<tool_call>\n\
<function=example_function_name>\n<parameter=example>' }}{%- for message in messages %}\
{%- for tool_call in message.tool_calls or [] %}{{- '\n<tool_call>\n<function=' + tool_call.function.name + '>\n' }}\
{%- for name, value in tool_call.function.arguments | items %}{{- '<parameter=' + name + '>\n' + value | string + \
'\n</parameter>\n' }}{%- endfor %}{{- '</function>\n</tool_call>' }}{%- endfor %}{{- message.content }}\
{%- endfor %}""",
    "deepseek_v3.1": """{%- for tool in tools or [] %}{{- tool.function.description }}{%- endfor %}\
{%- for message in messages %}{%- for tool in message['tool_calls'] or [] %}{{- '<｜tool▁call▁begin｜>' + \
tool['function']['name'] + '<｜tool▁sep｜>' + tool['function']['arguments'] + '<｜tool▁call▁end｜>' }}{%- endfor %}\
{{- message['content'] }}{%- endfor %}""",
    "phi4_mini": """{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and \
message['tools'] is not none %}{{ '<|system|>' + message['content'] + '<|tool|>' + message['tools'] + \
'<|/tool|><|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + \
message['content'] + '<|end|>' }}{% endif %}{% endfor %}\
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}""",
    "granite3": """{%- if tools %}{{- '<|start_of_role|>tools<|end_of_role|>' + tools | tojson }}{%- endif %}\
{{- 'write <|tool_call|> and a list' }}{%- for message in messages %}{{- '<|start_of_role|>' + message['role'] + \
'<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}""",
    "glm4.5": """{%- if tools %}{{- '<tools>' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}\
{{- '</tools> <tool_call>{name}<arg_key>{key}</arg_key></tool_call>' }}{%- endif %}{%- for m in messages %}\
{{- '<|' + m.role + '|>\n' + m.content }}{%- for tc in m.tool_calls or [] %}{{- '\n<tool_call>' + tc.function.name }}\
{%- for k, v in tc.function.arguments.items() %}{{- '\n<arg_key>' + k + '</arg_key>\n<arg_value>' }}\
{{- (v | tojson if v is not string else v) + '</arg_value>' }}{%- endfor %}{{- '\n</tool_call>' }}{%- endfor %}\
{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}""",
    "lfm2": """{%- if tools %}\
{{- '<|im_start|>system\n<|tool_list_start|>' }}{{- tools | tojson + '<|tool_list_end|><|im_end|>' }}\
{%- endif %}{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content }}{%- if m.tool_calls %}\
{{- '<|tool_call_start|>[' }}{%- for tc in m.tool_calls %}{{- ', ' if not loop.first else '' }}\
{{- tc.function.name + '(' }}{%- for k, v in tc.function.arguments.items() %}{{- ', ' if not loop.first else '' }}\
{{- k + '=' + v | tojson }}{%- endfor %}{{- ')' }}{%- endfor %}{{- ']<|tool_call_end|>' }}{%- endif %}\
{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
    "functiongemma": """{%- for tool in tools or [] %}{{- '<start_function_declaration>' + tool.function.description }}\
{%- endfor %}{%- for m in messages %}{{- '<start_of_turn>' + m.role + '\n' + m.content }}\
{%- for tc in m.tool_calls or [] %}{{- '<start_function_call>call:' + tc.function.name + '{' }}\
{%- for k, v in tc.function.arguments.items() %}{{- ',' if not loop.first else '' }}{{- k + ':' }}\
{{- '<escape>' + v + '<escape>' if v is string else v | tojson }}{%- endfor %}{{- '}<end_function_call>' }}\
{%- endfor %}{{- '<end_of_turn>\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<start_of_turn>assistant\n' }}{%- endif %}""",
    "mistral_2025": """{%- if tools %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}\
{%- for m in messages %}{%- if m.role == 'assistant' %}{{- m.content }}{%- for tc in m.tool_calls or [] %}\
{{- '[TOOL_CALLS]' + tc.function.name + '[ARGS]' + tc.function.arguments | tojson }}{%- endfor %}{{- '</s>' }}\
{%- else %}{{- '[INST]' + m.content + '[/INST]' }}{%- endif %}{%- endfor %}""",
    "gemma4": """{%- for tool in tools or [] %}{{- '<|tool>declaration:' + tool.function.description + '<tool|>' }}\
{%- endfor %}{%- for m in messages %}{{- '<|turn>' + m.role + '\n' + m.content }}\
{%- for tc in m.tool_calls or [] %}{{- '<|tool_call>call:' + tc.function.name + '{' }}\
{%- for k, v in tc.function.arguments.items() %}{{- ',' if not loop.first else '' }}{{- k + ':' }}\
{{- '<|"|>' + v + '<|"|>' if v is string else v | tojson }}{%- endfor %}{{- '}<tool_call|>' }}\
{%- endfor %}{{- '<turn|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|turn>assistant\n' }}{%- endif %}""",
    "gpt_oss": """{%- for tool in tools or [] %}{{- '// ' + tool.function.description | default('') }}{%- endfor %}\
{%- for message in messages %}{%- if message.role == 'assistant' and message.tool_calls %}\
{%- set tool_call = message.tool_calls[0].function %}\
{{- "<|start|>assistant to=functions." + tool_call.name + "<|channel|>commentary json<|message|>" }}\
{{- tool_call.arguments | tojson }}{{- "<|call|>" }}{%- elif message.role == 'tool' %}\
{{- "<|start|>functions to=assistant<|channel|>commentary<|message|>" + message.content | tojson + "<|end|>" }}\
{%- elif message.role == 'assistant' %}{{- "<|start|>assistant<|channel|>final<|message|>" + message.content }}\
{{- "<|return|>" }}{%- else %}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}\
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}""",
    "deepseek_v3.2": """{%- for tool in tools or [] %}{{- tool.function.description }}{%- endfor %}\
{%- for message in messages %}{{- message.content }}{%- if message.tool_calls %}\
{{- '\n\n<｜DSML｜function_calls>' }}{%- for call in message.tool_calls %}\
{{- '\n<｜DSML｜invoke name="' + call.function.name + '">' }}{%- for k, v in call.function.arguments.items() %}\
{{- '\n<｜DSML｜parameter name="' + k + '" string="' + ('true' if v is string else 'false') + '">' }}\
{{- (v if v is string else v | tojson) + '</｜DSML｜parameter>' }}{%- endfor %}{{- '\n</｜DSML｜invoke>' }}\
{%- endfor %}{{- '\n</｜DSML｜function_calls>' }}{%- endif %}{{- eos_token }}{%- endfor %}""",
    "kimi_k2": """{%- if tools %}{{- '<|im_system|>tool_declare<|im_middle|>' + tools | tojson + '<|im_end|>' }}\
{%- endif %}{%- for m in messages %}{{- '<|im_' + m.role + '|>' + (m.name or m.role) + '<|im_middle|>' }}\
{%- if m.role == 'tool' %}{{- '## Return of ' + m.tool_call_id + '\n' }}{%- endif %}{{- m.content }}\
{%- if m.tool_calls %}{{- '<|tool_calls_section_begin|>' }}{%- for call in m.tool_calls %}{{- '<|tool_call_begin|>' }}\
{{- call['id'] + '<|tool_call_argument_begin|>' + call['function']['arguments'] | tojson + '<|tool_call_end|>' }}\
{%- endfor %}{{- '<|tool_calls_section_end|>' }}{%- endif %}{{- '<|im_end|>' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_assistant|>assistant<|im_middle|>' }}{%- endif %}""",
    "minimax_m2": """{%- set begin = '<minimax:tool_call>' %}{%- for tool in tools or [] %}\
{{- '<tool>' + tool.function | tojson + '</tool>' }}{%- endfor %}{%- for m in messages %}{{- ']~b]' + m.role + '\n' }}\
{{- m.content }}{%- if m.tool_calls %}{{- '\n' + begin + '\n' }}{%- for call in m.tool_calls %}\
{{- '<invoke name="' + call.function.name + '">\n' }}{%- for k, v in call.function.arguments | items %}\
{{- '<parameter name="' + k + '">' + (v if v is string else v | tojson) + '</parameter>\n' }}{%- endfor %}\
{{- '</invoke>\n' }}{%- endfor %}{{- '</minimax:tool_call>' }}{%- endif %}{{- '[e~[\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- ']~b]assistant\n' }}{%- endif %}""",
    "minimax_m3": """{%- set ns = ']<]minimax[>[' %}{%- for tool in tools or [] %}\
{{- '<tool>' + tool.function | tojson + '</tool>' }}{%- endfor %}{%- for m in messages %}{{- ']~b]' + m.role + '\n' }}\
{{- m.content }}{%- if m.tool_calls %}{{- '\n' + ns + '<tool_call>\n' }}{%- for call in m.tool_calls %}\
{{- ns + '<invoke name="' + call.function.name + '">' }}{%- for k, v in call.function.arguments | items %}\
{{- ns + '<' + k + '>' + (v if v is string else v | tojson) + ns + '</' + k + '>' }}{%- endfor %}\
{{- ns + '</invoke>\n' }}{%- endfor %}{{- ns + '</tool_call>' }}{%- endif %}{{- '[e~[\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- ']~b]assistant\n' }}{%- endif %}""",
    "hunyuan": _of_list("<tool_calls>", "</tool_calls>"),
    "nemotron_nano": _of_list("<TOOLCALL>", "</TOOLCALL>"),
    "command_r7b": _of_list("<|START_ACTION|>", "<|END_ACTION|>")
    .replace('{"name"', '{"tool_call_id": "0", "tool_name"')
    .replace("arguments\": '", "parameters\": '"),
    "xlam": _of_list("", "") + '{# [{"name": "tool_call_name", ... #}',
    "seed_oss": """{%- for tool in tools or [] %}{{- tool.function.description }}{%- endfor %}{%- for m in messages %}\
{{- '<seed:bos>' + m.role + '\n' + m.content }}{%- for call in m.tool_calls or [] %}\
{{- '\n<seed:tool_call>\n<function=' + call.function.name + '>\n' }}{%- for k, v in call.function.arguments | items %}\
{{- '<parameter=' + k + '>' + v | string + '</parameter>\n' }}{%- endfor %}{{- '</function>\n</seed:tool_call>' }}\
{%- endfor %}{{- '<seed:eos>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<seed:bos>assistant\n' }}\
{%- endif %}""",
    "olmo3": """{%- for tool in tools or [] %}{{- tool.function.description }}{%- endfor %}{%- for m in messages %}\
{{- '<|im_start|>' + m.role + '\n' }}{%- if m.tool_calls %}{{- '<function_calls>\n' }}{%- for call in m.tool_calls %}\
{{- call.function.name + '(' }}{%- for k, v in call.function.arguments | items %}{{- k + '=' + v | tojson }}\
{{- ', ' if not loop.last }}{%- endfor %}{{- ')\n' }}{%- endfor %}{{- '</function_calls>' }}{%- endif %}\
{{- m.content + '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}\
{%- endif %}""",
    "minicpm3": """{%- for tool in tools or [] %}{{- tool.function.description }}{%- endfor %}{%- for m in messages %}\
{{- '<|im_start|>' + m.role + '\n' }}{%- if m.tool_calls %}{{- '<|tool_call_start|>\n```python\n' }}\
{%- for call in m.tool_calls %}{{- call.function.name + '(' }}{%- for k, v in call.function.arguments | items %}\
{{- k + '=' + v | tojson }}{{- ',' if not loop.last }}{%- endfor %}{{- ')\n' }}{%- endfor %}\
{{- '```\n<|tool_call_end|>\n' }}{%- endif %}{{- m.content + '<|im_end|>\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
}

_QWEN3_TURNS = """{%- set ns = namespace(last=messages|length - 1, open=true) %}{%- for message in messages[::-1] %}\
{%- if ns.open and message.role == "user" and not message.content.startswith('<tool_response>') %}\
{%- set ns.open = false %}{%- set ns.last = (messages|length - 1) - loop.index0 %}{%- endif %}{%- endfor %}\
{%- for message in messages %}{%- if message.role == "assistant" %}{%- set thought = '' %}\
{%- if message.reasoning_content is defined and message.reasoning_content is not none %}\
{%- set thought = message.reasoning_content %}{%- endif %}{%- if loop.index0 > ns.last and (loop.last or thought) %}\
{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + message.content.lstrip('\n') }}\
{%- else %}{{- '<|im_start|>assistant\n' + message.content }}{%- endif %}{%- for call in message.tool_calls or [] %}\
{%- if (loop.first and message.content) or not loop.first %}{{- '\n' }}{%- endif %}\
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}{{- call.function.arguments | tojson }}\
{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- elif message.role == "tool" %}\
{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}{%- else %}\
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"""
REASONING_TEMPLATES = {
    "qwen3": """{%- if tools %}{{- '<|im_start|>system\n<tools>' }}{%- for tool in tools %}{{- tool | tojson }}\
{%- endfor %}{{- '</tools>\n<tool_call>\n{"name": <function-name>}</tool_call><|im_end|>\n' }}{%- endif %}"""
    + _QWEN3_TURNS
    + """{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}\
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}\
{%- endif %}""",
    "qwen3_thinking": _QWEN3_TURNS
    + """{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}""",
    "deepseek_r1": """{%- for message in messages %}{%- if message['role'] == 'assistant' %}\
{{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{%- else %}\
{{- '<｜User｜>' + message['content'] }}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\n' }}{%- endif %}""",
    "glm4.5": """{%- for m in messages %}{%- if m.role == 'assistant' %}{%- if m.reasoning_content is string %}\
{{- '<|assistant|>\n<think>' + m.reasoning_content.strip() + '</think>' }}{%- else %}\
{{- '<|assistant|>\n<think></think>' }}{%- endif %}{{- '\n' + m.content.strip() }}{%- else %}\
{{- '<|' + m.role + '|>\n' + m.content }}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|assistant|>' }}\
{{- '\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' }}{%- endif %}""",
    "magistral": """{%- for message in messages %}{%- if message['role'] == 'assistant' %}\
{%- if message['content'] is string %}{{- message['content'] + eos_token }}{%- else %}\
{%- for block in message['content'] %}{%- if block['type'] == 'thinking' %}\
{{- '[THINK]' + block['thinking'] + '[/THINK]' }}{%- endif %}{%- endfor %}{%- endif %}{%- else %}\
{{- '[INST]' + message['content'] + '[/INST]' }}{%- endif %}{%- endfor %}""",
    "seed_oss": """{%- for message in messages %}{{- '<seed:bos>' + message.role }}\
{%- if message.role == "assistant" %}\
{%- if message.reasoning_content is defined and message.reasoning_content %}\
{{- '\n<seed:think>' + message.reasoning_content | trim + '</seed:think>' }}{%- endif %}{%- endif %}\
{{- '\n' + message.content + '<seed:eos>' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<seed:bos>assistant\n' }}{%- endif %}""",
    "gemma4": """{%- for message in messages %}\
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{- '<|turn>' + role + '\n' }}{%- if message['reasoning_content'] %}\
{{- '<|channel>thought\n' + message['reasoning_content'] + '<channel|>' }}\
{%- endif %}{{- message['content'] + '<turn|>\n' }}\
{%- endfor %}{%- if add_generation_prompt %}{{- '<|turn>model\n' }}{%- if not enable_thinking | default(false) %}\
{{- '<|channel>thought\n<channel|>' }}{%- endif %}{%- endif %}""",
    "gpt_oss": """{{- 'Reasoning: ' + reasoning_effort | default('medium') }}{%- for message in messages %}\
{%- if message.role == 'assistant' %}{%- if message.thinking %}\
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{%- endif %}\
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}{%- else %}\
{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}""",
    "granite3.3": """{{- 'Respond between <response></response> after <think></think>.' if thinking else '' }}\
{%- for message in messages %}{{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content }}\
{{- '<|end_of_text|>\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}\
{%- endif %}""",
}
