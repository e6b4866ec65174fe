"""One run of EVA over a user's data: what layers see, its components, who gets which rank."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import PeftWarning
from . import EvaConfig
from .incremental_pca import IncrementalPCA

MAX_PASSES = 100


class EvaRun:
    """A look at what layers see while a model runs over data.

    Args:
        layers: the modules to look at, by path.
        ranks: the rank of each before any redistribution.
        config: the adapter's configuration.
        forward: runs the model on a batch.
        prepare_model, prepare_layer, gather: see ``get_eva_state_dict``.

    Raises:
        ValueError: ``prepare_layer`` names a layer that is not among them.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        ranks: Mapping[str, int],
        config: Any,
        forward: Callable[[Any], Any],
        prepare_model: Any,
        prepare_layer: Any,
        gather: bool,
    ) -> None:
        self.layers, self.ranks, self.forward = layers, ranks, forward
        self.config, self.eva = config, config.eva_config or EvaConfig()
        same = not isinstance(prepare_layer, Mapping)
        self.prepare_model, self.prepare = (
            prepare_model,
            dict.fromkeys(layers, prepare_layer) if same else prepare_layer,
        )
        self.gather = gather and dist.is_available() and dist.is_initialized()
        devices = {p.device for module in layers.values() for p in module.parameters()} - {
            torch.device("meta")
        }
        self.device = devices.pop() if len(devices) == 1 else None
        if unknown := sorted(self.prepare.keys() - layers.keys()):
            raise ValueError(
                f"prepare_layer_inputs_fn names {unknown}, which are no linear layers under the adapter"
            )

    def components(self, dataloader: Iterable[Any], show_progress: bool) -> dict[str, Tensor]:
        """Return ``{path: directions[rank, in]}`` once they no longer turn.

        Raises:
            ValueError: there are no batches, they can be read only once, or a layer sees no row of them.
        """
        pca = self._by_layer(next(_again_and_again(dataloader))[1])
        ranks = {path: p.k for path, p in pca.items()}
        quiet = not show_progress or (self.gather and dist.get_rank() > 0)
        with tqdm(total=len(pca), desc="EVA: layers that have converged", disable=quiet, leave=False) as bar:
            for passes, batch in _again_and_again(dataloader):
                turning = {
                    path: p for path, p in pca.items() if not _has_converged(p, ranks[path], self.eva.tau)
                }
                bar.update(len(pca) - len(turning) - bar.n)
                if not turning or self._has_to_stop(pca, passes):
                    break
                one_of_each = {id(p): path for path, p in turning.items()}.values()
                self._look(batch, one_of_each, lambda path, rows: pca[path].add(rows))
                if all(len(p.components) for p in pca.values()):
                    ranks = _share_out(pca, sum(self.ranks.values()))
        return {path: _directions(p, ranks[path], self.eva.whiten) for path, p in pca.items()}

    def _by_layer(self, batch: Any) -> dict[str, IncrementalPCA]:
        """Return new components for each layer; those that see the same share them, as query and key do."""
        seen: dict[str, bytes] = {}
        most: Counter[bytes] = Counter()

        def take(path: str, rows: Tensor) -> None:
            data = rows.cpu().contiguous().view(torch.uint8).numpy().data
            seen[path] = digest = hashlib.blake2b(data).digest()
            most[digest] = max(most[digest], min(round(self.ranks[path] * self.eva.rho), rows.shape[1]))

        self._look(batch, self.layers, take)
        if missing := sorted(self.layers.keys() - seen.keys()):
            raise ValueError(
                f"the model does not call {missing}, so EVA cannot start them; see exclude_modules"
            )
        made = {digest: IncrementalPCA(k) for digest, k in most.items()}
        return {path: made[seen[path]] for path in self.layers}

    def _look(self, batch: Any, paths: Iterable[str], take: Callable[[str, Tensor], None]) -> None:
        """Run a batch and call ``take(path, rows[n, in])`` for each layer."""
        batch = _moved(batch, self.device)
        given = batch if self.prepare_model is None else self.prepare_model(batch, self.config)

        def hook_of(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                prepare = self.prepare.get(path)
                rows = args[0] if prepare is None else prepare(args, given, path)
                take(path, self._gathered(rows.detach().flatten(0, -2)))

            return hook

        hooks = [self.layers[path].register_forward_pre_hook(hook_of(path)) for path in paths]
        try:
            self.forward(batch)
        finally:
            for hook in hooks:
                hook.remove()

    def _gathered(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes; they may have different numbers of them."""
        if not self.gather:
            return rows
        counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        longest = max(int(count) for count in counts)
        padded = torch.cat([rows, rows.new_zeros(longest - len(rows), rows.shape[1])])
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    def _has_to_stop(self, pca: Mapping[str, IncrementalPCA], passes: int) -> bool:
        if passes and (empty := sorted(path for path, p in pca.items() if not p.seen)):
            raise ValueError(f"no row of the data reaches {empty}; are all positions masked?")
        if passes == MAX_PASSES:
            warnings.warn(
                f"EVA stopped after {passes} passes over the data, before all components came to rest; "
                f"lower eva_config.tau={self.eva.tau}, or give it more data",
                PeftWarning,
                stacklevel=5,
            )
        return passes == MAX_PASSES


def _again_and_again(dataloader: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Yield each batch with the number of passes that came before it, without end.

    Raises:
        ValueError: there is no batch, or none any more.
    """
    passes = 0
    while True:
        batch = None
        for batch in dataloader:
            yield passes, batch
        if batch is None:
            once = "dataloader can be gone through only once; pass a list or a DataLoader"
            raise ValueError(once if passes else "dataloader is empty")
        passes += 1


def _has_converged(pca: IncrementalPCA, rank: int, tau: float) -> bool:
    return len(pca.similarity) > 0 and bool((pca.similarity[:rank] >= tau).all())


def _share_out(pca: Mapping[str, IncrementalPCA], budget: int) -> dict[str, int]:
    """Return ranks: of all layers' components, the ``budget`` that explain most of their layer's variance."""
    owners = [path for path, p in pca.items() for _ in p.components]
    ratios = torch.cat([p.explained().cpu() for p in pca.values()])
    counts = Counter(owners[i] for i in ratios.argsort(descending=True, stable=True)[:budget].tolist())
    return {path: counts[path] for path in pca}


def _directions(pca: IncrementalPCA, rank: int, whiten: bool) -> Tensor:
    components = pca.components[:rank]
    return components / pca.singular_values[:rank, None].sqrt() if whiten else components.clone()


def _moved(inputs: Any, device: torch.device | None) -> Any:
    if device is None:
        return inputs
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: _moved(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_moved(value, device) for value in inputs)
    return inputs
