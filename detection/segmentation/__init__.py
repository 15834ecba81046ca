"""Semantic segmentation on the same backbones: torchvision's FCN and DeepLabV3 heads, with detection's data, loop and output folder."""
