"""What transformers' Auto classes load for a checkpoint in the released layout: its conversion.

Not in `released.py`, which must not import transformers while it is imported: that is what registers these classes.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .released import MODEL_TYPE, usable_folder


class ReleasedConfig(PreTrainedConfig):
    """config.json of a checkpoint in the released layout, as it stands."""

    model_type = MODEL_TYPE


def auto_loader(loaded: type) -> type:
    """A class to register beside `ReleasedConfig`: its `from_pretrained` is that of `loaded`, on the conversion."""

    def from_pretrained(_: type, source: str | Path, *arguments: Any, config: Any = None, **options: Any) -> Any:
        return loaded.from_pretrained(usable_folder(str(source), options.get("revision")), *arguments, **options)

    methods = {"config_class": ReleasedConfig, "from_pretrained": classmethod(from_pretrained)}
    return type(f"Released{loaded.__name__}", (), {"__doc__": auto_loader.__doc__, **methods})
