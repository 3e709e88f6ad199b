"""Attribution maps: Grad-CAM, from the gradient of a class's logit, and occlusion, from the logit itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from captum.attr import LayerAttribution, LayerGradCam, Occlusion
from numpy.typing import NDArray
from torch import Tensor, nn

from covid_cls.models.backbones import Staged
from covid_cls.models.inference import Scorer

Maps = NDArray[np.float32]  # (N, crop, crop) in [0, 1]
Method = Callable[[Scorer, Tensor, Tensor], Maps]


def grad_cam(scorer: Scorer, canvases: Tensor, targets: Tensor) -> Maps:
    """Return Grad-CAM maps (N, crop, crop) in [0, 1].

    Selvaraju et al. 2017: the last convolutional maps, weighted by the mean gradient of the target's logit, summed and
    cut at 0. They are scaled to the crop bilinearly, and each map is divided by its maximum; a map without a positive
    place stays 0. Weights, gradients, training modes and the random state do not change.

    Args:
        scorer: The network; its stages may be frozen.
        canvases: uint8 (N, 1, S, S).
        targets: Indices of the explained classes, int64 (N,).
    """
    net = scorer.net
    # The last stage before `pool` and `head`.
    start = len(net) - 3
    with evaluating(scorer):
        with torch.no_grad():
            before = net.run(scorer.prepare(canvases.to(scorer.device)), stop=start)
        # The gradient is taken with respect to the input of the stage, because its weights may be frozen. A copy of the
        # input enters the stage: its first layer may work in place, which torch forbids on a leaf tensor.
        method = LayerGradCam(lambda x: net.run(x.clone(), start=start), last_convolution(net))
        coarse = method.attribute(before.requires_grad_(), target=targets.to(scorer.device), relu_attributions=True)
    crop = scorer.preprocess.crop
    return _scaled(LayerAttribution.interpolate(coarse.detach(), (crop, crop), "bilinear"))


def occlusion(scorer: Scorer, canvases: Tensor, targets: Tensor, patch: int | None = None, batch: int = 16) -> Maps:
    """Return occlusion maps (N, crop, crop) in [0, 1].

    Zeiler and Fergus 2014: a grey square moves in steps of half its side. A pixel's value is the decrease of the
    target's logit, averaged over the squares that cover the pixel, and scaled as in `grad_cam`. With the default of
    13 x 13 squares, an image costs as much as 170 predictions.

    Args:
        scorer: The network.
        canvases: uint8 (N, 1, S, S).
        targets: Indices of the explained classes, int64 (N,).
        patch: Side of the square in pixels; None is a seventh of the crop.
        batch: Largest number of inputs of the network at once.
    """
    preprocess = scorer.preprocess
    side = patch or preprocess.crop // 7
    step = max(1, side // 2)
    with evaluating(scorer), torch.no_grad():
        views = preprocess.centre(canvases.to(scorer.device))
        falls = Occlusion(lambda x: scorer.net(preprocess.normalise(x.clone()))).attribute(
            views,
            sliding_window_shapes=(1, side, side),
            strides=(1, step, step),
            baselines=preprocess.mean,
            target=targets.to(scorer.device),
            perturbations_per_eval=max(1, batch // len(views)),
        )
    return _scaled(falls)


METHODS: dict[str, Method] = {"grad_cam": grad_cam, "occlusion": occlusion}


def last_convolution(net: Staged) -> nn.Module:
    """Return the layer that Grad-CAM uses: the last stage before `pool`, e.g. ResNet's layer4."""
    stage = list(net.children())[-3]
    layers = list(stage.children())
    # VGG's block5 ends in max-pooling. The paper uses the convolution and ReLU before it, which have four times as many
    # places.
    return layers[-2] if isinstance(stage, nn.Sequential) and isinstance(layers[-1], nn.MaxPool2d) else stage


@contextmanager
def evaluating(scorer: Scorer) -> Iterator[None]:
    """Set all modules to eval mode and leave `torch.inference_mode`, for the duration of a `with` block."""
    modes = [(module, module.training) for module in scorer.modules()]
    scorer.eval()
    try:
        # Lightning validates in inference mode, in which tensors get no gradients.
        with torch.inference_mode(False):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _scaled(values: Tensor) -> Maps:
    """Return values (N, 1, crop, crop) cut at 0, each map divided by its maximum unless that is 0."""
    positive = values[:, 0].clamp(min=0).float()
    most = positive.amax(dim=(1, 2), keepdim=True)
    return np.asarray(torch.where(most > 0, positive / most, positive).cpu().numpy())
