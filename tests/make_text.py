#!/usr/bin/env python3
"""Makes tests/data/text-hard.jsonl: random hard texts and their ids by Hugging Face tokenizers.

    pip install tokenizers gguf
    python3 tests/make_text.py tests/data/text-hard.jsonl [--count 150] [--seed 1]

Each line has vocab (qwen3 or tiny), text, ids (special tokens parsed) and plain (as text). Left out are
characters for which the reference's Unicode tables are of another age than this Python's: letters assigned
later, and marks whose combining class the reference's NFC does not know.
"""
import argparse
import json
import os
import random
import unicodedata

from gguf import GGUFReader
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")
FILES = {"qwen3": "qwen3-vocab.gguf", "tiny": "tiny-moe-q4_k_m.gguf"}
# Qwen2's pre-tokenizer as in the models' tokenizer.json.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
POOLS = [(0x20, 0x7E), (0x09, 0x0D), (0x30, 0x39), (0xA0, 0x17F), (0x300, 0x36F), (0x370, 0x52F),
         (0x591, 0x5F4), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0xF00, 0xFBC), (0x1100, 0x11FF),
         (0x1E00, 0x1FFF), (0x2000, 0x206F), (0x20D0, 0x20F0), (0x2100, 0x218F), (0x3000, 0x30FF),
         (0x4E00, 0x4FFF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFB00, 0xFB4F), (0xFF00, 0xFFEF),
         (0x1D15E, 0x1D1F0), (0x1F300, 0x1F6FF), (0x2F800, 0x2FA1D), (0, 0x10FFFF)]


def reference(path, special):
    fields = GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    vocab = {t: i for i, t in enumerate(tokens) if kinds[i] == NORMAL}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated", False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    names = []
    for i, kind in enumerate(kinds):
        if kind in (CONTROL, USER_DEFINED):
            names.append(tokens[i])
            if special:
                tok.add_tokens([AddedToken(tokens[i], normalized=False, special=kind == CONTROL)])
            assert not special or tok.token_to_id(tokens[i]) == i
    words = [t for t in vocab if t.isascii() and t.isalpha()]
    return tok, names, words


def usable(c, nfc=normalizers.NFC()):
    if unicodedata.category(c) in ("Cn", "Cs"):
        return False
    probe = "\u0345" + c
    return nfc.normalize_str(probe) == unicodedata.normalize("NFC", probe)


def character(rng):
    while True:
        lo, hi = rng.choice(POOLS)
        c = chr(rng.randint(lo, hi))
        if usable(c):
            return c


def text(rng, kind, names, words):
    if kind == 0:  # anything beside anything
        return "".join(character(rng) for _ in range(rng.randint(1, 30)))
    if kind == 1:  # white space of all sorts around a little text
        return "".join(rng.choice([" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u0085", "\u180e",
                                   "\u2028", "\x1c", "\u200b", "\u1680", "\u2000", "\u200a", "\u2029", "\u202f",
                                   "\u205f", "\v", "\f", "a", "!", "1"])
                       for _ in range(rng.randint(2, 30)))
    if kind == 2:  # contractions, in any case, and letters that fold to them
        return "".join(rng.choice(["'", "\u2019", "s", "S", "\u017f", "t", "RE", "re", "ve", "m", "M", "ll",
                                   "L", "d", " ", "it", "\u212a", "1", "\n"])
                       for _ in range(rng.randint(2, 24)))
    if kind == 3:  # special tokens whole, cut and joined
        parts = [rng.choice(names) for _ in range(4)]
        parts += [p[: rng.randint(1, len(p))] for p in parts] + ["<", "|", ">", " ", "\n", "e\u0301", "x"]
        return "".join(rng.choice(parts) for _ in range(rng.randint(2, 10)))
    if kind == 4:  # one long word out of common pieces
        return "".join(rng.choice(words) for _ in range(rng.randint(8, 60)))
    if kind == 5:  # one long word out of few letters
        letters = rng.sample("abcdeinorstAEST", rng.randint(1, 4))
        return "".join(rng.choice(letters) for _ in range(rng.randint(20, 160)))
    if kind == 6:  # decomposed and half decomposed
        composed = "".join(chr(rng.choice([0xE9, 0x1EAD, 0x1F82, 0xAC01, 0x958, 0xFB2C, 0x1D160, 0x212B, 0x344]))
                           for _ in range(rng.randint(1, 10)))
        marks = [unicodedata.normalize("NFD", composed)] + [chr(c) for c in range(0x300, 0x330)]
        return composed + "".join(rng.choice(marks) for _ in range(rng.randint(1, 30)))
    return rng.choice(["=", "-", ".", "\u2500", "\U0001f600", "\u5b57", " ", "9"]) * rng.randint(1, 120)


def main():
    args = argparse.ArgumentParser()
    args.add_argument("out")
    args.add_argument("--count", type=int, default=150, help="texts per vocabulary")
    args.add_argument("--seed", type=int, default=1)
    args = args.parse_args()
    with open(args.out, "w", encoding="ascii") as out:
        for vocab, name in FILES.items():
            rng = random.Random(args.seed)
            path = os.path.join(DATA, name)
            parsed, names, words = reference(path, True)
            plain, _, _ = reference(path, False)
            for i in range(args.count):
                s = text(rng, i % 8, names, words)
                line = {"vocab": vocab, "text": s,
                        "ids": parsed.encode(s, add_special_tokens=False).ids,
                        "plain": plain.encode(s, add_special_tokens=False).ids}
                out.write(json.dumps(line, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
