"""Bodies that the routes take, with all that they can ask for; and schemas, expressions and grammars that ask too much.

The model that they are sent to is called `tiny`, and has an adapter `poet`.
"""

import functools
from typing import Any

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "strict": True, "parameters": {"type": "object"}}},
]
CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo", "unit": "C"}'}}
CALLED = [
    {"role": "user", "content": "What is it like in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "Rain"}]},
]
SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
BLOCKS = [
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "x"}, {"type": "tool_use", "id": "t", "name": "f", "input": {"a": [1]}}],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "y"}], "is_error": False},
            {"type": "text", "text": "z"},
        ],
    },
]
BLOCK_TOOLS = [{"name": "f", "description": "x", "input_schema": {"type": "object"}, "strict": True}]
ITEMS = [
    {"role": "developer", "content": "Be"},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "4"},
]
FLAT_TOOLS = [{"type": "function", "name": "f", "parameters": WEATHER, "strict": False}]
CHATS = [
    {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be"},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        ],
        "max_tokens": 3,
        "temperature": 0.5,
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["x", "y"],
        "logit_bias": {"65": 1.5},
        "stream": False,
        "n": 2,
        "min_tokens": 1,
        "skip_special_tokens": False,
        "chat_template_kwargs": {"enable_thinking": False, "x": [{"y": "z"}]},
        "return_token_ids": True,
        "best_of": 1,
        "xtc_probability": 0,
    },
    {"model": "poet", "messages": CALLED, "tools": TOOLS, "tool_choice": "auto", "max_tokens": 20, "stream": True},
    {
        "messages": CALLED[:1],
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "parallel_tool_calls": False,
        "max_completion_tokens": 60,
        "seed": 1,
    },
    {
        "messages": CALLED[:1],
        "tools": TOOLS,
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]},
        },
        "max_tokens": 30,
    },
    {"messages": CALLED[:1], "response_format": SCHEMA_FORMAT, "max_tokens": 40, "stream": True, "seed": 2},
    {"messages": CALLED[:1], "tools": TOOLS, "response_format": {"type": "json_object"}, "max_tokens": 20},
    {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        "continue_final_message": True,
        "echo": True,
        "structured_outputs": {"regex": "[a-c]{1,5}"},
        "max_tokens": 8,
    },
]
TEXTS = [
    {
        "prompt": [[1, 2, 3], [4]],
        "max_tokens": 2,
        "echo": True,
        "logprobs": 1,
        "seed": 3,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "top_p": 0.9,
        "top_k": 5,
        "presence_penalty": 0.1,
        "repetition_penalty": 1.1,
    },
    {"model": "poet", "prompt": "x", "structured_outputs": {"json": WEATHER}, "max_tokens": 30},
    {"prompt": "x", "structured_outputs": {"regex": "[a-z]+", "disable_any_whitespace": True}, "max_tokens": 5},
    {"prompt": "x", "structured_outputs": {"choice": ["yes", "no"]}, "max_tokens": 5, "logprobs": 3},
    {"prompt": ["x", "y"], "structured_outputs": {"grammar": 'start: "a" start | "b"'}, "max_tokens": 9, "n": 2},
    {"prompt": "x", "response_format": {"type": "json_object"}, "max_tokens": 9, "stream": True, "cache_salt": "s"},
]
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": CHATS,
    "/v1/completions": TEXTS,
    "/v1/embeddings": [
        {"input": ["some", "texts"], "encoding_format": "base64", "dimensions": 32, "truncate_prompt_tokens": 4},
        {"model": "poet", "input": [[1, 2], [3]], "normalize": False, "add_special_tokens": False},
    ],
    "/v1/messages": [
        {
            "model": "tiny",
            "max_tokens": 3,
            "system": [{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": "x"},
            ],
            "stop_sequences": ["y"],
            "stream": True,
            "tools": [],
            "thinking": {"type": "disabled"},
        },
        {
            "model": "poet",
            "max_tokens": 30,
            "messages": BLOCKS,
            "tools": BLOCK_TOOLS,
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        },
        {"max_tokens": 9, "messages": BLOCKS, "tools": BLOCK_TOOLS, "stream": True},
        {
            "max_tokens": 30,
            "messages": BLOCKS[:1],
            "output_config": {"format": {"type": "json_schema", "schema": WEATHER}},
        },
    ],
    "/v1/messages/count_tokens": [
        {"messages": BLOCKS, "tools": BLOCK_TOOLS, "tool_choice": {"type": "none"}},
        {"model": "poet", "system": "Be", "messages": BLOCKS, "tools": BLOCK_TOOLS},
    ],
    "/v1/responses": [
        {
            "model": "tiny",
            "input": ITEMS,
            "instructions": "Be brief",
            "max_output_tokens": 3,
            "temperature": 0.5,
            "top_logprobs": 2,
            "include": ["message.output_text.logprobs"],
            "text": {"format": {"type": "text"}, "verbosity": "medium"},
            "tools": FLAT_TOOLS,
            "tool_choice": "none",
            "metadata": {"a": "b"},
            "reasoning": {"effort": "none"},
            "stream": False,
            "store": True,
        },
        {"model": "poet", "input": ITEMS, "tools": FLAT_TOOLS, "max_output_tokens": 9, "stream": True},
        {
            "input": "Hi",
            "tools": FLAT_TOOLS,
            "tool_choice": {"type": "function", "name": "f"},
            "max_output_tokens": 50,
            "parallel_tool_calls": False,
        },
        {
            "input": "Hi",
            "text": {"format": {"type": "json_schema", "name": "w", "schema": WEATHER, "strict": True}},
            "max_output_tokens": 40,
            "stream": True,
            "stream_options": {"include_obfuscation": False},
            "store": False,
        },
    ],
    "/tokenize": [
        {"prompt": "some text", "add_special_tokens": False},
        {"messages": CALLED, "tools": TOOLS, "add_generation_prompt": False, "chat_template_kwargs": {"a": 1}},
    ],
    "/detokenize": [{"tokens": [1, 2, 250, 256]}],
}

NEST = functools.reduce(lambda inner, _: {"anyOf": [inner, {"type": "array", "items": inner}]}, range(8), {"const": 1})
DOWN = functools.reduce(lambda inner, _: {"properties": {"a": inner}, "required": ["a"]}, range(20), {"type": "null"})
SCHEMAS: list[Any] = [
    True,
    False,
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:1/x"}}},
    {"type": "object", "properties": {"a": {"$ref": "file:///etc/passwd"}}},
    {"type": "object", "properties": {"a": {"$ref": "#/$defs/missing"}}},
    {"type": "object", "properties": {"a": {"$ref": 3}}},
    {"type": "object", "properties": []},
    {"type": "object", "properties": {"a": 3}, "required": "a"},
    {"type": "object", "required": ["a"], "properties": {"a": False}},
    {"type": "object", "required": [f"a{i}" for i in range(300)]},
    {"type": "object", "properties": {f"a{i}": {"type": "string"} for i in range(800)}},
    {"type": "object", "properties": {"\ud800": {"const": "\udfff"}}, "required": ["\ud800"]},
    {"type": "object", "patternProperties": {"(": {}}, "propertyNames": {"pattern": "["}},
    {"type": "object", "minProperties": 2**40, "maxProperties": -1},
    {"type": "object", "additionalProperties": {"additionalProperties": {"additionalProperties": False}}},
    {"type": "array", "items": [{"type": "string"}], "minItems": 10**6},
    {"type": "array", "prefixItems": [{}] * 500, "items": False, "uniqueItems": True},
    {"type": "array", "minItems": 5, "maxItems": 2},
    {"type": "string", "pattern": "(a+)+$", "maxLength": 10**9},
    {"type": "string", "pattern": "("},
    {"type": "string", "pattern": "(x{1000}){1000}", "minLength": 3},
    {"type": "string", "format": "email", "minLength": 2**62},
    {"type": "string", "format": "date-time", "pattern": "^a", "const": "b"},
    {"type": "integer", "minimum": 10**300, "maximum": -(10**300)},
    {"type": "number", "multipleOf": 1e-300, "minimum": -1e308, "maximum": 1e308},
    {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1},
    {"type": ["null", "object"] * 200},
    {"type": "nothing"},
    {"enum": []},
    {"enum": [f"{i} " * 5 for i in range(4000)]},
    {"enum": [{"a": [1e-320, None, True, "\0"]}, "😀" * 2000]},
    {"anyOf": [{"type": "object", "properties": {f"a{i}": {"const": i}}} for i in range(600)]},
    {"allOf": [{"minimum": i} for i in range(500)], "type": "integer"},
    {"oneOf": [{"type": "string"}, {"type": "string"}], "not": {"type": "string"}},
    {"if": {"type": "string"}, "then": False, "else": {"minLength": 1}},
    {"x-guidance": {"whitespace_pattern": "(", "lenient": 3}, "type": "object"},
    {"x-guidance": {"item_separator": "(a+)+b", "key_separator": "", "coerce_one_of": True}},
    NEST,
    DOWN,
]
REGEXES: list[Any] = [
    "",
    "(",
    "[",
    "a{3,1}",
    "(?=x)",
    "\\1",
    "(x{1000}){1000}",
    "a{100000}",
    "(a|a)*b",
    "(a+)+$",
    "\\p{L}",
]
REGEXES += [
    ".*" * 500,
    "x" * 20_000,
    "(" * 300 + ")" * 300,
    "\\xff",
    "[^\\x00-\\x7f]{50}",
    "\\ud800",
    "(?i)ß{99}",
    "^$",
]
REGEXES += ["a|" * 5000, "(.*a.*b.*c){20}", "\\b\\B", "(?<name>a)\\k<name>", "[a-\\d]", "\0", "😀+", "(?s).{0,9999}z"]
GRAMMARS: list[Any] = ["", "start:", "start: start", "x: 'a'", 'start: start start | "a"', "start: (/a*/)*", 'start: "']
GRAMMARS += [
    'start: ("a" | "a")* "b"',
    "start: /(a|b)*c{1000}/",
    'start: "x"~1000000',
    "start: <[9999999]>",
    "start: <[0-9]",
]
GRAMMARS += [
    "start: <|endoftext|>",
    "start: <nothing>",
    "%import common.WORD\nstart: WORD",
    "start: %json {}",
    "%ignore /x/",
]
GRAMMARS += ['start: %json {"$ref": "http://127.0.0.1:1/"}', "start: %json {", "start: %regex { }", "start: A\nA: A"]
GRAMMARS += ["root ::= root root | [a-z]", "root ::= [", 'root ::= "a"{1000000}', "root ::= x", "start: /(?=a)/", "\0"]
GRAMMARS += ["start[capture, lazy]: /.*/", "start[max_tokens=0]: /a/", "start: " + "(" * 200 + '"a"' + ")" * 200]
GRAMMARS += ["start: a0\n" + "\n".join(f'a{i}: a{i + 1} a{i + 1} | "x"' for i in range(60)) + '\na60: "y" | ']
GRAMMARS += ['start: s\ns: s s s | s s | "a" | "aa" | ""', "start: " + " | ".join(f'"{i}"' for i in range(3000))]
