"""Save a model so that others can load it without this package, then load it that way in a fresh process.

python examples/share_a_model.py [OUT_DIR]

`model.push_to_hub(...)` and `processor.push_to_hub(...)` send the same files to the Hub.
"""

import subprocess
import sys
import tempfile

from video_ma2mba.loading import load_pipeline

out = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
pipe = load_pipeline()
pipe.save_pretrained(out)  # weights, configuration, code, and the name of the pipeline
pipe.processor.save_pretrained(out)  # tokenizer, video processor, chat template

# -I leaves this folder off the path; the finder that makes an editable install importable is taken away by hand.
elsewhere = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.modules["video_ma2mba"] = None  # importing the package would fail now
from transformers import pipeline
pipe = pipeline("video-question-answering", model={out!r}, trust_remote_code=True)
print(type(pipe.model).__module__)
"""
subprocess.run([sys.executable, "-I", "-c", elsewhere], check=True)
