"""Reading weights files and putting them into networks, strictly."""

from resbackbone.weights.files import read_state_dict
from resbackbone.weights.loading import LoadReport, load_weights, locate_weights
from resbackbone.weights.torchvision import download_torchvision

__all__ = ["LoadReport", "download_torchvision", "load_weights", "locate_weights", "read_state_dict"]
