"""SMILES in, weighted conformers out; and the training of one sampler for many molecules."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

import click

from tiltflow.cli.common import Bars, check_device, command_line, common, document, finish, table
from tiltflow.core.errors import TiltflowError

COLUMNS = ["name", "conformers", "rejected", "ess", "reliable", "clusters", "energy_min", "energy_max", "energy_unit"]


@click.command("conformers")
@click.argument("source", metavar="INPUT")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder.")
@click.option("--energy", default="mmff94", show_default=True, help="Name of the energy; see docs/conformers.md.")
@click.option("--temperature", default="300K", show_default=True, help="Of the ensemble, in kelvin.")
@click.option("--sampling-temperature", help="Of training, in kelvin (default: the temperature).")
@click.option("--conjugated", is_flag=True, help="Turn amides, esters and acids too, which hardly turn at room temperature.")
@click.option("--rescore", help="Another energy to weight the samples for, e.g. gfn2.")
@click.option("--model", type=click.Path(path_type=Path), help="Draw from a model of train-conformers; train nothing.")
@click.option("-n", "count", type=click.IntRange(1, 2000), default=100, show_default=True, help="Conformers per molecule.")
@click.option("--cover", is_flag=True, help="Conformers that cover the minima instead, without weights.")
@click.option("--max-atoms", default=200, show_default=True, help="Most atoms of a molecule, with hydrogens.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run; finished molecules are kept.")
@click.option("--overwrite", is_flag=True, help="Replace the run in the folder.")
@common
def conformers_command(
    source: str, out: Path, energy: str, temperature: str, sampling_temperature: str | None, conjugated: bool,
    rescore: str | None, model: Path | None, count: int, cover: bool, max_atoms: int, resume: bool, overwrite: bool,
    seed: int, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Boltzmann-weighted conformers of molecules, from an energy alone; or, with --cover, those that cover its minima.

    INPUT is a SMILES, a .smi file (SMILES [name] per line) or an .sdf file. OUT gets conformers.sdf, conformers.csv,
    rejects.csv (what was refused, and why), metrics.json and report.html.
    """
    try:
        import rdkit  # noqa: F401
    except ModuleNotFoundError as error:
        raise TiltflowError('conformers need RDKit: pip install "tiltflow[conformers,report]".') from error
    from tiltflow.molecules.amortised import load_amortised
    from tiltflow.molecules.energies import parse_temperature
    from tiltflow.molecules.generate import ConformerSettings
    from tiltflow.molecules.read import read_molecules
    from tiltflow.molecules.run import run_conformers
    from tiltflow.run.folder import RunFolder

    if check_device(device) != "cpu":
        raise TiltflowError(f"--device {device}: conformers are computed on the CPU; leave --device out.")
    if cover and (temperature, sampling_temperature, conjugated, rescore, energy) != ("300K", None, False, None, "mmff94"):
        others = "--energy, --temperature, --sampling-temperature, --conjugated and --rescore"
        raise TiltflowError(f"--cover has a recipe of its own: leave out {others}.")
    kelvin = parse_temperature(temperature)
    hotter = None if sampling_temperature is None else parse_temperature(sampling_temperature)
    settings = ConformerSettings(
        energy=energy, temperature=kelvin, sampling_temperature=hotter, conjugated=conjugated,
        n=count, model=None if model is None else str(model), rescore=rescore,
    )  # fmt: skip
    if model is not None and (hotter is not None or conjugated):
        raise TiltflowError("--model brings its own: leave out --sampling-temperature and --conjugated.")
    if model is not None:
        load_amortised(model)  # misuse is found before the folder is touched
    read = read_molecules(source, None, max_atoms)
    alone = Path(source).suffix.lower() not in (".smi", ".sdf")
    if alone and read.rejects:
        raise TiltflowError(f"{source}: {read.rejects[0].reason}.")
    content = source.encode() if alone else Path(source).read_bytes()
    config = {
        "input": source,
        "input_sha256": hashlib.sha256(content).hexdigest(),
        **asdict(settings),
        "cover": cover,
        "max_atoms": max_atoms,
        "seed": seed,
    }
    bars = Bars()
    with RunFolder(out, config, resume, overwrite) as folder:
        rows = run_conformers(read, settings, seed, folder, command_line(), bars, cover)
        result = document(seed, device, rows, "cannot tell" if any(r.get("reliable") is False for r in rows) else None)
        folder.write_json("metrics.json", result)
    bars.close()
    done, refused = ([r for r in rows if r["kind"] == kind] for kind in ("conformers", "refused"))
    if alone and refused:
        raise TiltflowError(f"{source}: {refused[0]['reason']}")
    text = [table(done, COLUMNS)] if done else []
    text += [table(refused, ["line", "name", "input", "reason"])] if refused else []
    finish(result, as_json, "\n\n".join([*text, f"report:  {out / 'report.html'}"]))


@click.command("train-conformers")
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder.")
@click.option("--molecules", type=click.IntRange(1), default=200, show_default=True, help="Drawn at random from INPUT.")
@click.option("--energy", default="mmff94", show_default=True, help="Name of the energy; see docs/energies.md.")
@click.option("--temperature", default="700K", show_default=True, help="Of training, in kelvin.")
@click.option("--max-atoms", default=60, show_default=True, help="Most atoms of a molecule, with hydrogens.")
@click.option("--rounds", type=click.IntRange(1), default=400, show_default=True, help="Rounds.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run, exactly.")
@click.option("--overwrite", is_flag=True, help="Replace the run in the folder.")
@common
def train_conformers_command(
    source: Path, out: Path, molecules: int, energy: str, temperature: str, max_atoms: int, rounds: int,
    resume: bool, overwrite: bool, seed: int, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Train one torsional sampler for many molecules; leave OUT/model.safetensors for `tiltflow conformers --model`.

    INPUT is a .smi file, or a gzipped tab-separated table with a column SMILES.
    """
    try:
        import rdkit  # noqa: F401
    except ModuleNotFoundError as error:
        raise TiltflowError('conformers need RDKit: pip install "tiltflow[conformers,report]".') from error
    from tiltflow.molecules.energies import parse_temperature
    from tiltflow.molecules.train import ConformerTraining, run_training
    from tiltflow.run.folder import RunFolder

    if check_device(device) != "cpu":
        raise TiltflowError(f"--device {device}: conformers are computed on the CPU; leave --device out.")
    config = ConformerTraining(str(source), molecules, energy, parse_temperature(temperature), max_atoms, rounds, seed)
    chosen = config.choose()  # misuse is found before the folder is touched
    bars = Bars()
    with RunFolder(out, asdict(config), resume, overwrite) as folder:
        row = run_training(config, chosen, folder, bars)
        result = document(seed, device, [row], None)
        folder.write_json("metrics.json", result)
    bars.close()
    finish(result, as_json, table([row], ["molecules", "templates", "ess", "energy", "energy_calls", "seconds"]))
