"""VideoMamba trained the paper's way: classification, self-distillation and masked pre-training."""
