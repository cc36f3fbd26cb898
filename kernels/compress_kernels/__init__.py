"""Kernels for compressed linears. Needs torch only; the reference of each kind is its definition."""


class BackendError(ValueError):
    """A backend was asked for that a kind of linear does not have."""
