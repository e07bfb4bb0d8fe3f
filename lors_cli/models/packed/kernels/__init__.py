"""Kernels that compute with packed weights."""
