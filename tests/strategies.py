"""The stages of each family of backbones, and which of them each strategy trains."""

import re

# Known answers, written out by hand: a new family needs rows here.
STAGES = {
    "resnet": ("stem", "layer1", "layer2", "layer3", "layer4", "pool", "head"),
    "vgg": ("block1", "block2", "block3", "block4", "block5", "pool", "head"),
}
TRAINABLE = {
    ("resnet", "fc"): {"head"},
    ("resnet", "partial"): {"layer4", "head"},
    ("resnet", "full"): {"stem", "layer1", "layer2", "layer3", "layer4", "head"},
    ("vgg", "fc"): {"head"},
    ("vgg", "partial"): {"block5", "head"},
    ("vgg", "full"): {"block1", "block2", "block3", "block4", "block5", "head"},
}


def family_name(backbone: str) -> str:
    return re.split(r"[\d_]", backbone)[0]


def trainable_stages(backbone: str, strategy: str) -> set[str]:
    return TRAINABLE[family_name(backbone), strategy]
