"""Where in an image a class's logit comes from: Grad-CAM asks the gradient, occlusion hides one place after another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from captum.attr import LayerAttribution, LayerGradCam, Occlusion
from numpy.typing import NDArray
from torch import Tensor, nn

from covid_cls.models.backbones import Staged
from covid_cls.models.scorer import Scorer

Maps = NDArray[np.float32]  # (N, crop, crop) in [0, 1]
Method = Callable[[Scorer, Tensor, Tensor], Maps]


def grad_cam(scorer: Scorer, canvases: Tensor, targets: Tensor) -> Maps:
    """Grad-CAM maps (N, crop, crop) in [0, 1] of canvases, uint8 (N, 1, S, S), for classes `targets`, int64 (N,).

    Selvaraju et al. 2017: the last convolutional maps, weighted by the mean gradient of the target's logit, summed and
    cut at 0; bilinearly scaled to the crop, and each map divided by its own maximum. A map without a positive place
    stays 0. Weights, gradients, modes and the random state are left as they are, and frozen networks serve as well.
    """
    net = scorer.net
    start = len(net) - 3  # the last stage before `pool` and `head`
    with evaluating(scorer):
        with torch.no_grad():
            before = net.run(scorer.prepare(canvases.to(scorer.device)), stop=start)
        # The stage's input, not its weights, brings the gradient: they may be frozen. A copy, for a stage may begin
        # with a layer that works in place, which a leaf forbids.
        method = LayerGradCam(lambda x: net.run(x.clone(), start=start), last_convolution(net))
        coarse = method.attribute(before.requires_grad_(), target=targets.to(scorer.device), relu_attributions=True)
    crop = scorer.preprocess.crop
    return _scaled(LayerAttribution.interpolate(coarse.detach(), (crop, crop), "bilinear"))


def occlusion(scorer: Scorer, canvases: Tensor, targets: Tensor, patch: int | None = None, batch: int = 16) -> Maps:
    """Occlusion maps of canvases for classes `targets`; shapes and scale as in `grad_cam`.

    Zeiler and Fergus 2014: a square of `patch` pixels (default: a seventh of the crop) in the mean grey of the
    preprocessing moves in steps of half its side; a pixel's value is by how much the target's logit falls, averaged
    over the squares that cover it, and cut at 0. batch: squares times images that the network sees at once. 13 x 13
    squares by default: an image costs as much as 170 predictions.
    """
    preprocess = scorer.preprocess
    side = patch or preprocess.crop // 7
    with evaluating(scorer), torch.no_grad():
        views = preprocess.centre(canvases.to(scorer.device))
        falls = Occlusion(lambda x: scorer.net(preprocess.normalise(x.clone()))).attribute(
            views,
            sliding_window_shapes=(1, side, side),
            strides=(1, max(1, side // 2), max(1, side // 2)),
            baselines=preprocess.mean,
            target=targets.to(scorer.device),
            perturbations_per_eval=max(1, batch // len(views)),
        )
    return _scaled(falls)


METHODS: dict[str, Method] = {"grad_cam": grad_cam, "occlusion": occlusion}


def last_convolution(net: Staged) -> nn.Module:
    """The layer that Grad-CAM reads: the last stage before `pool`, ResNet's layer4.

    Of a stage that ends in max-pooling, VGG's block5, what enters the pooling: the last convolution and its ReLU, the
    layer of the paper, with four times as many places as the pooling leaves.
    """
    stage = list(net.children())[-3]
    layers = list(stage.children())
    return layers[-2] if isinstance(stage, nn.Sequential) and isinstance(layers[-1], nn.MaxPool2d) else stage


@contextmanager
def evaluating(scorer: Scorer) -> Iterator[None]:
    """Every module in eval mode, and gradients possible within `torch.inference_mode`; afterwards as before."""
    modes = [(module, module.training) for module in scorer.modules()]
    scorer.eval()
    try:
        with torch.inference_mode(False):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _scaled(values: Tensor) -> Maps:
    """Values (N, 1, crop, crop) cut at 0, each divided by its maximum unless that is 0."""
    positive = values[:, 0].clamp(min=0).float()
    most = positive.amax(dim=(1, 2), keepdim=True)
    return np.asarray(torch.where(most > 0, positive / most, positive).cpu().numpy())
