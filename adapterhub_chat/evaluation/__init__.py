"""How good an adapter is, on the same items as the backbone, with intervals."""
