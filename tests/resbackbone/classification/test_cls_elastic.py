"""A machine is lost and another takes its place: two torchruns on this one, one of which is killed with all it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from test_cls_distributed import ELASTIC, finish, free_port, losses, torchrun, weights

# As the Kubernetes example has it: with one store for all rounds, torch 2.11 never tells a new machine where it is.
VARIABLES = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def agent(repository: Path, port: str, output: Path, settings: list[str], *, hosts: bool) -> subprocess.Popen[str]:
    """torchrun as on one of two machines; hosts: whether the others meet there."""
    meeting = ["--rdzv-id=x", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", f"--rdzv-conf=is_host={int(hosts)}"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", *meeting]
    config = output.parent / f"{output.name}.yaml"
    config.write_text("data: {}\n")
    tool = [str(repository / "tools/train_cls.py"), "--config", str(config), "--output", str(output), "--resume", "auto", *settings]
    command, environment = [*launch, *tool], os.environ | VARIABLES
    return subprocess.Popen(command, env=environment, cwd=output.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lose_machine(launcher: subprocess.Popen[str], output: Path, *, at_step: int) -> None:
    """SIGKILL for a torchrun and its workers once the log has reached `at_step`."""
    log, deadline = output / "metrics.jsonl", time.monotonic() + 300
    while not (log.exists() and f'"step": {at_step},' in log.read_text()):
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline, "the run never came so far"
        time.sleep(0.01)
    for one in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
        one.send_signal(signal.SIGKILL)
    launcher.communicate()


@pytest.mark.slow
def test_a_machine_is_replaced(repository: Path, tiny_photos: Path, tiny_settings: list[str], tmp_path: Path) -> None:
    finish(torchrun(repository, tiny_photos, tmp_path / "undisturbed", [*tiny_settings, *ELASTIC]))
    output, port = tmp_path / "run", free_port()
    settings = [*tiny_settings, *ELASTIC, f"data.root={tiny_photos}"]
    stays, goes = (agent(repository, port, output, settings, hosts=hosts) for hosts in (True, False))
    agents = [stays, goes]
    try:
        lose_machine(goes, output, at_step=8)
        # This one has never restarted, the one that stays has: their counts differ from here on.
        agents = [stays, agent(repository, port, output, settings, hosts=False)]
        for one in agents:
            finish(one)
    finally:
        for one in agents:
            for process in [*psutil.Process(one.pid).children(recursive=True), one] if one.poll() is None else []:
                process.kill()
    ours, theirs = weights(output), weights(tmp_path / "undisturbed")
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert losses(output) == losses(tmp_path / "undisturbed")
    assert "resumed at step 6" in (output / "log.txt").read_text()
