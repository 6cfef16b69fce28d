#!/usr/bin/env python3
"""Write the seeds of tests/fuzz_gguf.c: a complete model of a few hundred weights, and variations.

    pip install gguf numpy
    python3 tests/make_fuzz_seeds.py tests/data/fuzz-gguf
"""
import os
import sys

import gguf
import numpy as np

D, H, G, HD, E, K, F, V = 8, 2, 1, 2, 2, 1, 8, 4


def tensors(layers):
    yield "token_embd.weight", (V, D)
    yield "output_norm.weight", (D,)
    yield "output.weight", (V, D)
    for i in range(layers):
        for name, shape in (("attn_norm", (D,)), ("attn_q", (H * HD, D)), ("attn_k", (G * HD, D)),
                            ("attn_v", (G * HD, D)), ("attn_q_norm", (HD,)), ("attn_k_norm", (HD,)),
                            ("attn_output", (D, H * HD)), ("ffn_norm", (D,)), ("ffn_gate_inp", (E, D)),
                            ("ffn_gate_exps", (E, F, D)), ("ffn_up_exps", (E, F, D)),
                            ("ffn_down_exps", (E, D, F))):
            yield f"blk.{i}.{name}.weight", shape


def write(path, layers, full_keys=True, alignment=None):
    w = gguf.GGUFWriter(path, "qwen3moe")
    if alignment:
        w.add_custom_alignment(alignment)
    w.add_name("seed")
    w.add_block_count(layers)
    w.add_context_length(64)
    w.add_embedding_length(D)
    w.add_head_count(H)
    w.add_head_count_kv(G)
    w.add_key_length(HD)
    w.add_value_length(HD)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(1e6)
    w.add_expert_count(E)
    w.add_expert_used_count(K)
    w.add_expert_feed_forward_length(F)
    if full_keys:
        w.add_tokenizer_model("gpt2")
        w.add_token_list(["a", "b", "c", "<e>"])
        w.add_token_types([1, 1, 1, 3])
        w.add_eos_token_id(3)
        w.add_add_bos_token(False)
        w.add_bool("qwen3moe.expert_weights_norm", True)
        w.add_uint16("split.count", 1)
    for name, shape in tensors(layers):
        w.add_tensor(name, np.zeros(shape, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main():
    out = sys.argv[1]
    os.makedirs(out, exist_ok=True)
    write(os.path.join(out, "model.gguf"), 1)
    write(os.path.join(out, "aligned.gguf"), 1, alignment=64)
    write(os.path.join(out, "keys.gguf"), 0)
    write(os.path.join(out, "bare.gguf"), 2, full_keys=False)


main()
