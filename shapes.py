"""The published shapes of the paper's models, as their config.json files have them; no weights.

Where it sits: under bench.py (random weights at these shapes) and overhead.py (what an SLM costs, from shapes alone).
"""


def qwen2(layers: int, heads: int, kv_heads: int, hidden: int, intermediate: int, vocab: int = 152064) -> dict:
    """config.json of a Qwen2 or Qwen2.5; the 0.5B alone has the smaller vocabulary, and ties its embedding."""
    return {
        "model_type": "qwen2", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocab,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": vocab == 151936,
    }  # fmt: skip


def llama3(layers: int, heads: int, hidden: int, intermediate: int, tied: bool, factor: float) -> dict:
    """config.json of a LLaMA 3.1 or 3.2. factor: of its RoPE."""
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    return {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "intermediate_size": intermediate, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
        "head_dim": hidden // heads, "rope_scaling": rope,
    }  # fmt: skip


SHAPES = {
    "Qwen2-0.5B": qwen2(24, 14, 2, 896, 4864, vocab=151936),
    "Qwen2-7B": qwen2(28, 28, 4, 3584, 18944),
    "Qwen2-72B": qwen2(80, 64, 8, 8192, 29568),
    "Qwen2.5-0.5B": qwen2(24, 14, 2, 896, 4864, vocab=151936),
    "Qwen2.5-14B": qwen2(48, 40, 8, 5120, 13824),
    "LLaMA-3.2-1B": llama3(16, 32, 2048, 8192, tied=True, factor=32.0),
    "LLaMA-3.1-8B": llama3(32, 32, 4096, 14336, tied=False, factor=8.0),
}
