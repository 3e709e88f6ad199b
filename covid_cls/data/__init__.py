"""Manifests, splits, readers, the image store, phantoms and the data module."""
