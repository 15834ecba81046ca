"""What depth does with and without shortcuts (He et al. 2015, §4.2, Figure 6): 20 and 56 layers, plain and residual, on CIFAR-10.

    python benchmarks/cifar_depth.py --data cifar10.npz --output OUT --networks plain20 plain56 resnet20 resnet56 --iterations 64000

--data: an .npz with train_images and test_images (uint8 [N, 32, 32, 3], RGB), train_labels and test_labels; or the folder of CIFAR-10's
own binary version (data_batch_1.bin …). The recipe is the paper's: batch 128, learning rate 0.1 divided by 10 at one half and three
quarters, momentum 0.9, weight decay 1e-4, the training images' mean image subtracted, 4 pixels of padding, a random crop, a random flip.
The whole set lives on the device as uint8 and is augmented there. OUT/NAME_seedS.jsonl holds the curve, OUT/NAME_seedS.safetensors the
weights, OUT/curves.png and OUT/responses.png the two figures, drawn from whatever OUT holds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resbackbone import create_classifier, load_weights
from resbackbone.backbone import Backbone
from resbackbone.responses import layer_responses, plot_signals
from resbackbone.runtime.checkpoint import save_weights

BATCH = 128
PADDING = 4
COLORS = {"20": "tab:olive", "32": "tab:cyan", "44": "tab:green", "56": "tab:red", "110": "black"}  # the paper's, by depth


def load_cifar(source: Path) -> dict[str, Tensor]:
    """train_images, train_labels, test_images, test_labels; images uint8 [N, 3, 32, 32]."""
    if source.suffix == ".npz":
        with np.load(source, allow_pickle=False) as arrays:
            data = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        return {name: values.permute(0, 3, 1, 2).contiguous() if "images" in name else values.long() for name, values in data.items()}
    files = {"train": [source / f"data_batch_{number}.bin" for number in range(1, 6)], "test": [source / "test_batch.bin"]}
    data = {}
    for split, paths in files.items():
        records = torch.from_numpy(np.concatenate([np.fromfile(path, np.uint8) for path in paths])).view(-1, 1 + 3 * 32 * 32)
        data[f"{split}_labels"], data[f"{split}_images"] = records[:, 0].long(), records[:, 1:].reshape(-1, 3, 32, 32)
    return data


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of the image padded with 4 zeros, and a random flip, each image its own. float [N, 3, 32, 32]."""
    count, size = len(images), images.shape[-1]
    padded = F.pad(images, (PADDING,) * 4)
    top, left = torch.randint(0, 2 * PADDING + 1, (2, count, 1), generator=generator).to(images.device)
    steps = torch.arange(size, device=images.device)
    flip = (torch.rand(count, 1, generator=generator) < 0.5).to(images.device)
    columns = left + torch.where(flip, size - 1 - steps, steps)
    rows = top + steps
    return padded[torch.arange(count, device=images.device)[:, None, None, None], torch.arange(3, device=images.device)[:, None, None],
                  rows[:, None, :, None], columns[:, None, None, :]]  # fmt: skip


def train(name: str, seed: int, data: dict[str, Tensor], args: argparse.Namespace) -> None:
    """One run; its curve is written as it grows."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = create_classifier(f"{name}_cifar").to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    milestones = [args.iterations // 2, args.iterations * 3 // 4]  # the paper's 32k and 48k of 64k
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    mean = data["train_images"].float().mean(0)
    order, wrong, seen, began = torch.empty(0, dtype=torch.long), 0.0, 0, time.perf_counter()
    with (args.output / f"{name}_seed{seed}.jsonl").open("w") as curve:
        for iteration in range(1, args.iterations + 1):
            if len(order) < BATCH:
                order = torch.randperm(len(data["train_labels"]), generator=generator)
            chosen, order = order[:BATCH].to(args.device), order[BATCH:]
            images = augment(data["train_images"][chosen].float() - mean, generator)
            labels = data["train_labels"][chosen]
            with torch.autocast(args.device, torch.bfloat16):
                logits = net.train()(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels)  # type: ignore[union-attr]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            wrong, seen = wrong + (logits.argmax(1) != labels).sum().item(), seen + len(labels)  # type: ignore[union-attr]
            if iteration % args.every == 0 or iteration == args.iterations:
                row = {"iteration": iteration, "train_error": wrong / seen, "test_error": test_error(net, data, mean, args.device)}
                row["seconds"] = time.perf_counter() - began
                print(name, seed, json.dumps(row), flush=True)
                curve.write(json.dumps(row) + "\n")
                curve.flush()
                wrong, seen = 0.0, 0
    weights = {key: value.cpu().contiguous() for key, value in net.state_dict().items()}
    save_weights(args.output / f"{name}_seed{seed}.safetensors", weights, {"architecture": net.architecture})


@torch.no_grad()
def test_error(net: Backbone, data: dict[str, Tensor], mean: Tensor, device: str) -> float:
    """Share of the test images that the network gets wrong, in the precision it trains in."""
    net.eval()
    wrong = 0
    for start in range(0, len(data["test_labels"]), 500):
        images = (data["test_images"][start : start + 500].float() - mean).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            logits = net(images)
        wrong += (logits.argmax(1) != data["test_labels"][start : start + 500]).sum().item()  # type: ignore[attr-defined]
    return wrong / len(data["test_labels"])


def draw(output: Path, data: dict[str, Tensor]) -> None:
    """Figure 6 (training error dashed, test error a line; the mean over seeds, each seed thin) and Figure 7, from the files in `output`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for panel, kind in zip(figure.subplots(1, 2, sharey=True), ("plain", "resnet"), strict=True):
        runs = defaultdict(list)
        for path in sorted(output.glob(f"{kind}*_seed*.jsonl")):
            runs[path.stem.split("_")[0].removeprefix(kind)].append([json.loads(line) for line in path.read_text().splitlines()])
        for depth, curves in sorted(runs.items(), key=lambda item: int(item[0])):
            steps = [row["iteration"] for row in curves[0]]
            for error, style in (("train_error", "--"), ("test_error", "-")):
                values = np.array([[100 * row[error] for row in curve] for curve in curves if len(curve) == len(steps)])
                label = f"{kind}-{depth}" if error == "test_error" else None
                panel.plot(steps, values.mean(0), style, color=COLORS.get(depth), label=label)
                panel.plot(steps, values.T, style, color=COLORS.get(depth), linewidth=0.5, alpha=0.5)
        panel.set(xlabel="iteration", ylabel="error, % (dashed: training, line: test)" if kind == "plain" else "")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(output / "curves.png", dpi=90)
    mean = data["train_images"].float().mean(0)
    responses = {}
    for path in sorted(output.glob("*_seed0.safetensors")):
        name = path.stem.split("_")[0]
        net = create_classifier(f"{name}_cifar")
        load_weights(net, path)
        responses[name] = layer_responses(net, data["test_images"][:500].float().cpu() - mean.cpu())
    if responses:
        plot_signals(responses, output / "responses.png", ylabel="standard deviation of the response")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--networks", nargs="*", default=["plain20", "plain56", "resnet20", "resnet56"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--iterations", type=int, default=64000)
    parser.add_argument("--every", type=int, default=200, help="iterations between two points of the curve")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    data = {name: values.to(args.device) for name, values in load_cifar(args.data).items()}
    for seed in args.seeds:
        for name in args.networks:
            train(name, seed, data, args)
    draw(args.output, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
