"""The losses of distillation: pure functions of tensors, each with its formula, its source and a worked example."""

from tutelage.distillation.losses import contrastive, distillation, divergence, feature_distance, queue_similarity
from tutelage.distillation.losses import self_distillation as self_distillation

__all__ = ["contrastive", "distillation", "divergence", "feature_distance", "queue_similarity", "self_distillation"]
