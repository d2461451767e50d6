"""Settings of conformers, and of training samplers for them. Neither torch nor RDKit is needed to check them."""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import replace
from typing import Annotated, Literal, Self

from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import Count, Positive, Range, Steps, Whole, settings
from tiltflow.train.settings import Decay, Training

ENERGIES: dict[str, str] = {
    "mmff94": "MMFF94 force field, RDKit, kcal/mol",
    "ani1ccx": "ANI-1ccx, eight networks, TorchANI, hartree",
    "aimnet2": "AIMNet2 at ωB97M-D3, four networks, Auto3D, eV",
    "gfn2": "GFN2-xTB tight binding, tblite, hartree",
}
"""Energies of molecules by name → what, whose package, unit; any other is a module:function."""
MOST = 2_000
"""Conformers of a molecule in a run: clusters cost n² comparisons."""
Kelvin = Positive | str
Batch = Annotated[int, Range(2, 2**53)]
MoleculeSeed = Annotated[int, Range(0, 10**9)]
"""RDKit's seeds have 31 bits, and molecule i has seed + i."""


def require_rdkit() -> None:
    """Raises TiltflowError naming the extra if RDKit is not installed."""
    if importlib.util.find_spec("rdkit") is None:
        raise TiltflowError('conformers need RDKit: pip install "tiltflow[conformers,report]".')


def parse_temperature(text: str) -> float:
    """A temperature in K.

    >>> parse_temperature("300"), parse_temperature("298.15 K")
    (300.0, 298.15)

    Raises:
        TiltflowError: it is no number of Kelvin, or not positive and finite.
    """
    number = re.fullmatch(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*[kK]?\s*", text)
    if number is None:
        raise TiltflowError(f"temperature {text!r}: write Kelvin, e.g. 300K (27 °C is 300.15K).")
    kelvin = float(number[1])
    if not 0 < kelvin < math.inf:
        raise TiltflowError(f"temperature {text!r}: it must be above 0 K and finite, e.g. 300K.")
    return kelvin


def _store_kelvin(where: object, *names: str) -> None:
    """Temperatures are kept as numbers, in K, however they were written."""
    for name in names:
        value = getattr(where, name)
        if value is not None:
            object.__setattr__(where, name, parse_temperature(value) if isinstance(value, str) else float(value))


def _require_energy(name: str) -> None:
    if name not in ENERGIES and ":" not in name:
        raise TiltflowError(f"unknown energy {name!r}: use one of {', '.join(ENERGIES)}, or module:function.")


@settings
class MoleculeTraining(Training):
    """What the samplers of torsions and of Cartesian coordinates share.

    Args:
        steps: Simulation steps in training.
        draw_steps: Simulation steps of finished samples.
        sigma_max: Largest noise of the geometric schedule.
        sigma_min: Smallest noise.
        hidden: Width of the network.
        layers: Depth of the network.
    """

    learning_rate: Positive = 3e-3
    ema: Decay = 0.9
    steps: Steps
    draw_steps: Steps
    sigma_max: Positive
    sigma_min: Positive
    hidden: Count
    layers: Count = 3

    def validate(self) -> None:
        """σ_min < σ_max."""
        if not self.sigma_min < self.sigma_max:
            raise TiltflowError(f"sigma_min must be below sigma_max, got {self.sigma_min:g} and {self.sigma_max:g}.")


@settings
class TorsionalSettings(MoleculeTraining):
    """How to train a torsional sampler; angles in radians.

    Args:
        rounds: Rounds of simulation, each followed by gradient steps; none: 20 + 10 per torsion.
        batch: End points per template and round.
        max_cost_gradient: Bound on ‖∇E/kT‖; none: no bound.
        minimum_ess: Path weights are tempered to this share of effective samples.
    """

    rounds: Count | None = None  # type: ignore[assignment]
    gradient_steps: Count = 60
    minibatch: Count | None = 256
    buffer_rounds: Count = 10
    checkpoint_every: Count = 10
    batch: Batch = 256
    steps: Steps = 25
    draw_steps: Steps = 100
    sigma_max: Positive = 3.0
    sigma_min: Positive = 0.1
    hidden: Count = 64
    max_cost_gradient: Positive | None = 50.0
    minimum_ess: Annotated[float, Range(0, 1 - 1e-9, above=True)] = 0.1

    def rounds_of(self, torsions: int) -> int:
        """Rounds for so many torsions."""
        return 20 + 10 * torsions if self.rounds is None else self.rounds

    def of(self, torsions: int) -> Self:
        """The same with the rounds of so many torsions, if they were left open."""
        return replace(self, rounds=self.rounds_of(torsions))


@settings
class CartesianSettings(MoleculeTraining):
    """How to train a Cartesian sampler; lengths in Å.

    The adjoint target moves far and overshoots, the more the larger the gradients; that of least variance moves by about
    ∇E/E‖∇E‖² and keeps what is nearly right. Hence first the one, its bound growing, then the other.

    Args:
        pretrain: Conformers of RDKit for bridge matching; 0: none.
        pretrain_rounds: Rounds of bridge matching.
        rounds: Rounds with the adjoint target.
        max_cost_gradient: Bounds on ‖∇(E/kT + U)‖ of an atom, per Å, at their beginning and end.
        fine_rounds: Rounds with the target of least variance.
        fine_rate: Their share of the learning rate.
        batch: End points per round.
    """

    pretrain: Whole = 0
    pretrain_rounds: Count = 20
    rounds: Whole = 36
    max_cost_gradient: tuple[Positive, Positive] = (30.0, 100.0)
    fine_rounds: Whole = 0
    fine_rate: Positive = 0.5
    batch: Batch = 64
    gradient_steps: Count = 40
    minibatch: Count | None = 32
    buffer_rounds: Count = 6
    steps: Steps = 20
    draw_steps: Steps = 50
    sigma_max: Positive = 1.0
    sigma_min: Positive = 0.03
    hidden: Count = 32


@settings
class AnnealedSettings:
    """How to sample all coordinates.

    Args:
        walkers: At least so many, in groups that are independent.
        groups: Their number; the spread of what they say is the error.
        hot: Temperature at which walkers begin, in kelvin; none: 1,500 K, and 2,500 K if there are rings that pucker.
        hot_moves: Moves at the hot temperature; none: 20, and 60 if there are such rings.
        kept: Share of effective walkers at each lower temperature.
        moves: Moves at each lower temperature.
        last_moves: Moves at the last.
        leaps: Steps of a Hamiltonian trajectory; each move has one.
        turns: Turns about bonds in each move.
    """

    walkers: Count = 256
    groups: Annotated[int, Range(2, 2**53)] = 8
    hot: Positive | None = None
    hot_moves: Count | None = None
    kept: Annotated[float, Range(0, 1 - 1e-9, above=True)] = 0.7
    moves: Count = 3
    last_moves: Count = 8
    leaps: Count = 12
    turns: Whole = 3

    def of(self, rings: bool) -> tuple[float, int]:
        """The hot temperature and the moves at it, of a molecule with rings that pucker, or without."""
        kelvin, moves = (2_500.0, 60) if rings else (1_500.0, 20)
        return kelvin if self.hot is None else self.hot, moves if self.hot_moves is None else self.hot_moves


@settings
class ConformerSettings:
    """How to make an ensemble.

    Args:
        energy: Energy by name (tiltflow list energies), or module:function.
        temperature: Of the ensemble, in kelvin, e.g. 300K.
        coordinates: all, sampled by annealing walkers; or torsions, at fixed bond lengths, angles and rings, by a trained
            sampler. None: all of mmff94, unless a setting of the torsions is given; torsions of energies that cost more.
        sampling_temperature: Of training, in kelvin; none: that of the ensemble. A hotter one finds more conformers.
        conjugated: Turn amides, esters and acids too, which hardly turn at room temperature.
        n: Conformers per molecule.
        templates: Most kinds of rigid geometry (rings, amides, nitrogens) to sample; if more are within 6 kT of the lowest,
            the weights cannot be told.
        rescore: Another energy to weight the samples for, e.g. gfn2; its energies are reported.
        model: Draw from this model of train-conformers; train nothing.
        sampler: Of the torsions; with a model only its draw_steps count.
        annealed: Of all coordinates.
    """

    energy: str = "mmff94"
    temperature: Kelvin = 300.0
    coordinates: Literal["all", "torsions"] | None = None
    sampling_temperature: Kelvin | None = None
    conjugated: bool = False
    n: Count = 100
    templates: Count = 12
    rescore: str | None = None
    model: str | None = None
    sampler: TorsionalSettings = TorsionalSettings()
    annealed: AnnealedSettings = AnnealedSettings()

    def validate(self) -> None:
        """Known energies, temperatures in K, and nothing that a model brings."""
        _store_kelvin(self, "temperature", "sampling_temperature")
        _require_energy(self.energy)
        if self.rescore is not None:
            _require_energy(self.rescore)
        if self.model is not None and (self.sampling_temperature is not None or self.conjugated):
            raise TiltflowError("a model brings its own: leave out sampling_temperature and conjugated.")
        if self.coordinates == "all" and self._of_torsions():
            raise TiltflowError(f"all coordinates are not sampled by torsions: leave out {', '.join(self._of_torsions())}.")
        if not self.all_coordinates and self.annealed != AnnealedSettings():
            raise TiltflowError("walkers are annealed in all coordinates only: set coordinates to all, or leave them out.")

    def _of_torsions(self) -> list[str]:
        """Settings that were given and that only torsions have."""
        names = ("sampling_temperature", "conjugated", "templates", "model", "sampler")
        return [name for name in names if getattr(self, name) != self.__dataclass_fields__[name].default]

    @property
    def all_coordinates(self) -> bool:
        """Not only the torsions are sampled."""
        if self.coordinates is None:
            return self.energy == "mmff94" and self.rescore is None and not self._of_torsions()
        return self.coordinates == "all"

    @property
    def kelvin(self) -> float:
        """The temperature of the ensemble, in K."""
        return float(self.temperature)

    @property
    def training_kelvin(self) -> float:
        """The temperature of training, in K."""
        return self.kelvin if self.sampling_temperature is None else float(self.sampling_temperature)

    def require_cover(self) -> None:
        """Raises TiltflowError for a setting that conformers which are chosen to cover do not have."""
        usual = ConformerSettings(n=self.n, model=self.model)
        odd = [name for name in self.__dataclass_fields__ if getattr(self, name) != getattr(usual, name)]
        if odd:
            raise TiltflowError(f"cover has a recipe of its own: leave out {', '.join(odd)}.")


AMORTISED = TorsionalSettings(
    rounds=400, batch=64, gradient_steps=20, buffer_rounds=30, steps=12, learning_rate=2e-3, minimum_ess=0.2, ema=0.95
)
"""Of the torsions of many molecules at once."""


@settings
class AmortisedSettings:
    """How to train one sampler for many molecules.

    Args:
        energy: Energy by name (tiltflow list energies), or module:function.
        temperature: Of training, in kelvin.
        conjugated: Turn amides, esters and acids too.
        templates: Most kinds of rigid geometry per molecule.
        visited: Pairs of a molecule and a template per round.
        sampler: Of the torsions; its batch is per pair.
    """

    energy: str = "mmff94"
    temperature: Kelvin = 700.0
    conjugated: bool = True
    templates: Count = 2
    visited: Count = 8
    sampler: TorsionalSettings = AMORTISED

    def validate(self) -> None:
        """A known energy, a temperature in K, and a number of rounds."""
        _store_kelvin(self, "temperature")
        _require_energy(self.energy)
        if self.sampler.rounds is None:
            raise TiltflowError("a sampler for many molecules needs a number of rounds: TorsionalSettings(rounds=…).")

    @property
    def kelvin(self) -> float:
        """The temperature of training, in K."""
        return float(self.temperature)


@settings
class ConformersConfig:
    """Everything a run of conformers depends on; the run folder's config.json.

    Args:
        input: A SMILES, or a file of molecules: .smi, .sdf, .mol, .csv, .tsv, each also as .gz.
        cover: Conformers that cover the minima instead, without weights.
        max_atoms: Most atoms of a molecule, with hydrogens.
        enumerate_stereo: Where stereo is undefined, make every isomer, of at most so many; 0: refuse.
        seed: Seed of every random number; molecule i has seed + i.
        device: Device of the networks: cpu, cuda, cuda:1, mps, or auto for the fastest there is; energies of other packages
            stay on the CPU.
        ray: Address of a Ray cluster that the molecules are shared by, or local; none: the processors of this machine.
        time_limit: Seconds that a molecule may take; one that takes longer is a line of rejects.csv. Of a lone SMILES, and
            on Ray, only embedding and training are stopped.
        settings: Of each ensemble.
    """

    input: str | None
    cover: bool = False
    max_atoms: Count = 200
    enumerate_stereo: Whole = 0
    seed: MoleculeSeed = 0
    device: str = "cpu"
    ray: str | None = None
    time_limit: Positive = 3600.0
    settings: ConformerSettings = ConformerSettings()

    def validate(self) -> None:
        """Not more conformers than can be clustered; with ``cover``, no settings that it does not have."""
        if not self.settings.n <= MOST:
            raise TiltflowError(f"n must be at most {MOST} in a run: clusters cost n² comparisons; got {self.settings.n}.")
        if self.cover:
            self.settings.require_cover()


@settings
class ConformerTrainingConfig:
    """Everything a training for many molecules depends on; the run folder's config.json.

    Args:
        input: A file of molecules: .smi, .sdf, .csv, .tsv, each also as .gz.
        molecules: How many of them are drawn at random.
        max_atoms: Most atoms of a molecule, with hydrogens.
        seed: Seed of every random number.
        device: Device of the networks: cpu, cuda, cuda:1, mps, or auto for the fastest there is; energies of other packages
            stay on the CPU.
        settings: Of the training.
    """

    input: str
    molecules: Count = 200
    max_atoms: Count = 60
    seed: MoleculeSeed = 0
    device: str = "cpu"
    settings: AmortisedSettings = AmortisedSettings()
