#!/usr/bin/env python3
"""Write the reference outputs of the bundled model as lines that C parses with strtok.

    python3 tests/make_golden.py tests/data/tiny-moe-q4_k_m.json > tests/data/tiny-moe-q4_k_m.golden

One record per prompt, in the JSON's order; every line is a keyword and space-separated values:

    prompt NAME
    ids N id…
    greedy N id…            margins N float…        (one margin per greedy id)
    nll FLOAT
    top8 8 id logprob …                             (last position)
    full OFFSET T V L D     (bytes into the .f32 file; four prompts only)
    route LAYER POS K id weight …                   (last four positions of those prompts)
    end
"""
import json
import sys


def main():
    doc = json.load(open(sys.argv[1], encoding="utf-8"))
    for p in doc["prompts"]:
        print("prompt", p["name"])
        print("ids", len(p["ids"]), *p["ids"])
        print("greedy", len(p["greedy"]), *p["greedy"])
        print("margins", len(p["greedy_margin"]), *p["greedy_margin"])
        print("nll", p["nll"])
        print("top8", len(p["last_top8"]), *(x for pair in p["last_top8"] for x in pair))
        if "full" in p:
            n_tokens, n_vocab = p["full"]["logits"]
            n_layers, _, n_embd = p["full"]["hidden"]
            print("full", p["full"]["offset"], n_tokens, n_vocab, n_layers, n_embd)
            for layer, r in enumerate(p["routing_last4"]):
                first = n_tokens - len(r["experts"])
                for i, (ids, ws) in enumerate(zip(r["experts"], r["weights"])):
                    print("route", layer, first + i, len(ids), *(x for q in zip(ids, ws) for x in q))
        print("end")


main()
