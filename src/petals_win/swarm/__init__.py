"""Reading the state of a swarm, and starting one on this PC. Does not know HTTP."""
