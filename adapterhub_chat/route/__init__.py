"""Which adapter should answer a message."""
