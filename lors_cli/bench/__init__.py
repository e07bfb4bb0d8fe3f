"""`lors bench`: a training step of every method, timed."""
