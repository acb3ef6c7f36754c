"""Kernels for mixtures of experts: each token is multiplied by the linears of the experts that it goes to."""
