"""Other people's Hubs: push, pull and search, within limits."""
