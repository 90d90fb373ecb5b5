"""Training: the TRL-based trainer, its configuration and the stage recipes."""
