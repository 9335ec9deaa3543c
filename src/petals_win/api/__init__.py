"""The HTTP API: OpenAI's routes in front of an engine. Knows HTTP and the engine protocol; nothing of swarms or tensors."""
