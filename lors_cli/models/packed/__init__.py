"""Packed checkpoints: of every sparse weight the kept values and a bit a place."""
