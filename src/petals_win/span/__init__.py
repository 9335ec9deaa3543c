"""The compute engine: a span [start, end) of the blocks of any Hugging Face decoder, without per-model code.

Knows torch, transformers, safetensors and gguf. Knows nothing of networks, peers or petals.
"""
