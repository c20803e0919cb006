"""The mechanism: runs Haiku code on the values and keys of a Flax scope, in sight of Flax."""
