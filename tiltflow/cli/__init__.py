"""The command line: ``tiltflow COMMAND``. Exit codes: 0 success, 2 misuse, 3 the verdict is FAIL, 1 a defect of ours, or a
process that trained with this one and is lost; 130 and 143 interrupted, by SIGINT and SIGTERM.

Every command that measures prints one JSON document with ``--json`` (on standard output; everything else goes to standard
error): {"command", "version", "seed", "device", "rows", "verdict"}. Nothing here imports torch before a command works.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NoReturn

import click

from tiltflow._version import __version__
from tiltflow.cli.boundary import DEBUG, guarded

COMMANDS = {
    "finetune": "finetune:finetune_command",
    "check-reward": "finetune:check_reward_command",
    "check-base": "check:check_base_command",
    "finetune-pipeline": "pipeline:finetune_pipeline_command",
    "export": "pipeline:export_command",
    "compare": "compare:compare_command",
    "train-sampler": "sampling:train_sampler_command",
    "sample-energy": "sampling:sample_energy_command",
    "check-energy": "sampling:check_energy_command",
    "sample": "sampling:sample_command",
    "conformers": "conformers:conformers_command",
    "train-conformers": "conformers:train_conformers_command",
    "plan": "plan:plan_group",
    "list": "list:list_command",
    "pretrain": "finetune:pretrain_command",
    "demo": "finetune:demo",
    "bench": "bench:bench",
}
"""Command → where it is under :mod:`tiltflow.cli`; only the one that is called is imported."""


class Commands(click.Group):
    """The group of all commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table."""
        return [*COMMANDS]  # the command list is a module here, and hides the type

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command, imported."""
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name].partition(":")
        return getattr(import_module(f"tiltflow.cli.{module}"), attribute)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
@click.option(DEBUG, is_flag=True, help="Show the traceback of an error; may stand anywhere.")
def cli(debug: bool) -> None:
    """Tilt a flow or diffusion model towards a reward, sample from an energy or a molecule, and know whether it is right."""


def main() -> NoReturn:
    """Entry point: turns errors into exit codes."""
    arguments = [word for word in sys.argv[1:] if word != DEBUG]
    sys.exit(guarded(lambda: cli.main(arguments, standalone_mode=False), DEBUG in sys.argv))
