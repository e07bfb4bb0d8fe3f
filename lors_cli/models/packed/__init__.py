"""Sparse weights as a bitmask and their kept values: smaller files, faster decoding."""
