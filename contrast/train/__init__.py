"""The LightningModule, what happens beside it, and the folder of a run."""
