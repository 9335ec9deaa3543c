"""The peer-to-peer daemon p2pd: where it is, how it is talked to, how it starts and ends.

Knows the program and its local sockets. Does not know hivemind or what travels through it.
"""
