"""`lors bench`: a training step of every method, and the decoding of text, timed."""
