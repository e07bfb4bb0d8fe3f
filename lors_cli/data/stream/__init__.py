"""Text tokenised in the background while training reads it."""
