"""Processes, devices, memory, determinism, environment."""
