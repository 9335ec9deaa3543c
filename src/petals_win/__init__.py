"""petals-win: Petals for Windows, Linux and macOS. Knows its version and nothing else, so that importing it is free."""

__version__ = "2.2.0.post2"
