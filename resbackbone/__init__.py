"""The ResNet backbone that every detector can take. These names are the public API; importing them needs torch alone."""

import resbackbone.cifar
import resbackbone.resnet
import resbackbone.vgg  # noqa: F401  these three imports fill the registry
from resbackbone.backbone import FeatureInfo
from resbackbone.registry import create_backbone, create_classifier, list_backbones, register_backbone
from resbackbone.weights import load_weights

__all__ = ["FeatureInfo", "create_backbone", "create_classifier", "list_backbones", "load_weights", "register_backbone"]
