r"""Low-rank adapters of peft on a pipeline's network: put on, switched, saved for stock diffusers, loaded, merged.

W ↦ W + (α/r) BA with B = 0 at the start (Hu et al. 2022, arXiv:2106.09685). Off is the base, bit for bit. Or all
weights are trained, in a second network beside the frozen one.
"""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError
from tiltflow.pipelines.families import family_of, network_of
from tiltflow.pipelines.networks import names_of, parts_of
from tiltflow.pipelines.settings import TARGETS
from tiltflow.train.store import write_tensors, write_text

NAME, BASE = "default", "_tiltflow_base"
STOCK, WEIGHTS, CONFIG = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"


def add_adapter(pipe: Any, rank: int, generator: torch.Generator, targets: tuple[str, ...] = TARGETS) -> nn.Module:
    """Freeze every component of ``pipe``, put a trainable adapter in float32 on its network, and return the network.

    Raises:
        TiltflowError: rank below 1, an adapter that is there already, or no layer of that name.
    """
    from peft import LoraConfig, inject_adapter_in_model

    network = network_of(pipe)
    if rank < 1:
        raise TiltflowError(f"the rank of an adapter must be at least 1, got {rank}.")
    if _layers(network):
        raise TiltflowError("the pipeline has an adapter already: fuse it and save the pipeline, or unload_lora_weights().")
    freeze(pipe)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
    try:
        with torch.random.fork_rng([] if generator.device.type == "cpu" else [generator.device]):  # peft draws from these
            for part in parts_of(network):
                inject_adapter_in_model(config, part, NAME)
    except ValueError as error:
        raise TiltflowError(f"{type(network).__name__} has no layer named {', '.join(targets)}.") from error
    for name, p in network.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
            if "lora_A" in name:
                bound = p.shape[1] ** -0.5
                drawn = torch.rand(p.shape, generator=generator, device=generator.device)
                p.data = (bound * (2 * drawn - 1)).to(p.device)
            p.requires_grad_(True)
    return network


def train_all(pipe: Any) -> nn.Module:
    """Freeze every component of ``pipe``, put a trainable float32 copy of its network in place, and return the copy.

    The frozen network stays with the copy, as what :func:`switch` goes back to.
    """
    name = family_of(pipe).network
    base = getattr(pipe, name)
    if len(names_of(pipe, name)) > 1:
        raise TiltflowError(f"{type(pipe).__name__} has two networks, which are trained by adapters only: give a rank.")
    freeze(pipe)
    network = copy.deepcopy(network_of(pipe)).float().requires_grad_(True)
    object.__setattr__(network, BASE, base)  # no submodule: neither trained nor saved with it
    setattr(pipe, name, network)
    return network


def trains_all(network: nn.Module) -> bool:
    """Whether it is the copy that :func:`train_all` made."""
    return hasattr(network, BASE)


def freeze(pipe: Any) -> None:
    """Every component in evaluation mode, with no weight that trains."""
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()


def switched(network: nn.Module, on: bool) -> nn.Module:
    """The network that is to be called: with its adapter on or off, or the copy or its frozen original."""
    switch(network, on)
    return network if on else getattr(network, BASE, network)


def switch(network: nn.Module, on: bool) -> None:
    """The adapter on or off, if there is one. It stays so: what is checkpointed is computed again under the same."""
    for layer in _layers(network):
        layer._disable_adapters = not on  # enable_adapters() would also touch requires_grad


def _layers(network: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [m for m in network.modules() if isinstance(m, BaseTunerLayer)]


def _is_stock(pipe: Any) -> bool:
    """Whether diffusers saves and loads adapters of such a pipeline's network."""
    save = getattr(type(pipe), "save_lora_weights", None)
    return save is not None and f"{family_of(pipe).network}_lora_layers" in inspect.signature(save).parameters


def save_adapter(pipe: Any, folder: Path) -> Path:
    """The adapter of the network in ``folder``, for ``pipe.load_lora_weights(folder)`` of stock diffusers.

    Pipelines that have no such method (the audio ones, PRX) get peft's files, for :func:`load_adapter`. The file is
    returned. Raises TiltflowError without an adapter.
    """
    family = family_of(pipe)
    network = network_of(pipe)
    layers = _layers(network)
    if not layers:
        raise TiltflowError("the pipeline has no adapter to save.")
    folder.mkdir(parents=True, exist_ok=True)
    if _is_stock(pipe):
        from diffusers.utils import convert_state_dict_to_diffusers

        for name, part in zip(names_of(pipe, family.network), parts_of(network), strict=True):
            state = _state(part)
            if name == "unet":  # of a transformer converted, stock diffusers would leave out half the layers
                state = convert_state_dict_to_diffusers(state)
            place = folder if name == family.network else folder / name
            type(pipe).save_lora_weights(place, **{f"{family.network}_lora_layers": state})
        return folder / STOCK
    config = network.peft_config[NAME].to_dict()
    kept = {key: config[key] for key in ("r", "lora_alpha")} | {"target_modules": sorted(config["target_modules"])}
    write_text(folder / CONFIG, json.dumps({"peft_type": "LORA"} | kept, indent=1) + "\n")
    write_tensors(folder / WEIGHTS, _state(network))
    return folder / WEIGHTS


def _state(network: nn.Module) -> dict[str, Tensor]:
    """The adapter of one component, under the names of its plain modules."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(network, adapter_name=NAME)
    return {k.replace("_orig_mod.", ""): v.detach().cpu().contiguous() for k, v in found.items()}  # of compiled blocks


def load_adapter(pipe: Any, folder: Path) -> None:
    """What :func:`save_adapter` wrote, on a pipeline of the same base. Raises TiltflowError if it does not fit."""
    if _layers(network_of(pipe)):
        raise TiltflowError("the pipeline has an adapter already: load its folder anew, or unload_lora_weights().")
    if _is_stock(pipe):
        if not (folder / STOCK).is_file():
            raise TiltflowError(f"{folder} holds no adapter: there is no {STOCK}.")
        others = names_of(pipe, family_of(pipe).network)[1:]
        try:
            pipe.load_lora_weights(folder, weight_name=STOCK)
            for name in others:
                pipe.load_lora_weights(folder / name, weight_name=STOCK, **{f"load_into_{name}": True})
        except (RuntimeError, ValueError, SafetensorError) as error:
            raise TiltflowError(f"{folder} does not fit {type(pipe).__name__}: {str(error).splitlines()[0]}") from error
        return
    from peft import set_peft_model_state_dict

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise TiltflowError(f"{folder} holds no adapter of tiltflow or peft: {error}.") from error
    network = add_adapter(pipe, config["r"], torch.Generator(), tuple(config["target_modules"]))
    found: Any = set_peft_model_state_dict(network, state, adapter_name=NAME)
    if found.unexpected_keys:
        raise TiltflowError(f"{folder} does not fit {type(network).__name__}: it has no {found.unexpected_keys[0]}.")


def load_network(pipe: Any, folder: Path) -> None:
    """The trained network of a pipeline that was saved with all weights, in the place of the one of ``pipe``.

    As after :func:`train_all`, the network of ``pipe`` stays with it. Raises TiltflowError if the folder holds none.
    """
    name = family_of(pipe).network
    base = getattr(pipe, name)
    if not (folder / name / "config.json").is_file():
        raise TiltflowError(f"{folder} holds no pipeline with a trained {name}.")
    try:
        network = type(base).from_pretrained(folder / name, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise TiltflowError(f"{folder / name} does not fit {type(base).__name__}: {str(error).splitlines()[0]}") from error
    network = network.to(base.device).eval().requires_grad_(False)
    object.__setattr__(network, BASE, base)
    setattr(pipe, name, network)


def merge_adapter(pipe: Any) -> None:
    """Fold the adapter into the network's weights, in place: a stock pipeline again, for ``pipe.save_pretrained``."""
    network = network_of(pipe)
    switch(network, True)
    for layer in _layers(network):
        layer.merge()
    _unwrap(network)


def remove_adapter(pipe: Any) -> None:
    """Take the adapter off, or put the frozen network back: the pipeline as it was before training."""
    name = family_of(pipe).network
    network = getattr(pipe, name)
    _unwrap(network_of(pipe))
    setattr(pipe, name, getattr(network, BASE, network))


def _unwrap(network: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in [*network.named_modules()]:
        if isinstance(layer, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
    for part in parts_of(network):
        if hasattr(part, "peft_config"):
            del part.peft_config
