"""Atomic writes, hashes, records of finished stages, locks."""
