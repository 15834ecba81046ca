"""The SLURM script and the Kubernetes job of docs/training_at_scale.md: their torchrun lines are run as they are written, on one machine.

What stands in for the cluster: `srun` runs its command once, `scontrol` names this machine, `scancel` signals srun's command. What is
replaced in the lines: the number of machines and of processes on each, the address to meet at, the config and the output folder. The
Kubernetes command's settings, made for ImageNet on many machines, are left out and checked by themselves.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_cls_distributed import free_port

from resbackbone.classification.config import load_classification_config
from resbackbone.classification.stream import StreamSampler
from resbackbone.runtime.checkpoint import find_checkpoint

REPOSITORY = Path(__file__).resolve().parents[3]
SETTING = re.compile(r"\w+\.\w+=")
PAGE = (REPOSITORY / "docs/training_at_scale.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.+?)```", PAGE, flags=re.DOTALL)
    return found


def kubernetes_objects() -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all(block("yaml"))}


def srun_of_slurm() -> list[str]:
    """The words of the line that srun begins, the shell's variables as they are."""
    (line,) = re.findall(r"^(srun .+) &$", block("slurm").replace("\\\n", " "), flags=re.MULTILINE)
    return shlex.split(line)


def torchrun_of_slurm() -> list[str]:
    words = srun_of_slurm()
    return words[words.index("torchrun") :]


def container_of_kubernetes() -> dict[str, Any]:
    (container,) = kubernetes_objects()["Job"]["spec"]["template"]["spec"]["containers"]
    return container


def torchrun_of_kubernetes() -> list[str]:
    """The command but for the settings."""
    return [word for word in container_of_kubernetes()["command"] if not SETTING.match(word)]


def settings_of_kubernetes() -> list[str]:
    return [word for word in container_of_kubernetes()["command"] if SETTING.match(word)]


def options_of(words: list[str]) -> dict[str, str]:
    """{option: value} of both forms, `--a b` and `--a=b`; the script is "script"."""
    found, rest = {}, words[1:]
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            name, _, value = word.partition("=")
            found[name] = value or rest.pop(0)
        else:
            found["script"] = word
    return found


def test_both_examples_start_the_same_thing() -> None:
    slurm, kubernetes = options_of(torchrun_of_slurm()), options_of(torchrun_of_kubernetes())
    assert slurm.keys() == kubernetes.keys()
    same = ("--nproc-per-node", "--rdzv-backend", "script", "--config", "--resume")
    assert {name: slurm[name] for name in same} == {name: kubernetes[name] for name in same}
    assert (REPOSITORY / slurm["script"]).is_file()
    config = load_classification_config(REPOSITORY / slurm["--config"], [])
    assert config.data.kind == "shards"


def test_the_slurm_script_asks_for_what_its_command_uses() -> None:
    script = block("slurm")
    asked = dict(re.findall(r"--([a-z-]+)(?:=(\S+))?", " ".join(re.findall(r"^#SBATCH (.+)$", script, flags=re.MULTILINE))))
    known = {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "requeue", "open-mode", "signal"}
    assert asked.keys() == known
    assert srun_of_slurm()[1:3] == ["--cpus-per-task", "$SLURM_CPUS_PER_TASK"], "srun doesn't take it from sbatch since Slurm 22.05"
    assert asked["signal"].startswith("B:USR1@"), "to the shell, whose trap this is"
    assert asked["ntasks-per-node"] == "1", "one torchrun a machine"
    assert asked["gpus-per-node"] == options_of(torchrun_of_slurm())["--nproc-per-node"]


def test_any_number_of_machines_of_the_kubernetes_job_can_share_the_batch() -> None:
    options = options_of(torchrun_of_kubernetes())
    config = load_classification_config(REPOSITORY / options["--config"], settings_of_kubernetes())
    least, _, most = options["--nnodes"].partition(":")
    for machines in range(int(least), int(most) + 1):
        processes, data = machines * int(options["--nproc-per-node"]), config.data
        shard_counts = np.array([1000] * 1281)
        StreamSampler(
            shard_counts, batch_size=config.train.batch_size, lanes=data.lanes, block=1000, seed=0, world_size=processes
        )  # raises InputError otherwise
    plain = load_classification_config(REPOSITORY / options["--config"], [])
    factor = config.train.batch_size / plain.train.batch_size
    assert config.train.steps * factor == plain.train.steps, "as many epochs"
    assert tuple(step * factor for step in config.train.milestones) == plain.train.milestones


def test_the_kubernetes_objects_belong_together() -> None:
    objects = kubernetes_objects()
    service, job = objects["Service"], objects["Job"]["spec"]
    pod = job["template"]["spec"]
    name = objects["Job"]["metadata"]["name"]
    assert service["spec"] == {"clusterIP": "None", "selector": {"job-name": name}}
    assert pod["subdomain"] == service["metadata"]["name"]
    options = options_of(torchrun_of_kubernetes())
    assert options["--rdzv-endpoint"].partition(":")[0] == f"{name}-0.{pod['subdomain']}", "the first pod of an indexed job"
    assert job["completionMode"] == "Indexed"
    assert options["--nnodes"] == f"2:{job['parallelism']}"
    assert job["completions"] == job["parallelism"]
    container = container_of_kubernetes()
    assert container["env"] == [{"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"}], "test_cls_elastic.py needs it too"
    assert int(options["--nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    assert options["--output"].startswith(container["volumeMounts"][0]["mountPath"])


# ------------------------------------------------------------------------------------------------------------------------- run as written


def stub(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment with srun, scontrol and torchrun, as a job of one machine sees it."""
    known = '"show hostnames node[1-4]"|"requeue 77"'
    stub(tmp_path / "bin", "scontrol", f'echo "$*" >> {tmp_path}/asked\ncase "$*" in {known}) echo localhost;; *) exit 9;; esac')
    stub(tmp_path / "bin", "scancel", f'[ "$*" = "--signal=TERM 77" ] || exit 9\nkill -TERM $(cat {tmp_path}/step)')
    stub(tmp_path / "bin", "srun", f'[ "$1 $2" = "--cpus-per-task 96" ] || exit 9\nshift 2\necho $$ > {tmp_path}/step\nexec "$@"')
    stub(tmp_path / "bin", "torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    slurm = {"SLURM_JOB_NODELIST": "node[1-4]", "SLURM_NNODES": "1", "SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "96"}
    return os.environ | slurm | {"OMP_NUM_THREADS": "1", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def tiny_config(tmp_path: Path, photos: Path, settings: list[str], *, steps: int = 4) -> Path:
    groups: dict[str, list[str]] = {}
    for setting in [*settings, f"data.root={photos}", f"train.steps={steps}", f"train.save_every={steps // 2}", "train.device=cpu"]:
        group, _, rest = setting.partition(".")
        groups.setdefault(group, []).append(rest.replace("=", ": ", 1))
    path = tmp_path / "tiny.yaml"
    path.write_text("".join(f"{group}: {{{', '.join(lines)}}}\n" for group, lines in groups.items()))
    return path


def replaced(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_script(tmp_path: Path, config: Path) -> None:
    """The SLURM script as job.sh, for two processes here."""
    here = {"--nproc-per-node 8": "--nproc-per-node 2", ":29400": f":{free_port()}", "runs/resnet50_shards": f"{tmp_path}/slurm"}
    (tmp_path / "job.sh").write_text(replaced(block("slurm"), here | {"configs/imagenet/resnet50_shards.yaml": str(config)}))


@pytest.mark.slow
def test_the_end_of_the_time_is_a_checkpoint_and_a_place_in_the_queue(tiny_photos: Path, tiny_settings: list[str], tmp_path: Path) -> None:
    write_script(tmp_path, tiny_config(tmp_path, tiny_photos, tiny_settings, steps=100000))
    log = tmp_path / "slurm/metrics.jsonl"
    with (tmp_path / "said").open("w") as said:
        job = subprocess.Popen(["bash", str(tmp_path / "job.sh")], env=cluster(tmp_path), cwd=REPOSITORY, stdout=said, stderr=said)
        deadline = time.monotonic() + 200
        while not (log.exists() and '"step": 3,' in log.read_text()):
            assert job.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < deadline, "the run never came so far"
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        job.wait(timeout=100)
    assert (tmp_path / "asked").read_text().splitlines() == ["show hostnames node[1-4]", "requeue 77"]
    assert "stopped by a signal at step" in (tmp_path / "slurm/log.txt").read_text()
    assert find_checkpoint(tmp_path / "slurm/checkpoints") is not None


@pytest.mark.slow
def test_the_examples_run(tiny_photos: Path, tiny_settings: list[str], tmp_path: Path) -> None:
    """Two processes each; the SLURM script twice, as a requeued job is, and both examples end with the same weights."""
    config, environment = tiny_config(tmp_path, tiny_photos, tiny_settings), cluster(tmp_path)
    common = {"configs/imagenet/resnet50_shards.yaml": str(config)}
    write_script(tmp_path, config)
    assert "top-1" in run(["bash", str(tmp_path / "job.sh")], environment)
    assert (tmp_path / "asked").read_text() == "show hostnames node[1-4]\n", "and not to be queued again"
    (tmp_path / "slurm/model_final.safetensors").rename(tmp_path / "first.safetensors")
    run(["bash", str(tmp_path / "job.sh")], environment)
    assert "resumed at step 4" in (tmp_path / "slurm/log.txt").read_text(), "a requeued job goes on"
    changes = {"--nnodes=2:4": "--nnodes=1:2", "--nproc-per-node=8": "--nproc-per-node=2", "/output/resnet50": f"{tmp_path}/kubernetes"}
    changes |= common | {"resnet50-0.resnet50:29400": f"localhost:{free_port()}"}
    words = replaced("\n".join(torchrun_of_kubernetes()), changes).split("\n")
    assert "top-1" in run(words, environment)
    weights = [load_file(path) for path in (tmp_path / "first.safetensors", tmp_path / "kubernetes/model_final.safetensors")]
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
