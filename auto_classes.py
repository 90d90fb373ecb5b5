"""Registers the package's classes with transformers' Auto classes and pipelines.

`import video_ma2mba` must be cheap (`video-ma2mba --help` imports it), and importing transformers with torch takes
seconds. So registration waits for transformers: it happens at once when transformers is loaded already, and otherwise
as soon as somebody imports it, or a file of this package that needs it. After `import video_ma2mba`, in either order,
`AutoConfig`, `AutoModel`, `AutoModelForImageTextToText`, `AutoModelForCausalLM`, `AutoProcessor` and
`pipeline("video-question-answering")` know Video-Ma2mba without `trust_remote_code`.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys

PIPELINE_TASK = "video-question-answering"
_LOOKS_THROUGH_MODELS = "transformers.utils.import_utils"
_HUB_FOLDERS = ("modeling_video_ma2mba", "processing")
WITHOUT_TORCH = {
    "modeling_video_ma2mba.configuration_fields",
    "modeling_video_ma2mba.configuration_sizes",
    "modeling_video_ma2mba.configuration_videomamba_sizes",
    "modeling_video_ma2mba.cost_memory",
    "modeling_video_ma2mba.cost_search",
    "modeling_video_ma2mba.cost_step",
    "modeling_video_ma2mba.cost_time",
    "modeling_video_ma2mba.cost_vision",
    "modeling_video_ma2mba.ops_costs",
    "modeling_video_ma2mba.parallel_dims",
    "modeling_video_ma2mba.recompute_plan",
    "modeling_video_ma2mba.recompute_schedule",
    "modeling_video_ma2mba.state_header",
    "modeling_video_ma2mba.state_version",
    "modeling_video_ma2mba.state_writing",
    "modeling_video_ma2mba.vision_adapter",
    "modeling_video_ma2mba.vision_clip",
    "modeling_video_ma2mba.vision_siglip",
    "modeling_video_ma2mba.vision_towers",
    "modeling_video_ma2mba.vision_videomamba",
    "processing.frame_fitting",
    "processing.frame_sampling",
    "processing.frame_times",
    "processing.mp4_index",
    "processing.video_clean_starts",
    "processing.video_decoding",
    "processing.video_source_names",
    "processing.video_subtitles",
}
"""Files of the Hub folders that need neither torch nor transformers: a wrong argument is told without loading them."""


def register() -> None:
    """Register every class. Safe to call again (later calls replace earlier entries)."""
    import transformers

    # The top-level names of these two are placeholders where torchvision is missing.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor
    from transformers.pipelines import PIPELINE_REGISTRY

    from .conversion.released_auto import ReleasedConfig, auto_loader
    from .modeling_video_ma2mba.configuration_video_ma2mba import (
        Ma2mbaTextConfig,
        VideoMa2mbaConfig,
        register_for_serving,
    )
    from .modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
    from .modeling_video_ma2mba.configuration_videomamba_retrieval import VideoMambaRetrievalConfig
    from .modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaModel
    from .modeling_video_ma2mba.modeling_videomamba import VideoMambaForVideoClassification, VideoMambaModel
    from .modeling_video_ma2mba.modeling_videomamba_retrieval import VideoMambaForRetrieval
    from .modeling_video_ma2mba.pipeline_video_ma2mba import VideoQuestionAnsweringPipeline
    from .modeling_video_ma2mba.stack_language_model import Ma2mbaTextModel
    from .processing.processing_video_ma2mba import VideoMa2mbaProcessor
    from .processing.video_processing_video_ma2mba import VideoMa2mbaVideoProcessor
    from .processing.video_processing_videomamba import VideoMambaImageProcessor, VideoMambaVideoProcessor

    transformers.AutoConfig.register("video_ma2mba", VideoMa2mbaConfig, exist_ok=True)
    transformers.AutoConfig.register("video_ma2mba_text", Ma2mbaTextConfig, exist_ok=True)
    transformers.AutoModel.register(VideoMa2mbaConfig, VideoMa2mbaModel, exist_ok=True)
    transformers.AutoModel.register(Ma2mbaTextConfig, Ma2mbaTextModel, exist_ok=True)
    released = auto_loader(VideoMa2mbaForConditionalGeneration)  # converts checkpoints in the authors' layout
    transformers.AutoConfig.register(ReleasedConfig.model_type, ReleasedConfig, exist_ok=True)
    transformers.AutoModel.register(ReleasedConfig, auto_loader(VideoMa2mbaModel), exist_ok=True)
    for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM"):
        if hasattr(transformers, name):  # AutoModelForMultimodalLM came in the course of transformers 5
            getattr(transformers, name).register(VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration, exist_ok=True)
            getattr(transformers, name).register(ReleasedConfig, released, exist_ok=True)
    register_for_serving(VideoMa2mbaForConditionalGeneration)
    transformers.AutoProcessor.register(VideoMa2mbaConfig, VideoMa2mbaProcessor, exist_ok=True)
    transformers.AutoProcessor.register(ReleasedConfig, auto_loader(VideoMa2mbaProcessor), exist_ok=True)
    AutoVideoProcessor.register(VideoMa2mbaConfig, VideoMa2mbaVideoProcessor, exist_ok=True)

    transformers.AutoConfig.register("videomamba", VideoMambaConfig, exist_ok=True)
    transformers.AutoModel.register(VideoMambaConfig, VideoMambaModel, exist_ok=True)
    AutoVideoProcessor.register(VideoMambaConfig, VideoMambaVideoProcessor, exist_ok=True)
    pictures = VideoMambaImageProcessor  # of either backend: pictures are fitted by NumPy
    AutoImageProcessor.register(
        VideoMambaConfig, image_processor_classes={"pil": pictures, "torchvision": pictures}, exist_ok=True
    )
    for auto_class in (transformers.AutoModelForVideoClassification, transformers.AutoModelForImageClassification):
        auto_class.register(VideoMambaConfig, VideoMambaForVideoClassification, exist_ok=True)
    transformers.AutoConfig.register("videomamba_retrieval", VideoMambaRetrievalConfig, exist_ok=True)
    transformers.AutoModel.register(VideoMambaRetrievalConfig, VideoMambaForRetrieval, exist_ok=True)
    AutoVideoProcessor.register(VideoMambaRetrievalConfig, VideoMambaVideoProcessor, exist_ok=True)

    PIPELINE_REGISTRY.register_pipeline(
        PIPELINE_TASK,
        pipeline_class=VideoQuestionAnsweringPipeline,
        pt_model=transformers.AutoModelForImageTextToText,
        type="multimodal",
    )


def register_with_transformers() -> None:
    """Register now if transformers is loaded, else right after its top-level module has been imported."""
    if "transformers" in sys.modules:
        register()
    elif not any(isinstance(finder, _TransformersFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TransformersFinder())


def remember_folders(import_utils) -> None:
    """Let transformers remember all folders of models that it has looked through, of which it keeps too few: it looks
    through some 500 twice while it is imported, a quarter of a second each time."""
    looks = getattr(import_utils, "create_import_structure_from_path", None)
    if hasattr(looks, "__wrapped__"):
        import_utils.create_import_structure_from_path = functools.cache(looks.__wrapped__)


class _TransformersFinder(importlib.abc.MetaPathFinder):
    """Finds transformers as the other finders would, and registers when its module has run. Others may only look
    whether transformers is there (accelerate does): it stays in place until then.

    The top-level module of transformers imports nothing heavy and is complete by then, so registering there never
    meets a half-imported module of transformers; nor of ours, before whose files transformers comes first.
    """

    def find_spec(self, fullname, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        package, _, inside = fullname.partition(".")
        if package == __package__ and "." in inside and inside.split(".")[0] in _HUB_FOLDERS:
            return None if inside in WITHOUT_TORCH else self._after_transformers(fullname)
        if fullname not in ("transformers", _LOOKS_THROUGH_MODELS):
            return None
        sys.meta_path.remove(self)  # or it would find itself
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        run_module = spec.loader.exec_module

        def run_module_and_register(module) -> None:
            try:
                run_module(module)
            finally:
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
            register()

        def run_module_and_remember(module) -> None:
            run_module(module)
            remember_folders(module)

        is_top = fullname == "transformers"
        spec.loader.exec_module = run_module_and_register if is_top else run_module_and_remember
        return spec

    def _after_transformers(self, fullname: str) -> importlib.machinery.ModuleSpec | None:
        """The file that registering has imported meanwhile, or None: it is found as any other."""
        importlib.import_module("transformers")
        found = sys.modules.get(fullname)
        if found is None:
            return None
        # Of a module that has come meanwhile, the import system takes the spec that it has: it would run twice.
        found.__spec__ = importlib.machinery.ModuleSpec(fullname, _Loaded(found))
        return found.__spec__


class _Loaded(importlib.abc.Loader):
    """Gives a module that is there, as it is."""

    def __init__(self, module) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec):
        return self.module

    def exec_module(self, module) -> None:
        module.__spec__ = self.spec  # the import system has put its own
