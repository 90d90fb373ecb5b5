"""What a checkpoint needs to run. These files travel to the Hub, flattened into one folder."""

import transformers  # noqa: F401  # first, so that registering its Auto classes never meets a half-imported file of ours
