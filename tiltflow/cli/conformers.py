"""SMILES in, weighted conformers out; and the training of one sampler for many molecules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiltflow.cli.common import finish, finish_run, run_job, table
from tiltflow.cli.options import given, options, run_options
from tiltflow.molecules.settings import (
    AMORTISED,
    AmortisedSettings,
    AnnealedSettings,
    ConformersConfig,
    ConformerSettings,
    ConformerTrainingConfig,
    TorsionalSettings,
    require_rdkit,
)

if TYPE_CHECKING:
    from tiltflow.molecules.job import ConformerTrainingJob

COLUMNS = [
    "name", "conformers", "rejected", "ess", "reliable", "unsampled", "clusters", "energy_min", "energy_max", "energy_unit",
]  # fmt: skip
NESTED = ("input", "settings", "sampler", "annealed")
"""Fields that are no options: the argument, and settings with options of their own."""


@click.command("conformers")
@click.argument("source", metavar="INPUT")
@options(ConformersConfig, ConformerSettings, AnnealedSettings, TorsionalSettings, leave=NESTED)
@run_options
def conformers_command(
    source: str, out: Path, resume: bool, overwrite: bool, log: str | None, as_json: bool, **values: Any
) -> None:
    """Boltzmann-weighted conformers of molecules, from an energy alone; or, with --cover, those that cover its minima.

    INPUT is a SMILES, or a file: .smi (SMILES [name] per line), .sdf, .mol, or a .csv or .tsv with a column SMILES; each
    also as .gz. OUT gets conformers.sdf, conformers.csv, rejects.csv (what was refused, and why), metrics.json and
    report.html.
    """
    sampler = TorsionalSettings(**given(values, TorsionalSettings))
    annealed = AnnealedSettings(**given(values, AnnealedSettings))
    each = ConformerSettings(**given(values, ConformerSettings), sampler=sampler, annealed=annealed)
    fields = {"input": source, **given(values, ConformersConfig), "settings": each}
    ConformersConfig(**fields)
    require_rdkit()
    from tiltflow.molecules.job import ConformersJob

    result = run_job(ConformersJob(**fields), out, resume, overwrite, log)
    done, refused = ([r for r in result["rows"] if r["kind"] == kind] for kind in ("conformers", "refused"))
    told = "" if not refused or as_json else table(refused, ["line", "name", "input", "reason"]) + "\n"
    if told:
        click.echo(told)
    for row in done:
        if row["notes"]:
            click.echo(f"{row['name']}: {row['notes']}", err=True)
    finish_run(result, out, done, COLUMNS, as_json)


def conformer_training_job(source: str, **values: Any) -> ConformerTrainingJob:
    """The job of the command's options."""
    sampler = replace(AMORTISED, **given(values, TorsionalSettings))
    training = AmortisedSettings(**given(values, AmortisedSettings), sampler=sampler)
    fields = {"input": source, **given(values, ConformerTrainingConfig), "settings": training}
    ConformerTrainingConfig(**fields)
    require_rdkit()
    from tiltflow.molecules.job import ConformerTrainingJob

    return ConformerTrainingJob(**fields)


@click.command("train-conformers")
@click.argument("source", metavar="INPUT")
@options(ConformerTrainingConfig, AmortisedSettings, AMORTISED, leave=NESTED)
@run_options
def train_conformers_command(
    source: str, out: Path, resume: bool, overwrite: bool, log: str | None, as_json: bool, **values: Any
) -> None:
    """Train one torsional sampler for many molecules; leave OUT/model.safetensors for `tiltflow conformers --model`.

    INPUT is a .smi or .sdf file, or a .csv or .tsv with a column SMILES; each also as .gz.
    """
    result = run_job(conformer_training_job(source, **values), out, resume, overwrite, log)
    summary = table(result["rows"][:1], ["molecules", "templates", "ess", "energy", "energy_calls", "seconds"])
    finish(result, as_json, f"{summary}\n\nmodel:   {out / result['rows'][0]['model']}\nreport:  {out / 'report.html'}")
