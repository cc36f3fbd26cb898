"""Kernels for compressed linears. Needs torch only; the reference of each kind is its definition."""
