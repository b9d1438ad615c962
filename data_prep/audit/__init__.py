"""What training data and evaluation sets share."""
