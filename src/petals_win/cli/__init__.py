"""One file per command, thin: what a command does lives in the rooms below."""
