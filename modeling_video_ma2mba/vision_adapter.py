"""What the rest of the package may ask of a vision tower; one small file per kind of tower answers.

An adapter holds facts and functions, no weights: the tower stays an ordinary transformers model. Nothing here imports
torch, so that configurations and plans can ask, too.

Legend: F frames, R rows a frame takes inside the tower, D the tower's width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class TowerCost:
    """Sizes of a tower of transformer layers with fused attention, and what a frame costs in it.

    Attributes:
        layers: those that run. width: D. rows: R. pixels: numbers in a frame.
        hidden: width of the MLP. hidden_copies: copies of it that the MLP's activation leaves for backward (3 for
            CLIP's quick GELU, 2 for a fused GELU). heads: of the attention.
    """

    layers: int
    width: int
    rows: int
    pixels: int
    hidden: int
    hidden_copies: int
    heads: int

    def kept_bytes(self, compute: int, weight_bytes: int) -> float:
        """Bytes that autograd keeps of one frame, for a compute type of `compute` bytes.

        Under autocast (weights wider than the compute type) both norms read a stream in fp32, and query, key and value
        each keep a cast copy of the first one's result.
        """
        cast = 2 * (4 - compute) + 2 * compute if weight_bytes > compute else 0
        widths = (8 * compute + cast) * self.width + compute * self.hidden_copies * self.hidden
        return self.layers * self.rows * (widths + 4 * (self.heads + 4))

    def layer_bytes(self, compute: int) -> int:
        """Bytes of one frame's largest layer while it runs."""
        return compute * self.rows * (3 * self.width + (self.hidden_copies + 1) * self.hidden)

    @property
    def operations(self) -> int:
        """Floating point operations of one frame's forward pass."""
        d, m, r = self.width, self.hidden, self.rows
        return self.layers * r * (2 * (4 * d * d + 2 * d * m) + 4 * r * d)


@dataclass(frozen=True)
class TowerParameters:
    """How many parameters a tower has.

    Attributes:
        total: all. used: those that features depend on. lora_sides: inputs and outputs, summed, of all linear layers
            that adapters are put on; times their rank, it is the adapters' parameters.
    """

    total: int
    used: int
    lora_sides: int


class Encoder(Protocol):
    """The layers of an `EncoderTower`."""

    layers: nn.ModuleList


class EncoderTower(Protocol):
    """A vision tower of transformers, as its CLIP and SigLIP classes build it."""

    embeddings: nn.Module
    encoder: Encoder


Tower = TypeVar("Tower", bound=EncoderTower)


class TowerAdapter(Generic[Tower]):
    """A tower as transformers' CLIP and SigLIP classes build it; other kinds override what differs.

    Attributes:
        model_type: `vision_config.model_type` that it serves.
        image_mean, image_std: with which its checkpoints were trained, of pixels scaled to 0..1.
        leading_rows: rows in front of the patches that say nothing about a place in the frame (class tokens).
        no_split_modules: classes that `device_map` must keep on one device.
        lora_targets: names of the linear layers that adapters are put on.
        feature_layer: `vision_feature_layer` of a fresh model (the paper leaves the last layer of a CLIP out).
        no_decay: names of parameters without weight decay, beside biases and norms.
        identity_fields: of the vision configuration, those that decide what the tower computes: states made with other
            values are refused.
        defaults: of the fields of its configuration that decide its sizes, as in transformers.
    """

    model_type: str
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    leading_rows: int = 0
    no_split_modules: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    feature_layer: int = -2
    no_decay: tuple[str, ...] = ()
    identity_fields: tuple[str, ...] = (
        *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size"),
        *("patch_size", "hidden_act", "layer_norm_eps"),
    )
    defaults: Mapping[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                                   "num_attention_heads": 12, "num_channels": 3, "image_size": 224}  # fmt: skip

    def make_config(self, **fields: Any) -> Any:
        """A vision configuration of this kind."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **fields)

    def make_sizes(self, **fields: Any) -> Any:
        """What plans read of a vision configuration of this kind, without transformers."""
        return SimpleNamespace(**{**self.defaults, **fields, "model_type": self.model_type})

    def make_tower(self, vision_config: Any) -> nn.Module:
        """A fresh tower."""
        from transformers import AutoModel

        return AutoModel.from_config(vision_config)

    def clip_frames(self, vision_config: Any) -> int:
        """Frames that the tower looks at together; clips begin with the video, and its last one may be shorter."""
        return 1

    def patches_per_side(self, vision_config: Any) -> int:
        """Patches along one side of a frame."""
        return vision_config.image_size // vision_config.patch_size

    def layer_count(self, config: Any) -> int:
        """Layers below hidden state `config.vision_feature_layer` (transformers counts the embedding as 0)."""
        layer = config.vision_feature_layer
        return layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer

    def used_modules(self, tower: Tower, config: Any) -> Iterator[nn.Module]:
        """The parts of the tower that the features depend on."""
        yield tower.embeddings
        yield from tower.encoder.layers[: self.layer_count(config)]

    def input_dtype(self, tower: Tower) -> torch.dtype:
        """The type that the tower wants its pixels in."""
        return tower.embeddings.get_parameter("patch_embedding.weight").dtype

    def encode(self, tower: Tower, config: Any, pixels: Tensor, clips: Sequence[int]) -> Tensor:
        """Normalised frames `(F, 3, h, w)` -> rows of their patches `(F, patches_per_side**2, D)`, raster order.

        `clips` are the lengths of the clips that the F frames belong to, in order. Layers are walked here instead of
        calling the tower, so that what lies above the wanted hidden state is not computed; the result equals
        `tower(pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer]`.
        """
        hidden = self.embed(tower, pixels)
        for layer in tower.encoder.layers[: self.layer_count(config)]:
            hidden = layer(hidden, None)
        return hidden[:, self.leading_rows :]

    def embed(self, tower: Tower, pixels: Tensor) -> Tensor:
        """`(F, 3, h, w)` -> `(F, R, D)`, what the first layer reads."""
        return tower.embeddings(pixels)

    def position_embeddings(self, tower: Tower) -> list[nn.Parameter]:
        """Everything that is added to a patch for the place it stands at, and where it is in a clip."""
        return [tower.embeddings.get_parameter("position_embedding.weight")]

    def names_within(self, keys: Collection[str]) -> dict[str, str] | None:
        """The tensors of a checkpoint of such a tower by itself -> their names in the tower.

        None where these are none, or are named as transformers' CLIP and SigLIP name them, which the converter knows.
        """
        return None

    def cost(self, config: Any) -> TowerCost:
        """Sizes of the tower of a `VideoMa2mbaConfig`, and what a frame costs in it."""
        vision = config.vision_config
        return TowerCost(
            layers=self.layer_count(config),
            width=vision.hidden_size,
            rows=self.patches_per_side(vision) ** 2 + self.leading_rows,
            pixels=3 * vision.image_size**2,
            hidden=vision.intermediate_size,
            hidden_copies=3 if vision.hidden_act == "quick_gelu" else 2,
            heads=vision.num_attention_heads,
        )

    def parameters(self, config: Any) -> TowerParameters:
        """Of the tower of a `VideoMa2mbaConfig`, or of its sizes: counted, not built."""
        vision = config.vision_config
        width, hidden, layers = vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers
        layer = 4 * (width * width + width) + 2 * width * hidden + hidden + width + 2 * 2 * width
        below, above = self.around_layers(vision)
        sides = 4 * 2 * width + 2 * (width + hidden)  # of a layer's attention and MLP
        used = below + self.layer_count(config) * layer
        return TowerParameters(below + layers * layer + above, used, layers * sides + self.head_sides(vision))

    def around_layers(self, vision_config: Any) -> tuple[int, int]:
        """Parameters below the layers (embeddings) and above them."""
        raise NotImplementedError

    def head_sides(self, vision_config: Any) -> int:
        """As `TowerParameters.lora_sides`, of linear layers above the tower's own."""
        return 0
