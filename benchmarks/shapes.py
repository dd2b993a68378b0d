"""Llamas of random weights that the benchmarks train, by about how many parameters they have. Run by itself it measures
nothing."""


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int
) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


SHAPES = {
    "tiny": _llama(64, 128, 2, 4, 4, 64),
    "14M": _llama(384, 1024, 6, 6, 6, 2048),
    "20M": _llama(384, 1024, 8, 6, 6, 8000),
    "35M": _llama(640, 1728, 4, 10, 5, 12000),
    "50M": _llama(512, 1408, 12, 8, 4, 16000),
    "90M": _llama(768, 2048, 12, 12, 12, 4096),
    "110M": _llama(768, 3072, 6, 12, 4, 32000),
    "200M": _llama(1024, 2816, 12, 16, 8, 32000),
    "1B": _llama(2048, 8192, 16, 32, 8, 128256),
    "7B": _llama(4096, 11008, 32, 32, 32, 32000),
}
