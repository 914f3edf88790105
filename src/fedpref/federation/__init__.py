"""What algorithms are made of: the verbs, local training, and what many papers share."""
