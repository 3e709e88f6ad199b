"""Figures and TensorBoard writers: they read results, never the network."""
