"""Through the model block by block."""
