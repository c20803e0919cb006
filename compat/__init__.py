"""Haiku modules as Flax modules."""
