"""Training data: any source as chat rows, and chat rows as batches, decoded in worker processes.

rows = load_training_data("my_videos/questions.csv")
collator = VideoChatCollator(processor, max_frames=256, report=BrokenSamples("runs/broken_samples.jsonl"))
loader = DataLoader(rows, batch_size=2, collate_fn=collator, num_workers=4)
"""

from .broken_samples import BrokenSamples, TooManyBrokenError
from .collator import VideoChatCollator
from .lengths import estimated_lengths
from .loading import load_training_data

__all__ = ["BrokenSamples", "TooManyBrokenError", "VideoChatCollator", "estimated_lengths", "load_training_data"]
