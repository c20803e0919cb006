"""Nuclear masses: the measured problem on which ``python -m haiku_mlp`` trains the MLP."""
