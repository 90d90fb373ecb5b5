"""VideoMamba as vision tower: clips of frames go through it together, so that its rows know of motion."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .configuration_videomamba_sizes import IMAGENET_MEAN, IMAGENET_STD, VideoMambaSizes
from .vision_adapter import TowerAdapter, TowerCost, TowerParameters

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .configuration_videomamba import VideoMambaConfig
    from .modeling_videomamba import VideoMambaModel


@dataclass(frozen=True)
class VideoMambaCost(TowerCost):
    """Sizes of a VideoMamba tower; `hidden` are its inner channels, `heads` the numbers of state of each."""

    def kept_bytes(self, compute: int, weight_bytes: int) -> float:
        """As of the blocks in PyTorch: the stream and its norm in fp32, projections, and both scans' inputs."""
        norm = 4 * 4 * self.width
        mixer = compute * (self.width + 3 * self.hidden) + 2 * 4 * (6 * self.hidden + 2 * self.heads)
        return self.layers * self.rows * (norm + mixer)

    def layer_bytes(self, compute: int) -> int:
        return self.rows * (compute * 3 * self.hidden + 2 * 4 * 6 * self.hidden)

    @property
    def operations(self) -> int:
        projections = 2 * 3 * self.width * self.hidden
        return self.layers * self.rows * (projections + 2 * self.hidden * (9 * self.heads + self.width // 4))


class VideoMambaAdapter(TowerAdapter["VideoMambaModel"]):
    """This package's `VideoMambaModel`.

    A clip is as long as the tower's `num_frames`; a last, shorter one takes the first temporal positions (and repeats
    its last frame where a tubelet would be cut). Features are those of the patches behind the tower's final norm,
    whichever hidden state is taken: the stream itself grows with depth. A tubelet's row stands for each of its frames.
    """

    model_type = "videomamba"
    feature_layer = -1  # all of it is used
    image_mean = IMAGENET_MEAN
    image_std = IMAGENET_STD
    leading_rows = 1
    no_split_modules = ("VideoMambaBlock",)
    lora_targets = ("in_proj", "out_proj")
    no_decay = ("cls_token", "pos_embed", "temporal_pos_embedding")
    identity_fields = (
        *("model_type", "hidden_size", "num_hidden_layers", "state_size", "expand", "conv_kernel", "time_step_rank"),
        *("image_size", "patch_size", "num_frames", "tubelet_size", "scan_order", "share_scan_weights"),
        "layer_norm_eps",
    )
    defaults: Mapping[str, Any] = {}  # its sizes check themselves

    def make_config(self, **fields: Any) -> VideoMambaConfig:
        from .configuration_videomamba import VideoMambaConfig

        return VideoMambaConfig(**fields)

    def make_sizes(self, **fields: Any) -> VideoMambaSizes:
        return VideoMambaSizes(**fields)

    def make_tower(self, vision_config: Any) -> nn.Module:
        from .modeling_videomamba import VideoMambaModel

        return VideoMambaModel._from_config(vision_config)

    def clip_frames(self, vision_config: Any) -> int:
        return vision_config.num_frames

    def used_modules(self, tower: VideoMambaModel, config: Any) -> Iterator[nn.Module]:
        from torch import nn

        yield tower.patch_embed
        yield nn.ParameterList([tower.cls_token, *self.position_embeddings(tower)])
        yield from tower.layers[: self.layer_count(config)]
        yield tower.norm_f

    def input_dtype(self, tower: VideoMambaModel) -> torch.dtype:
        return tower.patch_embed.proj.weight.dtype

    def encode(self, tower: VideoMambaModel, config: Any, pixels: Tensor, clips: Sequence[int]) -> Tensor:
        """Normalised frames `(F, 3, h, w)` -> `(F, patches_per_side**2, D)`; see the class."""
        import torch

        # Clips of one length go together wherever they stand: videos end in short ones, and a call for each run of
        # equal lengths would be several for every video of a batch.
        numbers = torch.arange(len(pixels), device=pixels.device).split(list(clips))
        rows, order = [], []
        for length in sorted(set(clips), reverse=True):
            places = torch.stack([each for each in numbers if len(each) == length])
            rows.append(self._encode_clips(tower, config, pixels[places]).flatten(0, 1))
            order.append(places.flatten())
        if len(rows) == 1:
            return rows[0]
        return torch.cat(rows)[torch.argsort(torch.cat(order))]

    def _encode_clips(self, tower: VideoMambaModel, config: Any, frames: Tensor) -> Tensor:
        """Clips of one length `(B, T, 3, h, w)` -> `(B, T, P, D)`."""
        import torch

        length, tubelet = frames.shape[1], config.vision_config.tubelet_size or 1
        if missing := -length % tubelet:
            frames = torch.cat([frames, frames[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        stream, delta = tower.run_blocks(tower.embed(frames), self.layer_count(config))
        hidden = tower.norm_f(delta if stream is None else stream + delta)
        patches = hidden[:, 1:].unflatten(1, (frames.shape[1] // tubelet, -1))
        return patches.repeat_interleave(tubelet, dim=1)[:, :length]

    def position_embeddings(self, tower: VideoMambaModel) -> list[nn.Parameter]:
        return [each for each in (tower.pos_embed, tower.temporal_pos_embedding) if each is not None]

    def names_within(self, keys: Collection[str]) -> dict[str, str] | None:
        """Of an encoder's checkpoint, or of a classifier's, whose head keeps its name."""
        if not any(key.endswith("patch_embed.proj.weight") for key in keys):
            return None
        return {key: key.removeprefix("videomamba.") for key in keys}

    def cost(self, config: Any) -> VideoMambaCost:
        vision = config.vision_config
        return VideoMambaCost(
            layers=self.layer_count(config),
            width=vision.hidden_size,
            rows=self.patches_per_side(vision) ** 2 + 1,
            pixels=3 * vision.image_size**2,
            hidden=vision.inner_size,
            hidden_copies=1,
            heads=vision.state_size,
        )

    def parameters(self, config: Any) -> TowerParameters:
        vision, layers = config.vision_config, config.vision_config.num_hidden_layers
        width, inner, state, rank = vision.hidden_size, vision.inner_size, vision.state_size, vision.time_step_rank
        frames, patches = vision.grid
        scan = inner * (vision.conv_kernel + 1 + rank + 2 * state + rank + 1 + state + 1)
        layer = width + 3 * width * inner + vision.scan_weight_sets * scan
        pixels = vision.num_channels * vision.patch_size**2 * (vision.tubelet_size or 1)
        around = width * (pixels + 1 + 1 + patches + 1 + (frames if vision.is_video else 0) + 1)
        used = around + self.layer_count(config) * layer
        return TowerParameters(around + layers * layer, used, layers * (width + 3 * inner + width))
