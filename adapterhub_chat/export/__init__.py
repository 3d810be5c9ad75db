"""An adapter in forms that other engines read."""
