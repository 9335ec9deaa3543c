"""A PC that asks: the client's half of a model, and what it keeps of a session. Does not know HTTP."""
