"""How classifiers are trained: ImageNet and CIFAR data, the paper's recipe and a modern one, the visible loop, and evaluation."""
