"""What may stand in the way of a node on this PC, found out one check at a time. Does not know HTTP or the command line."""
