"""The stages of each family, and what each strategy trains of them."""

from covid_cls.models.backbones import FAMILIES

# Written out, not derived: a new family adds its rows here.
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
    return next(name for name, family in FAMILIES.items() if backbone in family.names)


def trainable_stages(backbone: str, strategy: str) -> set[str]:
    return TRAINABLE[family_name(backbone), strategy]
