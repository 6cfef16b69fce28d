#!/usr/bin/env python3
"""Makes tests/data/chat-expected.jsonl: what chat templates make of plain conversations.

    pip install jinja2
    python3 tests/make_chat.py FOLDER tests/data/chat-expected.jsonl

FOLDER holds the models' templates under the names below; they are not ours to distribute, so only their
hashes and their output are kept. Lines are either {"style", "fnv1a"}: a template that moe/text_chat.c knows
by this hash, or {"style", "messages", "text"}: one rendering. Templates of the same style must render every
conversation alike; the script fails where they do not, and where a template does not render as ChatML's
roles require.
"""
import json
import os
import sys

from jinja2.sandbox import ImmutableSandboxedEnvironment

# The plainest ChatML templates, as they are in many models' files.
CHATML = [
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
]
FILES = {
    "Qwen3-Coder.jinja": "chatml",
    "Qwen-Qwen2.5-7B-Instruct.jinja": "qwen2.5",
    "Qwen-Qwen3-0.6B.jinja": "qwen3",
    "Qwen-QwQ-32B.jinja": "qwq",
}
THOUGHT = "<think>\nLet me see.\n</think>\n\nFour."
CONVERSATIONS = [
    [("user", "Hello")],
    [("system", "Be brief."), ("user", "What is a mutex?")],
    [("system", ""), ("user", "")],
    [("user", "\nleading newline"), ("assistant", "ok\n\n"), ("user", "  two  spaces  ")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
    [("user", "a"), ("system", "in the middle"), ("user", "b")],
    [("system", "one"), ("system", "two"), ("user", "b")],
    [("user", "2+2?"), ("assistant", THOUGHT), ("user", "And 3+3?")],
    [("user", "2+2?"), ("assistant", THOUGHT)],
    [("user", "2+2?"), ("assistant", "Four.")],
    [("user", "2+2?"), ("assistant", "\n\nFour.\n")],
    [("user", "2+2?"), ("assistant", "\n\nFour.\n"), ("user", "x")],
    [("user", "2+2?"), ("assistant", THOUGHT), ("assistant", "Again."), ("assistant", THOUGHT + "!")],
    [("user", "2+2?"), ("assistant", "no thought"), ("assistant", "<think>\n\n</think>\n\nempty"),
     ("assistant", "last")],
    [("assistant", THOUGHT)],
    [("assistant", THOUGHT), ("assistant", "x")],
    [("system", "s"), ("assistant", "a</think>b"), ("system", "t")],
    [("user", "q"), ("assistant", "a</think>\n\n\nb</think>\nc")],
    [("user", "q"), ("assistant", "<think>one<think>\n\ntwo\n\n</think>three</think>\n\n\nfour"), ("user", "r")],
    [("user", "q"), ("assistant", "<think>one<think>\n\ntwo\n\n</think>three</think>\n\n\nfour")],
    [("user", "q"), ("assistant", "</think>")],
    [("user", "q"), ("assistant", "<think>never closed")],
    [("user", "q"), ("assistant", THOUGHT), ("user", "<tool_response>\n42\n</tool_response>"), ("assistant", "So.")],
    [("user", "q"), ("assistant", THOUGHT), ("user", "<tool_response>\n42\n</tool_response>"),
     ("assistant", "<think>hm</think>So."), ("user", "<tool_response>x</tool_response>")],
    [("user", "q"), ("assistant", THOUGHT), ("user", "<tool_response>\n42\n</tool_response>.")],
    [("user", "<tool_response>\n42\n</tool_response>"), ("assistant", THOUGHT)],
    [("user", "<tool_response></tool_response"), ("assistant", THOUGHT)],
    [("user", "na\u00efve e\u0301 \u5317\u4eac \U0001f600"), ("assistant", "\u00e9"), ("user", "\u0301 mark first")],
    [("user", "x" * 70), ("assistant", "\t\n \n"), ("user", "\r\n")],
]


def fnv1a(text):
    data = text.encode()
    if data.endswith(b"\n"):
        data = data[:-1]
    h = 0xCBF29CE484222325
    for byte in data:
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{h:016x}"


def main():
    folder, out_path = sys.argv[1:]
    templates = [("chatml", t) for t in CHATML]
    for name, style in FILES.items():
        with open(os.path.join(folder, name), encoding="utf-8", newline="") as f:
            templates.append((style, f.read()))
    # As transformers' apply_chat_template renders.
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    rendered = {}
    with open(out_path, "w", encoding="ascii") as out:
        for style, text in templates:
            out.write(json.dumps({"style": style, "fnv1a": fnv1a(text)}) + "\n")
            template = env.from_string(text)
            for i, conversation in enumerate(CONVERSATIONS):
                messages = [{"role": r, "content": c} for r, c in conversation]
                result = template.render(messages=messages, add_generation_prompt=True)
                if rendered.setdefault((style, i), result) != result:
                    sys.exit(f"a template of style {style} renders conversation {i} differently")
        for (style, i), result in rendered.items():
            line = {"style": style, "messages": CONVERSATIONS[i], "text": result}
            out.write(json.dumps(line, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
