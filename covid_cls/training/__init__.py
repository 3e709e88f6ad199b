"""The LightningModule, its optimisers, callbacks and checkpoints."""
