"""Molecular energies: numbers against each package's own, forces against differences, units, failures, missing packages.

Energies whose package is not installed here are skipped with what to type; `make test-energies` runs them all.
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("rdkit")
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from tiltflow.core.errors import TiltflowError
from tiltflow.energies import Evaluator, ForceProvider
from tiltflow.molecules.energies import (
    MolecularEnergy,
    Reduced,
    UnsupportedMolecule,
    kt_per,
    open_energy,
    parse_temperature,
)
from tiltflow.molecules.energies.interface import BOHR
from tiltflow.molecules.molecule import molecule

EMT = f"{__file__}:emt"
ADAPTERS = [pytest.param(name, id=name.rpartition(":")[2]) for name in ("mmff94", "ani1ccx", "aimnet2", "gfn2", EMT)]
ETHANOL = molecule("CCO", "ethanol")


def emt(molecule):
    return pytest.importorskip("ase.calculators.emt").EMT()


class Harmonic:
    """An energy of one's own, E = |x|²/2 in eV."""

    name, unit, elements = "harmonic", "eV", None

    def __init__(self, molecule):
        self.molecule = molecule

    def energy_and_forces(self, x):
        return x.square().sum((1, 2)) / 2, -x


def conformers(molecule, n, optimise=False):
    """(n, N, 3), and if optimised RDKit's own MMFF94 energies."""
    mol = type(molecule.mol)(molecule.mol)
    rdDistGeom.EmbedMultipleConfs(mol, n, randomSeed=7)
    found = rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(mol, maxIters=2000) if optimise else []
    x = torch.from_numpy(np.stack([c.GetPositions() for c in mol.GetConformers()]))
    return x, torch.tensor([e for _, e in found])


def opened(name, molecule=ETHANOL):
    """The energy; the test is skipped if its package is not here."""
    try:
        return open_energy(name, molecule)
    except TiltflowError as error:
        if "install it with" in str(error):
            pytest.skip(str(error))
        raise


def close(a, b, rtol):
    return torch.allclose(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


# Every adapter


@pytest.mark.parametrize("name", ADAPTERS)
def test_forces_are_minus_the_gradient(name, generator):
    energy = opened(name)
    assert isinstance(energy, MolecularEnergy) and energy.name == name
    x, _ = conformers(ETHANOL, 3)
    value, forces = energy.energy_and_forces(x)
    assert value.shape == (3,) and forces.shape == x.shape and value.dtype == forces.dtype == torch.float64
    assert not value.requires_grad and not forces.requires_grad
    d = torch.randn(x.shape, generator=generator)
    single = (3e-3, 2e-2)  # float32: a wide difference, a wide tolerance
    h, rtol = {"ani1ccx": single, "aimnet2": single, "gfn2": (1e-3, 1e-3)}.get(name, (1e-4, 1e-5))
    difference = (energy.energy_and_forces(x + h * d)[0] - energy.energy_and_forces(x - h * d)[0]) / (2 * h)
    work = -(forces * d).sum((1, 2))
    assert close(work, difference, rtol)
    for wrong in (-work, work * BOHR, work / BOHR):
        assert not close(wrong, difference, rtol)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:ase")
@pytest.mark.parametrize("name", ADAPTERS)
def test_clashes_and_non_finite_rows_are_finite_or_rejected_and_counted(name, generator):
    energy = opened(name)
    good, _ = conformers(ETHANOL, 2)
    x = good[[0, 0, 0, 0, 0, 1]].clone()
    x[1, 0] = x[1, 3]
    x[2] = torch.randn(x[2].shape, generator=generator)
    x[3, 0, 0] = torch.nan
    x[4, 0, 0] = torch.inf
    evaluator = Evaluator(Reduced(energy, 300.0))
    value, grad = evaluator.value_and_grad(x)
    rejected = value.isposinf()
    assert rejected[3:5].all() and not rejected[[0, 5]].any() and not value.isnan().any()
    assert evaluator.rejected == int(rejected.sum()) and grad.isfinite().all() and (grad[rejected] == 0).all()
    alone = Evaluator(Reduced(energy, 300.0)).value_and_grad(good)  # a bad row leaves the others alone
    torch.testing.assert_close((value[[0, 5]], grad[[0, 5]]), alone, rtol=1e-5, atol=1e-2)
    if name in ("mmff94", "gfn2", "aimnet2"):
        assert (value[1:3] > value[0] + 10).all()
    with pytest.raises(TiltflowError, match=rf"{re.escape(name)}: x has shape \(6, 4, 3\).* takes \(B, 9, 3\), in Å"):
        energy.energy_and_forces(x[:, :4])


@pytest.mark.parametrize("name", ADAPTERS)
def test_turning_and_shifting_changes_nothing_and_input_is_left_alone(name, generator):
    energy = opened(name)
    x, _ = conformers(ETHANOL, 2)
    x, before = x.float(), x.float().clone()
    value, forces = energy.energy_and_forces(x)
    assert torch.equal(x, before) and not x.requires_grad
    q = torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
    turned, pushed = energy.energy_and_forces(x.double() @ q + 5.0)
    torch.testing.assert_close(turned, value.double(), rtol=0, atol=2e-3 * abs(1 / kt_per(energy.unit, 300.0)))
    torch.testing.assert_close(pushed, forces.double() @ q, rtol=1e-3, atol=1e-3 * float(forces.abs().max()))


# Numbers against the package's own


def test_mmff_is_rdkit_s_optimised_energy():
    mol = molecule("CC(=O)Nc1ccc(cc1)C(C)C(=O)[O-]", "anion")
    x, exact = conformers(mol, 3, optimise=True)
    value, forces = opened("mmff94", mol).energy_and_forces(x)
    torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-9)
    assert float(forces.abs().max()) < 0.05  # kcal/mol/Å: RDKit stopped here
    placed = type(mol.mol)(mol.mol)
    rdDistGeom.EmbedMolecule(placed)
    placed.GetConformer().SetPositions(x[0].numpy())
    for variant, cutoff, same in (("MMFF94", 100.0, True), ("MMFF94", 4.0, False), ("MMFF94s", 100.0, False)):
        parameters = rdForceFieldHelpers.MMFFGetMoleculeProperties(placed, variant)
        field = rdForceFieldHelpers.MMFFGetMoleculeForceField(placed, parameters, nonBondedThresh=cutoff)
        assert (abs(field.CalcEnergy() - float(value[0])) < 1e-9) == same


def ase_numbers(calculator, mol, x):
    atoms = pytest.importorskip("ase").Atoms(numbers=mol.atomic_numbers.numpy(), calculator=calculator)
    rows = []
    for positions in x.numpy():
        atoms.set_positions(positions)
        rows.append((atoms.get_potential_energy(), atoms.get_forces().copy()))
    return torch.tensor([float(e) for e, _ in rows]), torch.from_numpy(np.stack([f for _, f in rows])).double()


@pytest.mark.parametrize("name", ["ani1ccx", "gfn2", pytest.param(EMT, id="emt")])
def test_numbers_are_those_of_the_package_s_own_ase_calculator(name):
    """In eV through ASE's constants; hartree taken for anything else is off by a factor."""
    energy = opened(name)
    if name == "gfn2":
        calculator = pytest.importorskip("tblite.ase").TBLite(method="GFN2-xTB", verbosity=0)
    elif name == "ani1ccx":
        calculator = pytest.importorskip("torchani").models.ANI1ccx().ase()
    else:
        calculator = emt(ETHANOL)
    x, _ = conformers(ETHANOL, 2)
    exact, exact_forces = ase_numbers(calculator, ETHANOL, x)
    value, forces = energy.energy_and_forces(x)
    in_ev = kt_per(energy.unit, 300.0) / kt_per("eV", 300.0)
    torch.testing.assert_close(in_ev * value, exact, rtol=1e-6, atol=1e-6)
    assert close(in_ev * forces, exact_forces, 1e-4)
    if energy.unit == "hartree":
        assert not close(value, exact, 0.1) and not close(in_ev * forces * BOHR, exact_forces, 0.1)


def test_aimnet2_agrees_with_the_single_network_of_the_same_package():
    """A member of another training run: eV, its forces by autograd; an ion is told its charge."""
    energy = opened("aimnet2")
    from importlib.util import find_spec

    file = Path(find_spec("Auto3D").origin).parent / "models" / "aimnet2_wb97m-d3_0.jpt"
    network = torch.jit.load(file)

    def single(mol, x, charge):
        y = x.float().requires_grad_(True)
        numbers = mol.atomic_numbers.expand(len(x), -1)
        e = network({"coord": y, "numbers": numbers, "charge": torch.full((len(x),), charge, dtype=torch.float32)})["energy"]
        return e.detach().double(), -torch.autograd.grad(e.sum(), y)[0].double()

    x, _ = conformers(ETHANOL, 2)
    value, forces = energy.energy_and_forces(x)
    exact, exact_forces = single(ETHANOL, x, 0.0)
    torch.testing.assert_close(value, exact, rtol=0, atol=0.1)
    assert close(forces, exact_forces, 0.05) and not close(-forces, exact_forces, 0.05)
    ion = molecule("C[NH3+]", "methylammonium")
    x, _ = conformers(ion, 1)
    value, _ = open_energy("aimnet2", ion).energy_and_forces(x)
    torch.testing.assert_close(value, single(ion, x, 1.0)[0], rtol=0, atol=0.1)
    assert float((value - single(ion, x, 0.0)[0]).abs()) > 1


def test_gfn2_is_told_charge_and_unpaired_electrons():
    opened("gfn2")
    interface = pytest.importorskip("tblite.interface")
    for smiles, charge, unpaired in (("C[NH3+]", 1, 0), ("[CH3]", 0, 1)):
        mol = molecule(smiles)
        x, _ = conformers(mol, 1)
        exact = {}
        for told in ((charge, unpaired), (0, 0) if charge else (0, 3)):
            calculator = interface.Calculator("GFN2-xTB", mol.atomic_numbers.numpy(), x[0].numpy() / BOHR, *told)
            calculator.set("verbosity", 0)
            exact[told] = calculator.singlepoint()["energy"]
        (value,) = open_energy("gfn2", mol).energy_and_forces(x)[0].tolist()
        right, wrong = exact.values()
        assert value == pytest.approx(right, abs=1e-8) != pytest.approx(wrong, abs=1e-3)


# Units, temperature, kT


def test_units_agree_with_ase_and_a_calorie_is_no_joule():
    units = pytest.importorskip("ase.units")
    for unit, ev in (("eV", 1.0), ("hartree", units.Hartree), ("kcal/mol", units.kcal / units.mol)):
        assert kt_per(unit, 300.0) == pytest.approx(ev / (units.kB * 300), rel=1e-6)
    assert pytest.approx(units.Bohr, rel=1e-8) == BOHR
    assert kt_per("kcal/mol", 300.0) != pytest.approx(units.kJ / units.mol / (units.kB * 300), rel=0.1)
    with pytest.raises(TiltflowError, match="unknown unit of energy 'kJ'"):
        kt_per("kJ", 300.0)
    for kelvin in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(TiltflowError, match="positive and finite"):
            Reduced(Harmonic(None), kelvin)
    with pytest.raises(TiltflowError, match="zero must be finite"):
        Reduced(Harmonic(None), 300.0, float("nan"))


def test_temperatures():
    texts = ("300", "300K", " 298.15 k", "3e2K", "+300.")
    assert [parse_temperature(text) for text in texts] == [300, 300, 298.15, 300, 300]
    for text in ("27C", "", "K", "nan", "inf", "300 F", "3,00", "300KK"):
        with pytest.raises(TiltflowError, match="write Kelvin"):
            parse_temperature(text)
    for text in ("-300K", "0", "1e999"):
        with pytest.raises(TiltflowError, match="above 0 K and finite"):
            parse_temperature(text)


def test_evaluator_counts_caches_and_weighs_reduced_energies():
    """kT = R T with R = 1.987204259 cal/(mol K)."""
    energy = open_energy("mmff94", ETHANOL)
    reduced = Reduced(energy, 300.0)
    assert isinstance(reduced, ForceProvider)
    x, _ = conformers(ETHANOL, 4)
    evaluator = Evaluator(reduced, batch=3, cache=8)
    value, grad = evaluator.value_and_grad(torch.cat([x, x[:2]]))
    assert evaluator.report() == {"calls": 2, "evaluations": 4, "rejected": 0}
    kcal, forces = energy.energy_and_forces(x)
    torch.testing.assert_close(value[:4], kcal / (1.987204259e-3 * 300), rtol=1e-8, atol=0)
    torch.testing.assert_close(grad[:4], -forces / (1.987204259e-3 * 300), rtol=1e-8, atol=0)
    assert torch.equal(value[4:], value[:2]) and torch.equal(grad[4:], grad[:2])
    y = x.clone().requires_grad_(True)
    (through,) = torch.autograd.grad(evaluator(y).sum(), y)
    assert torch.equal(through, grad[:4]) and evaluator.evaluations == 4


def test_zero_keeps_float32_precise():
    """Absolute energies of an electronic method lose tenths of kT in float32, unless their zero is shifted."""

    class Shifted(Harmonic):
        def energy_and_forces(self, x):
            e, f = super().energy_and_forces(x.double())
            return e - 17882.1163, f

    x = 0.02 * torch.arange(1.0, 6.0)[:, None, None].expand(5, 9, 3)
    exact = Evaluator(Reduced(Harmonic(None), 300.0)).value(x)
    for zero, off in ((-17882.1163, False), (0.0, True)):
        value = Evaluator(Reduced(Shifted(None), 300.0, zero)).value(x.float()).double()
        assert bool((value - value[0] - exact + exact[0]).abs().max() > 1e-3) == off


# Molecules and packages that do not fit


@pytest.mark.parametrize(
    "name, smiles, reason",
    [
        ("mmff94", "OB(O)C", "mmff94 does not take B; it takes H, Li, C"),
        ("mmff94", "[CH3]", "no radicals"),
        ("mmff94", "CP(C)(C)(C)C", "parameters are missing"),
        ("ani1ccx", "CS", "ani1ccx does not take S; it takes H, C, N, O"),
        ("ani1ccx", "C[NH3+]", r"neutral molecules; the charge is \+1"),
        ("aimnet2", "C[CH2]", "no radicals"),
        ("aimnet2", "[Na+]", "does not take Na"),
        ("gfn2", "[Fr+]", "does not take Fr"),
    ],
)
def test_unsupported_molecules_are_named_with_the_reason(name, smiles, reason):
    with pytest.raises(UnsupportedMolecule, match=reason) as caught:
        open_energy(name, molecule(smiles, "thing"))
    assert re.search(reason, caught.value.reason) and str(caught.value).startswith("thing (")


@pytest.mark.parametrize(
    "name, module, target",
    [
        ("ani1ccx", "torchani", "make energy-ani"),
        ("aimnet2", "Auto3D", "make energy-aimnet2"),
        ("gfn2", "tblite.interface", "make energy-xtb"),
        (f"{__file__}:nothing", "ase", r"pip install 'tiltflow\[ase\]'"),
    ],
)
def test_missing_packages_name_the_line_to_type(name, module, target, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "ase.calculators.calculator", None)
    with pytest.raises(TiltflowError, match=rf"{module}.*install it with `{target}`"):
        open_energy(name, ETHANOL)


def nothing(molecule):
    return SimpleNamespace(get_property=None, calculate=None, implemented_properties=["energy"])


def something_else(molecule):
    return 1.0


def test_energies_by_name():
    energy = open_energy(f"{__file__}:Harmonic", ETHANOL)
    assert energy.molecule is ETHANOL and energy.name == "harmonic"
    with pytest.raises(TiltflowError, match="unknown energy 'mmff': use one of mmff94, ani1ccx, aimnet2, gfn2, or module:"):
        open_energy("mmff", ETHANOL)
    with pytest.raises(TiltflowError, match="returned a float; it must return an ASE calculator or a MolecularEnergy"):
        open_energy(f"{__file__}:something_else", ETHANOL)
    pytest.importorskip("ase")
    with pytest.raises(TiltflowError, match="SimpleNamespace has no forces"):
        open_energy(f"{__file__}:nothing", ETHANOL)


def test_failed_ase_calculations_are_rejected_and_other_errors_are_not_hidden():
    calculators = pytest.importorskip("ase.calculators.calculator")
    from tiltflow.molecules.energies.ase import ASEEnergy

    class Fails(calculators.Calculator):
        implemented_properties = ("energy", "forces")
        error = calculators.CalculationFailed

        def calculate(self, atoms, properties, changes):
            super().calculate(atoms, properties, changes)
            if atoms.positions[0, 0] > 1:
                raise self.error("no convergence")
            self.results = {"energy": 1.0, "forces": atoms.positions}

    x = torch.zeros(3, 9, 3)
    x[1, 0, 0] = 2
    evaluator = Evaluator(Reduced(ASEEnergy(Fails(), ETHANOL), 300.0))
    assert evaluator.value(x).isposinf().tolist() == [False, True, False] and evaluator.rejected == 1
    Fails.error = KeyError
    with pytest.raises(KeyError):
        evaluator.value(x)


def test_environments_are_pinned_and_made_by_the_makefile():
    root = Path(__file__).parent.parent
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    names = re.search(r"^ENERGIES := (.*)$", makefile, re.M)[1].split()
    assert {f"energy-{n}.txt" for n in names} == {p.name for p in (root / "requirements").iterdir()}
    for name in names:
        lines = (root / "requirements" / f"energy-{name}.txt").read_text(encoding="utf-8").splitlines()
        assert all(re.match(r"#|[\w-]+==[\w.]+ +# \S", line) for line in lines), "a pin, and its licence"


def test_forces_are_those_of_their_own_row():
    """RDKit's CalcGrad(x) uses the distances of the last CalcEnergy(x): rows in another order have the same forces."""
    mol = molecule("CC(=O)NCCO")
    x = torch.randn(3, len(mol.atomic_numbers), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    energy = open_energy("mmff94", mol)
    together = energy.energy_and_forces(x)[1]
    for i in (2, 0, 1):
        torch.testing.assert_close(energy.energy_and_forces(x[[i]])[1][0], together[i])
        torch.testing.assert_close(open_energy("mmff94", mol).energy_and_forces(x[[i]])[1][0], together[i])
