"""Kernels of the trellis form: decode and multiply in one, or decode for a library's product."""
