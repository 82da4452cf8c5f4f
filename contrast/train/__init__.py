"""Training: the LightningModule and its step, optimisers, budgets and callbacks."""
