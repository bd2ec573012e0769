"""Measurements and static reports; nothing in the package imports this."""
