"""Questions that go to whichever PC answers soonest: the worker that offers an engine, the router that chooses, two transports."""
