"""The launch configurations in recipes/accelerate are what accelerate reads, key by key."""

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

FOLDER = Path(__file__).parent.parent / "recipes" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.mixed_precision == "bf16"
    settings = yaml.safe_load(path.read_text())
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    # Of the nested keys it passes over those it doesn't know without a word.
    nested = {key for name in ("fsdp_config", "deepspeed_config") for key in settings.get(name, {})}
    assert nested <= known, nested - known


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_in_its_comment_is_accepted(path):
    (command,) = re.findall(r"^#   accelerate launch (.*)$", path.read_text(), re.MULTILINE)
    words = command.replace("recipes/accelerate", str(FOLDER)).split()
    assert path in map(Path, words)
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.num_processes == 4
    assert str(defaults.distributed_type).split(".")[-1] == yaml.safe_load(path.read_text())["distributed_type"]


def test_fsdp_shards_with_version_2(monkeypatch):
    words = ["--config_file", str(FOLDER / "fsdp2.yaml"), "train.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    for name, value in prepare_multi_gpu_env(args).items():
        if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.activation_checkpointing
    assert type(plugin.cpu_offload).__name__ == "OffloadPolicy"  # and not CPUOffloadPolicy
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)


def test_deepspeed_stages():
    stages = [
        load_config_from_file(str(FOLDER / f"deepspeed_zero{n}.yaml")).deepspeed_config["zero_stage"] for n in (2, 3)
    ]
    assert stages == [2, 3]
