"""The trellis form: a fixed number of bits per pair of columns, each pair computed from the last 32 bits of its row."""
