"""HPTQ: integers of any size, entropy coded."""
