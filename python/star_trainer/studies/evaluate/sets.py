"""What a set of pictures is like beside a reference set: FID and KID, on features of a network that the user names."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from star_trainer.config import ConfigError
from star_trainer.families.devices import own_device

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_SUBSETS, _SUBSET = 100, 1000


class Features:
    """A TorchScript file as a function of images [B, 3, H, W] uint8 that gives features [B, D].

    With ``inception-2015-12-05.pt``, NVIDIA's copy of the network that FID is defined on, they are its pooled ones.

    Raises:
        ConfigError: the file cannot be loaded as TorchScript.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.device = path, own_device()
        try:
            self.network = torch.jit.load(path, map_location=self.device).eval()
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"--features: {path} cannot be loaded as TorchScript: {error}") from error
        names = [argument.name for argument in self.network.forward.schema.arguments]
        self.options = {"return_features": True} if "return_features" in names else {}

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Tensor:
        """[B, D] in float32 from images [B, H, W, 3] uint8.

        Raises:
            ConfigError: the network cannot take such images, or gives anything but a vector for each.
        """
        batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(self.device)
        try:
            found = self.network(batch, **self.options)
        except RuntimeError as error:
            shape = list(images.shape)
            last = str(error).strip().splitlines()[-1]
            raise ConfigError(f"--features: {self.path} takes no images {shape} of uint8: {last}") from error
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(images):
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(f"--features: {self.path}: expected features [{len(images)}, D], got {got}")
        return found.float().cpu()


def reference_pictures(folder: Path) -> Iterator[np.ndarray]:
    """The pictures of a folder and those below it, one by one, [1, H, W, 3] uint8, in the order of their names.

    Raises:
        ConfigError: fewer than two, or one that cannot be read.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS)
    if len(paths) < 2:
        raise ConfigError(f"--reference: expected a folder with at least two pictures, found {len(paths)} in {folder}")
    for path in paths:
        try:
            with Image.open(path) as picture:
                yield np.array(picture.convert("RGB"))[None]
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ConfigError(f"--reference: {path} cannot be read ({error})") from error


@dataclass(frozen=True)
class Distance:
    """FID, and KID with the deviation over its subsets, of so many pictures to so many of the reference."""

    fid: float
    kid: float
    kid_std: float
    pictures: int
    reference: int


class Reference:
    """The features of a reference set, which other sets are compared with.

    Raises:
        ConfigError: as of `reference_pictures` and `Features`; torchmetrics is missing.
    """

    def __init__(self, folder: Path, features: Features) -> None:
        try:
            import torchmetrics  # noqa: F401
        except ImportError as error:
            raise ConfigError("--reference: FID needs the extra: pip install 'star-kernels[metrics]'") from error
        self.features = features
        self.own = torch.cat([features(picture) for picture in reference_pictures(folder)])

    def distance(self, pictures: Iterable[np.ndarray]) -> Distance:
        """Of pictures in batches [B, H, W, 3] uint8, at least two in all."""
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        found = torch.cat([self.features(batch) for batch in pictures])
        size = min(_SUBSET, len(found), len(self.own))
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            # It says that it keeps all features, which it is given.
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            fid = FrechetInceptionDistance(feature=_AsTheyAre(found.shape[1]))
            kid = KernelInceptionDistance(feature=_AsTheyAre(found.shape[1]), subsets=_SUBSETS, subset_size=size)
            for metric in (fid, kid):
                metric.update(self.own, real=True)
                metric.update(found, real=False)
            mean, std = kid.compute()
            return Distance(float(fid.compute()), float(mean), float(std), len(found), len(self.own))


class _AsTheyAre(nn.Module):
    """What torchmetrics takes for a network: it is given features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Any:
        return features
