"""VideoMamba trained the paper's way: classification, distillation, masked pre-training and retrieval."""
