"""From a source's name to token ids: text, prompts, instructions, packing."""
