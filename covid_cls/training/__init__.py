"""Training: the LightningModule, optimizers, callbacks, checkpoints, run folders and the feature cache."""
