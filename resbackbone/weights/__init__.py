"""Reading weights files and putting them into networks, strictly."""

from resbackbone.weights.files import read_state_dict
from resbackbone.weights.formats import read_weights
from resbackbone.weights.info import WeightsInfo
from resbackbone.weights.loading import LoadReport, Weights, load_weights, locate_weights, open_weights
from resbackbone.weights.torchvision import download_torchvision

__all__ = [
    "LoadReport",
    "Weights",
    "WeightsInfo",
    "download_torchvision",
    "load_weights",
    "locate_weights",
    "open_weights",
    "read_state_dict",
    "read_weights",
]
