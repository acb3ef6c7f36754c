"""SSQR: dense integers and an overflow list."""
