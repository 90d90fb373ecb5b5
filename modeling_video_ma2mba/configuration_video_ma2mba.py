"""Configurations of Video-Ma2mba: the Mamba-2 language model and the whole vision-language model.

Defaults are the paper's choices (arXiv 2411.19460, sections 3.4 and 4.1): CLIP ViT-L/14-336, penultimate layer,
patch tokens, 2x2 bilinear pooling before a two-layer GELU projector, no separators between frames.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

from .configuration_sizes import Ma2mbaTextSizes, VideoMa2mbaSizes
from .vision_towers import tower_adapter


class Ma2mbaTextConfig(Ma2mbaTextSizes, PreTrainedConfig):
    """Mamba-2 language model; arguments as of `Ma2mbaTextSizes`."""

    base_model_fsdp_plan = {"layers.*": "free_full_weight"}
    base_config_key = "text_config"
    __init__ = Ma2mbaTextSizes.__init__

    @property
    def layer_types(self) -> list[str]:
        """What the field's tools look at to recognise a recurrent stack."""
        return ["linear_attention"] * self.num_hidden_layers


class CheckpointPipelines(dict[str, Any]):
    """Tasks whose code comes with a checkpoint (`config.custom_pipelines`).

    transformers asks for `trust_remote_code` for all that are in here. Where the package is imported it has registered
    the same class under its task, nothing needs to be loaded from the checkpoint, and the task is not "in" here.
    """

    def __contains__(self, task: object) -> bool:
        return super().__contains__(task) and not self._registered(str(task))

    def _registered(self, task: str) -> bool:
        from transformers.pipelines import PIPELINE_REGISTRY

        if task not in PIPELINE_REGISTRY.get_supported_tasks():
            return False
        name = str(self[task].get("impl")).rpartition(".")[2]
        return getattr(PIPELINE_REGISTRY.check_task(task)[1]["impl"], "__name__", None) == name


class VideoMa2mbaConfig(VideoMa2mbaSizes, PreTrainedConfig):
    """Vision tower, projector and language model together; arguments as of `VideoMa2mbaSizes`."""

    # Vision tower and head belong to the root unit: frames are recomputed in chunks, whose number differs by process.
    base_model_fsdp_plan = {"language_model.layers.*": "free_full_weight"}
    sub_configs = {"text_config": Ma2mbaTextConfig, "vision_config": AutoConfig}
    has_no_defaults_at_init = False

    __init__ = VideoMa2mbaSizes.__init__

    @staticmethod
    def make_text(**fields: Any) -> Ma2mbaTextConfig:
        return Ma2mbaTextConfig(**fields)

    @staticmethod
    def make_vision(kind: str, **fields: Any) -> PreTrainedConfig:
        return tower_adapter(kind).make_config(**fields)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, CheckpointPipelines(value) if name == "custom_pipelines" else value)

    @property
    def image_token_id(self) -> int:
        """Images are videos of one frame. TRL keeps models from sampling this token."""
        return self.video_token_id


VideoMa2mbaConfig.register_for_auto_class()


def register_for_serving(found: Any = AutoModelForImageTextToText) -> None:
    """`transformers serve` and `transformers chat` look a checkpoint's architecture up among transformers' own names,
    whatever code comes with it; without these two entries they cannot find it.

    Args:
        found: what is found under the architecture's name; the Auto class finds the code that comes with a checkpoint.
    """
    try:
        # This one runs transformers' top-level module a second time: after it, both copies are there.
        importlib.import_module("transformers.processing_utils")
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES
    except ImportError:  # another transformers looks elsewhere: nothing else needs this
        return
    architecture = "VideoMa2mbaForConditionalGeneration"
    NAMES.setdefault(VideoMa2mbaConfig.model_type, architecture)
    loaded = [module for name, module in list(sys.modules.items()) if name.startswith("transformers.")]
    held = [vars(module).get("transformers") for module in loaded]  # files that were there first keep the first copy
    for module in (sys.modules["transformers"], *(module for module in held if isinstance(module, ModuleType))):
        if found is not AutoModelForImageTextToText or architecture not in vars(module):
            setattr(module, architecture, found)


register_for_serving()
