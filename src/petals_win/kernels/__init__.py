"""Our own kernels for CPUs, in C: building them (build), finding and calling them (library). Their source is src/kernels."""
