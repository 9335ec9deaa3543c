"""Engines: whatever turns a prompt into an answer. `base` is the protocol; each other module is one engine or its help."""
