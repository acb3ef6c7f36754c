"""Runs compiled kernels on a CPU, PTX instruction by instruction: a tool for the tests, and for whoever has no GPU."""
