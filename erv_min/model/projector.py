"""The visual projector of Eq. 1: three branches over the frames' patch maps, mixed by the text gate.

`video` and `body`: RegNet stage (arXiv 2003.13678) -> 3-D convolution that halves height and width and looks one frame
back -> RegNet stage -> MLP, with weights of their own. `face`: an MLP per patch, then a bilinear resize.
"all_in_one_small" (0.5B) has 2 blocks per stage and no spatial padding, "all_in_one" (7B) 4 and a padding of 1 for its
odd grid. The released code names its norms `.bn`; they are layer norms.
Everything runs channels-last, which is the tower's own order, so that no map is ever copied into another layout.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn


class ConvNorm(nn.Module):
    """Convolution without bias, then layer norm over channels."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.LayerNorm(outputs, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [B * T, C, H, W]


class Bottleneck(nn.Module):
    """A RegNet block with bottleneck ratio 1 and group width 1; the squeeze is a quarter of the *input* channels."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        squeezed = round(inputs / 4)
        self.conv1 = ConvNorm(inputs, width)
        self.conv2 = ConvNorm(width, width, kernel=3, groups=width)
        self.se = nn.ModuleDict({"fc1": nn.Conv2d(width, squeezed, 1), "fc2": nn.Conv2d(squeezed, width, 1)})
        self.conv3 = ConvNorm(width, width)
        self.downsample = ConvNorm(inputs, width) if inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.conv2(F.silu(self.conv1(x))))
        squeezed = F.silu(self.se["fc1"](y.mean((2, 3), keepdim=True)))  # squeeze and excitation (arXiv 1709.01507)
        y = self.conv3(y * self.se["fc2"](squeezed).sigmoid())
        return F.silu(y + self.downsample(x))


def stage(inputs: int, width: int, depth: int) -> nn.Sequential:
    """`depth` blocks named b1, b2, ..."""
    return nn.Sequential(OrderedDict((f"b{i + 1}", Bottleneck(width if i else inputs, width)) for i in range(depth)))


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Linear, exact GELU, Linear ("mlp2x_gelu")."""
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, outputs))


class VisualProjector(nn.Module):
    """Patch features of a clip -> three sets of tokens in the language model's width."""

    def __init__(self, inputs: int, width: int, kind: str):
        super().__init__()
        depth, self.padding = (2, 0) if kind == "all_in_one_small" else (4, 1)
        for branch in ("video", "body"):
            self.add_module(f"s1_{branch}", stage(inputs, width, depth))
            convolution = nn.Conv3d(width, width, kernel_size=2, stride=(1, 2, 2))  # over [time, height, width]
            self.add_module(f"sampler_{branch}", nn.Sequential(convolution, nn.SiLU()))
            self.add_module(f"s2_{branch}", stage(width, width, depth))
            self.add_module(f"readout_{branch}", mlp(width, width, width))
        self.mlp_2xgelu_face = mlp(inputs, width, width)

    def convolve(self, branch: str, features: Tensor) -> Tensor:
        """The video or body branch: [B, T, H, W, C] -> [B, T, h, w, D]."""
        x = self.get_submodule(f"s1_{branch}")(features.flatten(0, 1).permute(0, 3, 1, 2))  # [B * T, D, H, W]
        x = x.unflatten(0, features.shape[:2]).transpose(1, 2)  # [B, D, T, H, W]
        # The release pads time on both sides and drops the last of its T + 1 steps: the same as padding the past alone.
        x = F.pad(x, (*4 * [self.padding], 1, 0))
        x = self.get_submodule(f"sampler_{branch}")(x).transpose(1, 2)  # [B, T, D, h, w]
        x = self.get_submodule(f"s2_{branch}")(x.flatten(0, 1)).permute(0, 2, 3, 1)  # [B * T, h, w, D]
        return self.get_submodule(f"readout_{branch}")(x).unflatten(0, features.shape[:2])

    def forward(self, features: Tensor, gate: Tensor) -> Tensor:
        """features [B, T, H, W, C], gate [B, 3] (video, body, face; sums to 1) -> visual tokens [B, T * h * w, D]."""
        branches = [self.convolve("video", features), self.convolve("body", features)]
        face = self.mlp_2xgelu_face(features).flatten(0, 1).permute(0, 3, 1, 2)  # [B * T, D, H, W]
        half = [(side + 1) // 2 for side in features.shape[2:4]]
        face = F.interpolate(face, size=half, mode="bilinear", align_corners=False)
        branches.append(face.permute(0, 2, 3, 1).unflatten(0, features.shape[:2]))
        return sum(w.view(-1, 1, 1) * x.flatten(1, 3) for w, x in zip(gate.unbind(1), branches))
