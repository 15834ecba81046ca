"""timm's own generic model tests on our networks: python tests/frameworks/run_timm_tests.py PATH/tests/test_models.py [NAME…] [-- PYTEST…]

The file comes from a source archive of timm and stays outside this repository. It takes its model names from timm's registry when it is
collected; here they are ours, `rb_*`, or those that match the NAMEs. Left out: its tests of particular networks of timm, and those of
TorchScript, which torch has retired and which cannot compile stages that are run by name.
"""

from __future__ import annotations

import fnmatch
import sys
from pathlib import Path
from typing import Any

import pytest
import timm

from resbackbone.integrations import timm as resbackbone_timm

DEFAULT = ("rb_resnet18*", "rb_resnet50*", "rb_resnet101", "rb_plain18", "rb_resnet20_cifar*")


def offer_only_ours(patterns: tuple[str, ...]) -> list[str]:
    """Make timm list our names alone, whatever bucket is asked for; filters and exclusions still hold."""
    ours = [name for name in resbackbone_timm.register() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    listed = timm.list_models

    def list_ours(filter: Any = "", **options: Any) -> list[str]:
        options.pop("module", None)  # buckets are the names of timm's own files
        return [name for name in listed(filter, **options) if name in ours and not options.get("pretrained")]

    timm.list_models = list_ours
    timm.list_pretrained = lambda *args, **options: []
    return ours


def main(arguments: list[str]) -> int:
    """Run them; returns pytest's exit code."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    file, *patterns = arguments[:end]
    names = offer_only_ours(tuple(patterns) or DEFAULT)
    print(f"timm {timm.__version__}, tests of {file}, {len(names)} networks: {', '.join(names)}")
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "-o", "addopts=", f"--rootdir={Path(file).parent}"]
    return int(pytest.main([file, *options, "-k", "rb_ and not torchscript", *arguments[end + 1 :]]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
