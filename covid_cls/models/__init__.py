"""Networks: stages, losses, pretrained weights, pixel transforms and inference, with torch and torchvision only."""
