"""What a pruned model remembers: the history and the last selection of each site.

It belongs to the model: every graph of it (prefill, decode, calibration, other dtypes) reads and writes the same one.
It is no part of `state_dict`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed import ProcessGroup

from ppgraph.config import PruneConfig
from ppgraph.errors import HistoryError, UnsupportedModelError
from ppgraph.interrupts import interrupts_held_back
from ppgraph.methods import OBSERVATIONS, Observation
from ppgraph.passes.base import Site
from ppgraph.sharding import Share

# Histories grow by whole steps of positions, so that batches a little longer than the last don't copy it each time.
GROWTH = 128
FORMAT = 1
INDEX = "ppgraph.json"


class History:
    """What was observed of every channel, for each position: {site name: [positions, C]}, fp32.

    That is the tensor that scores read (the mean square, unless the config observes something else); `memory` gives
    all that an observation keeps. `allocation` holds the units kept by site, once calibration has decided them; where
    tensor parallelism spreads a model over ranks, those of all ranks together, while C are this rank's channels. `seen`
    [positions] counts the samples that calibration saw at each. Positions never seen hold 0. Memory grows with the
    longest batch so far, not with the model's context. `version` counts its changes. `lock` is held by whatever reads
    or changes all of it.
    """

    def __init__(self, config: PruneConfig) -> None:
        self._config = config
        self._widths: dict[str, int] = {}
        self._shares: dict[str, Share] = {}
        observation = self._observation
        self._tensors, self._moment_names = observation.tensors, tuple(observation.moments)
        self._moments: dict[str, dict[str, torch.Tensor]] = {}
        self._values: dict[str, dict[str, torch.Tensor]] = {}
        self.allocation: dict[str, int] | None = None
        self._seen = torch.zeros(0)
        self.version = 0
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())

    def __deepcopy__(self, memo: dict[int, Any]) -> History:
        """The same contents, under a lock of its own."""
        made = type(self).__new__(type(self))
        with self.lock:
            made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def __repr__(self) -> str:
        return f"History({len(self._widths)} sites, {self.positions} positions, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def _observation(self) -> Observation:
        return OBSERVATIONS[self._config.observed]  # not held: what a user registers may not be picklable

    @property
    def positions(self) -> int:
        """Positions held, seen or not."""
        return len(self._seen)

    @property
    def nbytes(self) -> int:
        """Bytes held by all sites."""
        held = (*self._values.values(), *self._moments.values())
        return sum(value.nbytes for tensors in held for value in tensors.values()) + self._seen.nbytes

    @property
    def seen(self) -> torch.Tensor:
        """Samples that calibration saw at each position, [positions] fp32."""
        return self._seen

    def __getitem__(self, site: str) -> torch.Tensor:
        return self._values[site][self._tensors[0]]

    def memory(self, site: str) -> dict[str, torch.Tensor]:
        """All that is held of a site: {tensor: [positions, C]} fp32."""
        return dict(self._values[site])

    def moment(self, site: str, name: str) -> torch.Tensor:
        """A moment of a site, [C, columns] fp32."""
        return self._moments[site][name]

    def centre(self, site: str, tensor: str) -> torch.Tensor:
        """A tensor's mean over the positions that calibration saw, [C] fp32; 0 without any."""
        seen = self._seen > 0
        return (self._values[site][tensor] * seen.unsqueeze(1)).sum(0) / seen.sum().clamp(min=1)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def keys(self) -> list[str]:
        """Names of the sites."""
        return list(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def declare(self, sites: list[Site], device: torch.device, shares: Mapping[str, Share] | None = None) -> None:
        """Make room for these sites; sites already known must have the same width.

        Of sites in `shares` this rank holds only a part of the channels.

        Raises:
            HistoryError: a site has another width than the history holds.
            UnsupportedModelError: a moment is to be held of channels that lie on several ranks.
        """
        self._shares |= {site.name: shares[site.name] for site in sites if shares and site.name in shares}
        self._refuse_spread_moments()
        for site in sites:
            known = self._widths.setdefault(site.name, site.width)
            if known != site.width:
                raise HistoryError(f"{site.name} has {site.width} channels, but the history holds {known} for it")
            held = self._values.setdefault(site.name, {})
            for tensor in self._tensors:
                if tensor not in held:
                    held[tensor] = self._zeros(self.positions, site.width, device)
                elif held[tensor].device != device:
                    held[tensor] = held[tensor].to(device)
            moments = self._moments.setdefault(site.name, {})
            for name in self._moment_names:
                moments[name] = (
                    moments[name].to(device) if name in moments else self._no_moment(name, site.width, device)
                )
        if self._seen.device != device:
            self._seen = self._seen.to(device)

    def _refuse_spread_moments(self) -> None:
        if self._shares and self._moment_names:
            raise UnsupportedModelError(
                f"observed={self._config.observed!r} holds what pairs of channels have in common, but the channels of "
                f"{next(iter(self._shares))} lie on several ranks; observe without moments, or use one device"
            )

    def kept_here(self) -> dict[str, int] | None:
        """The units of each site that this rank keeps by the allocation; None before one is made."""
        if self.allocation is None:
            return None
        portions = {name: share.portion for name, share in self._shares.items()}
        return {name: portions[name](units) if name in portions else units for name, units in self.allocation.items()}

    def require_observed(self) -> frozenset[str]:
        """The names of the sites, once something was observed of them.

        Raises:
            HistoryError: nothing was.
        """
        if not any(bool(self[site].any()) for site in self):
            raise HistoryError(
                "expected a history to choose by, for this batch is below history_below; found none: call "
                "ppgraph.calibrate(pruned, batches), or pruned.ppgraph.history.load(folder), before it"
            )
        return frozenset(self)

    def reserve(self, positions: int) -> None:
        """Make sure that positions below `positions` exist; new ones hold 0."""
        if positions > self.positions:
            self._grow(-(-positions // GROWTH) * GROWTH)

    def _grow(self, grown: int) -> None:
        for tensors in self._values.values():
            for name, value in tensors.items():
                tensors[name] = self._grown(value, grown)
        self._seen = self._grown(self._seen, grown)

    def rows(self, site: str, start: int, length: int, tensor: str | None = None) -> torch.Tensor:
        """A view of `length` positions of one tensor of a site (the one that scores read if not named), [length, C]."""
        return self._values[site][tensor or self._tensors[0]][start : start + length]

    def reset(self) -> None:
        """Forget everything; memory is freed. What calibration decided about widths stays."""
        with self.lock, interrupts_held_back():
            for name, width in self._widths.items():
                self._values[name] = {tensor: self._zeros(0, width, self._seen.device) for tensor in self._tensors}
                self._moments[name] = {
                    moment: self._no_moment(moment, width, self._seen.device) for moment in self._moment_names
                }
            self._seen = self._zeros_like_seen(0)
            self.version += 1

    def average(self, group: ProcessGroup | None = None) -> None:
        """Let data-parallel replicas learn from each other: afterwards each holds the mean of what all have observed.

        At each position replicas weigh in by the samples that their calibration saw there; where none saw any, those
        that hold something weigh alike. `seen` becomes its mean too, so that calibration may go on after it, and a
        second call changes nothing. Communicates: every rank of the group calls it.

        Args:
            group: The replicas; all ranks when None. Under tensor parallelism those that hold the same channels.

        Raises:
            HistoryError: on every rank, where the histories are of different models, configs, channels or allocations,
                or hold factors, whose mean says nothing.
        """
        self._refuse_factors()
        positions = max(self._alike(group))
        self._grow(max(positions, self.positions))
        ranks = torch.distributed.get_world_size(group)
        sums = functools.partial(_sum_over, group)
        calibrated = sums(self._seen) > 0
        for tensors in self._values.values():
            for value in tensors.values():
                weight = torch.where(calibrated, self._seen, (value != 0).any(dim=1).float()).unsqueeze(1)
                value.copy_(sums(weight * value) / sums(weight).clamp(min=1))
        for moments in self._moments.values():
            for moment in moments.values():
                moment.copy_(sums(moment) / ranks)
        self._seen.copy_(sums(self._seen) / ranks)
        self.version += 1

    def _refuse_factors(self) -> None:
        if any(columns is not None for columns in self._observation.moments.values()):
            raise HistoryError(
                f"observed={self._config.observed!r} holds factors of what replicas saw, which cannot be averaged; "
                "calibrate one replica, and save its history for the others to load"
            )

    def _alike(self, group: ProcessGroup | None) -> list[int]:
        """The positions that each rank of a group holds, once they are seen to hold the same of the same model."""
        first_channels = {name: int(share.channels[0]) for name, share in self._shares.items()}
        own = {
            "sites": (self._widths, first_channels),
            "tensors": (self._tensors, self._moment_names),
            "allocation": self.allocation,
        }
        found: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(found, (own, self.positions), group=group)
        for rank, (other, _) in enumerate(found):
            for what in own:
                if found[0][0][what] != other[what]:
                    raise HistoryError(
                        f"expected histories of replicas, but ranks 0 and {rank} of the group differ in their {what}: "
                        f"{found[0][0][what]} and {other[what]}; average over a group of ranks that hold the same part "
                        "of the same model, transformed with the same config"
                    )
        return [positions for _, positions in found]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `ppgraph.json` and the statistics (safetensors) into `folder`.

        The JSON names the safetensors file and is replaced last, in one step: an interrupted save leaves the old
        history whole.

        Calls of the model, from other threads, wait until it is written. Where tensor parallelism spreads a model over
        ranks, every rank calls this: the channels of all are gathered, and the first rank writes one history, which
        loads under any number of ranks.

        Raises:
            HistoryError: the folder cannot be made or written to.
        """
        with self.lock:
            tensors = {key: self._whole(site, self._values[site][tensor]) for key, site, tensor in self._keys()}
            tensors |= {f"{site}:{name}": value for site, held in self._moments.items() for name, value in held.items()}
            write = functools.partial(self._write, folder, {**tensors, "seen": self._seen})
            share = next(iter(self._shares.values()), None)
            if share is None:
                write()
            else:
                share.on_first_rank(write)

    def _whole(self, site: str, value: torch.Tensor) -> torch.Tensor:
        return self._shares[site].whole(value) if site in self._shares else value.contiguous()

    def _totals(self) -> dict[str, int]:
        """The channels of each site on all ranks together."""
        shares = self._shares
        return {name: shares[name].total if name in shares else width for name, width in self._widths.items()}

    def _write(self, folder: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor]) -> None:
        try:
            self._save(Path(folder), tensors)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise HistoryError(
                f"cannot save the history to {folder} ({reason}); choose a folder that can be written"
            ) from error

    def _save(self, target: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        target.mkdir(parents=True, exist_ok=True)
        handle, data = tempfile.mkstemp(dir=target, prefix="history-", suffix=".safetensors")
        os.close(handle)
        replaced = False
        try:
            save_file(dict(tensors), data)
            _flush(Path(data))
            index = {
                "format": FORMAT,
                "data": Path(data).name,
                "sha256": _digest(Path(data)),
                "config": self._config.to_dict(),
                "sites": self._totals(),
                "tensors": list(self._tensors),
                "moments": list(self._moment_names),
                "allocation": self.allocation,
                "positions": self.positions,
            }
            index["index_sha256"] = index_digest(index)
            with interrupts_held_back():  # from here on the new data is needed
                _replace_text(target / INDEX, json.dumps(index, indent=2) + "\n")
                replaced = True
        except BaseException:
            if not replaced:
                Path(data).unlink(missing_ok=True)
            raise
        _flush(target)
        for old in target.glob("history-*.safetensors"):
            if old.name != Path(data).name:
                old.unlink(missing_ok=True)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Take over a saved history; nothing changes when it does not fit.

        It may have been saved under another number of ranks: each takes the channels that it holds.

        Raises:
            HistoryError: files are missing or damaged, or hold other sites or widths (another model, or a config that
                prunes other blocks or layers).
        """
        source = Path(folder)
        index = _read_index(source)
        self._require_same_sites(index)
        values = _read_tensors(source / index["data"], index, self._observation)
        with self.lock, interrupts_held_back():
            self._take(index, values)

    def _take(self, index: Mapping[str, Any], values: Mapping[str, torch.Tensor]) -> None:
        self.version += 1
        device = self._seen.device
        self._seen = values["seen"].to(device)
        widths = {site: len(share.channels) for site, share in self._shares.items()}
        self._widths = {**index["sites"], **widths}
        self._values = {site: {} for site in self._widths}
        for key, site, tensor in self._keys():
            self._values[site][tensor] = self._part(site, values[key].to(device))
        for site in self._widths:
            self._moments[site] = {name: values[f"{site}:{name}"].to(device) for name in self._moment_names}
        self.allocation = index["allocation"]

    def _part(self, site: str, value: torch.Tensor) -> torch.Tensor:
        return self._shares[site].part(value) if site in self._shares else value

    def _keys(self) -> Iterator[tuple[str, str, str]]:
        return _keys(self._widths, self._tensors)

    def _require_same_sites(self, index: Mapping[str, Any]) -> None:
        if (*index["tensors"], *index["moments"]) != (*self._tensors, *self._moment_names):
            raise HistoryError(
                f"the saved history holds {', '.join(map(str, index['tensors'] + index['moments']))}, but "
                f"observed={self._config.observed!r} needs {', '.join((*self._tensors, *self._moment_names))}; "
                "load it into a model that observes the same"
            )
        saved = index["sites"]
        held = self._totals()
        for name in sorted(set(saved) | set(held)):
            mine, other = held.get(name), saved.get(name)
            if mine != other and self._widths:
                raise HistoryError(
                    f"the saved history belongs to another model or config: {name} has {other or 'no'} channels there "
                    f"and {mine or 'none'} here; load it into a model with the same blocks and skip_layers"
                )

    def _zeros(self, positions: int, width: int, device: torch.device) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.zeros(positions, width, device=device)

    def _no_moment(self, name: str, width: int, device: torch.device) -> torch.Tensor:
        return self._zeros(*self._observation.moment_shape(name, width), device)

    def _zeros_like_seen(self, positions: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.zeros(positions, device=self._seen.device)

    def _grown(self, value: torch.Tensor, positions: int) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            grown = value.new_zeros((positions, *value.shape[1:]))
            grown[: len(value)] = value
            return grown


def _sum_over(group: ProcessGroup | None, value: torch.Tensor) -> torch.Tensor:
    total = value.clone()
    torch.distributed.all_reduce(total, group=group)
    return total


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def index_digest(index: Mapping[str, Any]) -> str:
    """The sha256 of all that `ppgraph.json` says, but for itself."""
    said = {key: value for key, value in index.items() if key != "index_sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before what comes next: a power cut must find them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace_text(path: Path, text: str) -> None:
    """Replace a file's contents in one step."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HistoryError(f"no history at {folder}: expected {INDEX} there, as history.save writes it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HistoryError(f"{path} is damaged ({error}); save the history again") from None
    expected: dict[str, Any] = {
        "format": int,
        "data": str,
        "sha256": str,
        "config": dict,
        "sites": dict,
        "tensors": list,
        "moments": list,
        "positions": int,
        "index_sha256": str,
    }
    if not isinstance(index, dict):
        raise HistoryError(f"{path} is damaged: expected an object with {', '.join(expected)}")
    if isinstance(index.get("format"), int) and index["format"] != FORMAT:
        raise HistoryError(f"{path} has format {index['format']}, this version of ppgraph reads {FORMAT}")
    for key, kind in expected.items():
        if type(index.get(key)) is not kind:  # a bool is no whole number here
            raise HistoryError(f"{path} is damaged: expected {key} ({kind.__name__}), found {index.get(key)!r}")
    if index_digest(index) != index["index_sha256"]:
        raise HistoryError(f"{path} is damaged: it is not what was saved (sha256 differs); save the history again")
    _require_allocation(path, index)
    if Path(index["data"]).name != index["data"] or index["data"] in ("", ".."):
        raise HistoryError(f"{path} names data outside of its folder: {index['data']!r}")
    return index


def _require_allocation(path: Path, index: Mapping[str, Any]) -> None:
    kept = index.get("allocation")
    whole = isinstance(kept, dict) and all(isinstance(units, int) and units >= 0 for units in kept.values())
    if kept is not None and not (whole and set(kept) <= set(index["sites"])):
        raise HistoryError(f"{path} is damaged: expected allocation to be null or units kept by site, found {kept!r}")


def _keys(sites: Iterable[str], tensors: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Name in the file, site and tensor: what scores read goes by the site's name alone."""
    for site in sites:
        for place, tensor in enumerate(tensors):
            yield (f"{site}:{tensor}" if place else site, site, tensor)


def _read_tensors(path: Path, index: Mapping[str, Any], observation: Observation) -> dict[str, torch.Tensor]:
    try:
        if _digest(path) != index["sha256"]:
            raise HistoryError(f"{path} is damaged: it is not what was saved (sha256 differs); save the history again")
        tensors = load_file(path)
    except FileNotFoundError:
        raise HistoryError(f"the history's data is missing: expected {path}") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise HistoryError(f"{path} is damaged ({error}); save the history again") from None
    positions = index["positions"]
    sites = index["sites"]
    shapes = {key: (positions, sites[site]) for key, site, _ in _keys(sites, index["tensors"])} | {"seen": (positions,)}
    shapes |= {
        f"{site}:{name}": observation.moment_shape(name, width)
        for site, width in sites.items()
        for name in index["moments"]
    }
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in sorted(set(shapes) | set(found)):
        if shapes.get(name) != found.get(name):
            raise HistoryError(f"{path} is damaged: expected {name} {shapes.get(name)}, found {found.get(name)}")
    for name, value in tensors.items():
        if (
            value.dtype != torch.float32
            or not bool(torch.isfinite(value).all())
            or _is_wrongly_negative(name, value, index)
        ):
            raise HistoryError(f"{path} is damaged: {name} is not finite, non-negative float32")
    return tensors


def _is_wrongly_negative(name: str, value: torch.Tensor, index: Mapping[str, Any]) -> bool:
    """Counts and mean squares can't be negative; FLAP's variance, around means that move, can, and so may others."""
    squares = index["tensors"][0] == "mean-square" and name in index["sites"]
    return (name == "seen" or squares) and bool((value < 0).any())
