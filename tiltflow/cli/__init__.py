"""The command line: ``tiltflow COMMAND``. Exit codes: 0 success, 2 misuse, 3 the verdict is FAIL.

Every command that measures prints one JSON document with ``--json`` (on standard output; everything else goes to standard
error): {"command", "version", "seed", "device", "rows", "verdict"}.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from tiltflow._version import __version__
from tiltflow.cli.bench import bench
from tiltflow.cli.common import EXIT_MISUSE
from tiltflow.cli.compare import compare_command
from tiltflow.cli.conformers import conformers_command, train_conformers_command
from tiltflow.cli.finetune import check_reward_command, demo, finetune_command, pretrain_command
from tiltflow.cli.pipeline import export_command, finetune_pipeline_command
from tiltflow.cli.sampling import check_energy_command, sample_command, train_sampler_command
from tiltflow.core.errors import TiltflowError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Tilt a flow or diffusion model towards a reward, sample from an energy or a molecule, and know whether it is right."""


for command in (
    finetune_command,
    check_reward_command,
    finetune_pipeline_command,
    export_command,
    compare_command,
    train_sampler_command,
    check_energy_command,
    sample_command,
    conformers_command,
    train_conformers_command,
    pretrain_command,
    demo,
    bench,
):
    cli.add_command(command)


def main() -> NoReturn:
    """Entry point: turns errors into exit codes."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except TiltflowError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(EXIT_MISUSE)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; the last checkpoint is in the run folder (--resume continues it)", err=True)
        sys.exit(130)
    sys.exit(0)
