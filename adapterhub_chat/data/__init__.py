"""Examples, their prompts and token ids, and what counts as right."""
