"""Staged backbones, freezing, heads, losses and device transforms: torch and torchvision only."""
