"""The HTTP API: OpenAI's, Ollama's and Anthropic's routes in front of an engine.

Knows HTTP and the engine protocol; nothing of swarms or tensors.
"""
