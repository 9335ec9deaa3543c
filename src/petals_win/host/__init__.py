"""What an operating system does differently, so that nobody else has to ask which one it is.

Knows event loops, child processes, signals, folders, locks, consoles, threads, memory and ports. Does not know models or swarms.
"""
