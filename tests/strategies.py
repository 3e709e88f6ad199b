"""What each strategy trains."""

from covid_cls.models.backbones import RESNETS

# Written out, not derived: what each strategy trains.
TRAINABLE = {
    ("resnet", "fc"): {"head"},
    ("resnet", "partial"): {"layer4", "head"},
    ("resnet", "full"): {"stem", "layer1", "layer2", "layer3", "layer4", "head"},
    ("vgg", "fc"): {"head"},
    ("vgg", "partial"): {"block5", "head"},
    ("vgg", "full"): {"block1", "block2", "block3", "block4", "block5", "head"},
}


def trainable_stages(backbone: str, strategy: str) -> set[str]:
    return TRAINABLE["resnet" if backbone in RESNETS else "vgg", strategy]
