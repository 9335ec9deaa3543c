"""What the patched DHT asks of this distribution: which entries make sense, and why joining fails. Does not know hivemind."""
