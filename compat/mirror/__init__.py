"""Runs Haiku code on values that Flax holds, a Linen scope or NNX modules, in sight of Flax."""
