"""What of our environment the nodes get: exactly what a run needs there, and nothing on a command line."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import moetrain
from moetrain.errors import LaunchError

HANDED_OVER = (
    "NCCL_*", "UCX_*", "GLOO_*", "CUDA_*", "TORCH_*", "OMP_*", "MKL_NUM_THREADS", "PYTORCH_*", "DS_ACCELERATOR",
    "LD_LIBRARY_PATH", "LD_PRELOAD", "TRITON_CACHE_DIR", "HF_HOME", "HF_HUB_OFFLINE", "WANDB_MODE", "WANDB_DIR",
    "TMPDIR",
)  # fmt: skip
"""Variables of the ranks; none of them holds a secret. More by ``launch.export``."""

_OF_LAUNCHERS = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TERM", "TMPDIR", "LD_LIBRARY_PATH", "SSH_*",
    "PDSH_*", "OMPI_*", "PRTE_*", "HYDRA_*", "I_MPI_*", "SLURM_*", "KRB5CCNAME",
)  # fmt: skip
"""What the deepspeed launcher, ssh and mpirun need themselves."""

_SAFE = re.compile(r"[\w@%+=:,./-]+", re.ASCII)


def handed_over(environment: Mapping[str, str], *, export: Sequence[str]) -> dict[str, str]:
    """The variables that the ranks on other nodes get.

    Args:
        export: further names and patterns.
    """
    return _chosen(environment, (*HANDED_OVER, *export)) | {"PYTHONPATH": python_path(environment)}


def of_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the deepspeed launcher.

    It writes every variable that begins with MLFLOW, PYTHON, MV2, UCX or NCCL into the command line of a shell on each
    node, where everybody there can read it, so it gets none but the path of the package. DS_ENV_FILE keeps it from
    ~/.deepspeed_env, which goes the same way; ``launch.export`` takes its place.

    Raises:
        LaunchError: the path of the package would not survive a shell.
    """
    path = python_path(environment)
    if not _SAFE.fullmatch(path):
        raise LaunchError(
            f"PYTHONPATH is '{path}', which the deepspeed launcher would hand to a shell as it is: use directories "
            "whose names have no spaces or signs of a shell"
        )
    return _chosen(environment, _OF_LAUNCHERS) | {
        "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "DS_ENV_FILE": "none", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip


def python_path(environment: Mapping[str, str]) -> str:
    """The user's PYTHONPATH, after the directory that moetrain was imported from: the nodes run the same code."""
    ours = str(Path(moetrain.__file__).resolve().parent.parent)
    given = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    return os.pathsep.join(dict.fromkeys([ours, *map(os.path.abspath, given)]))


def _chosen(environment: Mapping[str, str], patterns: Sequence[str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
