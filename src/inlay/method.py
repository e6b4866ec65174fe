"""The contract of a method. One file per method in ``methods/`` fills it in; nothing else is edited to add one.

**The law.** ``merge(W, b) -> (W', b')`` *defines* a weight-space method. ``before`` and ``after`` are its optional fast
path in activation space, ``fused`` its optional fastest one. For every kind of layer they must agree, in values and
gradients::

    after(x, layer(before(x)))  ==  fused(x)  ==  layer_with(merge(W, b))(x)

A method that gives only ``merge`` already works on every kind of layer and every store of weights.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from .injection.targets import default_targets
from .kernels.autocast import outside_autocast
from .kernels.tracing import being_traced

if TYPE_CHECKING:
    from .config import PeftConfig
    from .injection.walk import Place, Site
    from .input_method import InputMethod
    from .kinds import LayerKind
    from .layers.layer import AdaptedLayer

METHODS: dict[str, type[Method] | type[InputMethod]] = {}
"""Every method by its name: the ``peft_type`` of its configuration, or what ``PeftConfig.method_name`` returns."""

Made = TypeVar("Made")
Column = nn.Module | nn.Parameter | Tensor | float | int | bool | None


class Slot:
    """One adapter's part in one layer, as a method sees it.

    ``slot["lora_A"]`` is ``layer.lora_A["default"]``: the layer keeps one dictionary per column, as PEFT does, and a slot
    is the view of one adapter across them.
    """

    def __init__(
        self, layer: AdaptedLayer, name: str, method: Method, config: PeftConfig, path: str = ""
    ) -> None:
        self.layer, self.name, self.method, self.config = layer, name, method, config
        self.path = path  # the layer's name in the model, as ``build`` was told
        self.columns: list[str] = []
        self.owner: Slot | None = (
            None  # the slot whose parameters these are, where two tied layers share them
        )
        self.shared: Slot | None = None  # the slot that keeps what all slots of the adapter share, if another
        self.cache: dict[str, Any] = {}

    def __getitem__(self, column: str) -> Any:
        # Straight to where nn.Module keeps modules: every forward pass comes here several times for every layer.
        module = self.layer._modules.get(column)
        if module is None:
            return self.layer.__dict__[column][self.name]
        return (module._modules or cast("Any", module))[self.name]

    def get(self, column: str) -> Any:
        """Return the entry of a column, or None where this adapter has none."""
        return self[column] if column in self.columns else None

    def kept(self, what: str, made_from: Sequence[Tensor], make: Callable[[], Made], *numbers: Any) -> Made:
        """Return what ``make`` makes, anew only where something that it is made of has changed; never with a gradient.

        Writes through ``.data`` are not seen, until the layer is set to train or evaluate.

        Args:
            what: its name among all that the slot keeps.
            made_from: the tensors that it is made of.
            make: makes it.
            *numbers: what else it is made of.
        """
        # A mode sees every operation, and may make tensors without values.
        if being_traced() or torch._C._len_torch_dispatch_stack() or any(t.is_inference() for t in made_from):
            return make()  # there are no versions to go by
        key = (*numbers, *((t.data_ptr(), t._version, t.dtype) for t in made_from))
        kept: tuple[Any, Made] | None = self.cache.get(what)
        if kept is None or kept[0] != key:
            # What is made in inference mode could not serve training later, nor what autocast rounds a run without it.
            with torch.inference_mode(False), torch.no_grad(), outside_autocast(made_from[0]):
                kept = self.cache[what] = (key, make())
        return kept[1]  # another thread may have cleared the cache

    @property
    def kind(self) -> LayerKind:
        """The geometry of the layer."""
        return self.layer.kind

    def weight(self) -> Tensor:
        """Return the base weight as the canonical matrix W[..., out, in]."""
        return self.layer.base_matrix()

    def bias(self) -> Tensor | None:
        """Return the base bias b[out], or None."""
        return self.layer.base_bias()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return this adapter's parameters by ``column`` or ``column.name in the module``."""
        found: dict[str, nn.Parameter] = {}
        for column in self.columns:
            entry = self[column]
            if isinstance(entry, nn.Module):
                found |= {f"{column}.{key}": p for key, p in entry.named_parameters()}
            elif isinstance(entry, nn.Parameter):
                found[column] = entry
        return found

    def saved(self) -> dict[str, Tensor]:
        """Return what an adapter's file holds of this slot: its parameters, and the buffers that the method names."""
        return {**self.parameters(), **{c: self[c] for c in self.method.saved_buffers if c in self.columns}}


class Method:
    """How an adapter changes what one layer computes. What it trains lives in the layers, each seen as a ``Slot``.

    One object serves all layers of one adapter, and keeps nothing but what ``step`` remembers.
    A subclass registers itself: ``class Lora(Method, name="LORA")``.
    """

    config: ClassVar[type[PeftConfig]]
    additive: ClassVar[bool] = False
    """Whether ``after`` adds to y something that depends on x alone, so that several such adapters commute."""
    saves_embedding: ClassVar[bool] = True
    """Whether an adapted embedding is saved whole beside the adapter, as PEFT does for most methods."""
    on_disk: ClassVar[dict[str, str]] = {}
    """Endings of keys that PEFT's files spell otherwise than the model in memory does."""
    saved_buffers: ClassVar[tuple[str, ...]] = ()
    """Columns of plain tensors that an adapter's file holds beside the parameters."""
    mixes: ClassVar[bool] = False
    """Whether the method only mixes what other adapters of a layer do, by ``mix`` instead of the functions below."""
    mergeable: ClassVar[bool] = True
    """Whether ``merge`` exists: an adapter that acts on a module's output by a function of its own cannot be merged."""
    in_weight: ClassVar[bool] = False
    """Whether ``entries`` says all that ``merge`` does, so that the values may stand in the base weight itself."""

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            METHODS[name] = cls

    # ------------------------------------------------------------------ what is trained, and where it starts

    def build(self, kind: LayerKind, config: Any, path: str) -> dict[str, Column]:
        """Return the new columns of one layer: modules, parameters, tensors (kept as buffers), and plain numbers such as a scale.

        Args:
            kind: geometry of the layer; new parameters go to its device and dtype.
            config: the adapter's configuration.
            path: the layer's name in the model, for settings that differ by layer.

        Raises:
            ValueError: the configuration cannot be met on this kind of layer.
        """
        raise NotImplementedError

    def init(self, slot: Slot) -> None:
        """Set the initial values. Not called where they are about to be loaded onto the meta device."""

    def changes_base(self, config: Any) -> bool:
        """Whether ``init`` gives base layers other weights, which loading an adapter must do as well."""
        return False

    def unit_scale(self, slot: Slot) -> float:
        """Return what the column ``scaling`` starts at, for methods that have one."""
        return 1.0

    # ------------------------------------------------------------------ what a layer computes: the law

    def before(self, slot: Slot, x: Tensor) -> Tensor:
        """Change the layer's input ``x[..., in]``."""
        return x

    def after(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        """Change the layer's output ``y[..., out]``; ``x`` is the input that ``before`` was given."""
        return y

    def fused(self, slot: Slot, x: Tensor) -> Tensor | None:
        """Return what the adapted layer computes, base product included, or None where there is no such path."""
        return None

    def merge(self, slot: Slot, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the adapted weight ``W'[..., out, in]`` and bias ``b'[out]``, without changing the given ones."""
        raise NotImplementedError

    def delta(self, slot: Slot) -> Tensor:
        """Return ``W' - W`` for the base weight, as a canonical matrix."""
        w = slot.weight()
        return self.merge(slot, w, slot.bias())[0] - w

    def beyond_merge(self, slot: Slot) -> str | None:
        """Name what the adapter does right now that ``merge`` cannot express, such as dropout in training."""
        return None

    @classmethod
    def works_on_activations(cls) -> bool:
        """Whether the method has a path besides ``merge``."""
        return cls.before is not Method.before or cls.after is not Method.after

    def entries(self, slot: Slot) -> tuple[Tensor, Tensor]:
        """Return where and how much an ``in_weight`` adapter adds to the base weight.

        Returns:
            ``indices[2, n]``, rows and columns of the canonical matrix with its leading axes flattened, each pair once; and
            ``values[n]``, with the adapter's gradient.
        """
        raise NotImplementedError

    def undo(self, slot: Slot, y: Tensor) -> Tensor:
        """Return what ``after`` was given, from what it returned; for adapters of embeddings, which the head wants back."""
        raise NotImplementedError

    # ------------------------------------------------------------------ where it sits

    def complete(self, config: Any, model: nn.Module) -> None:
        """Fill in, in place, what the user left open and what depends on the model, such as the modules to adapt.

        Raises:
            ValueError: there is nothing usual for this model.
        """
        if config.target_modules is None:
            required = not getattr(config, "target_parameters", None)
            config.target_modules = self.default_targets(config, model, required)

    def default_targets(self, config: Any, model: nn.Module, required: bool) -> Collection[str] | str | None:
        """Return the modules to adapt where the user names none.

        Raises:
            ValueError: there are none for this model, and ``required``.
        """
        return default_targets(model, required)

    def sites(self, config: Any, model: nn.Module, known: Mapping[str, Place]) -> list[Site] | None:
        """Return the places that the adapter sits on, where the method decides that itself, without changing the model.

        Args:
            config: the adapter's configuration.
            model: the model, which may already carry adapters.
            known: every module of the bare model by its path.

        Returns:
            Modules with the kind of layer that they are to the method; None where ``target_modules`` and
            ``target_parameters`` name them.

        Raises:
            ValueError: there is no such place in this model.
        """
        return None

    def join(self, slots: Sequence[Slot]) -> None:
        """Connect the slots of a new adapter, before they get their values, for methods whose layers share parameters."""

    def follows_tying(self, config: Any) -> bool:
        """Whether a layer whose weight is tied to an adapted one gets a twin slot, without parameters of its own."""
        return False

    def become_twin(self, slot: Slot, owner: Slot) -> None:
        """Make a slot on a tied layer use the parameters of ``owner`` instead of those that ``build`` made."""
        raise NotImplementedError

    # ------------------------------------------------------------------ beside other adapters

    def query(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        """Return what a fusion of several adapters asks by, ``[..., out]``: the output that they act on."""
        return y

    def change(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        """Return what ``after`` adds to y; for methods that only add, without the rounding of a difference."""
        if self.additive:
            return self.after(slot, x, y.new_zeros(()).expand_as(y))
        return self.after(slot, x, y) - y

    def mix(self, slot: Slot, query: Tensor, changes: Sequence[Tensor]) -> Tensor:
        """Return what a method that ``mixes`` adds to the layer's output ``query[..., out]``, given what each adapter adds."""
        raise NotImplementedError

    # ------------------------------------------------------------------ training

    def penalty(self, slots: Sequence[Slot]) -> Tensor | None:
        """Return a term that is added to the training loss, 0-d, over all layers of an adapter; None for no term."""
        return None

    def step(self, slots: Sequence[Slot], step: int) -> None:
        """Act on the whole adapter after an optimizer's step, while its gradients are still there.

        Args:
            slots: the adapter's slots on all layers.
            step: number of optimizer steps before this one.
        """

    @classmethod
    def steps(cls) -> bool:
        """Whether the method acts after each optimizer step."""
        return cls.step is not Method.step

    def state(self, slots: Sequence[Slot]) -> dict[str, Tensor]:
        """Return what ``step`` remembers between steps, so that a run can be resumed; empty where that is nothing."""
        return {}

    def load_state(self, slots: Sequence[Slot], state: dict[str, Tensor]) -> None:
        """Take up again what ``state`` returned.

        Raises:
            ValueError: the state belongs to another adapter; nothing is changed then.
        """

    # ------------------------------------------------------------------ files

    def fit(self, slot: Slot, config: Any) -> None:
        """Give a slot the shapes that a saved configuration asks for, whose values are about to be loaded."""

    def pack(self, slot: Slot, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what a file holds of a slot, by column, given what the slot holds."""
        return tensors

    def shared_names(self, config: Any) -> tuple[str, ...]:
        """Return the names of what a file holds of the adapter as a whole, beside what its slots hold."""
        return ()

    def shared(self, config: Any) -> Sequence[Tensor]:
        """Return the tensors of ``shared_names``."""
        return ()

    def load_shared(self, config: Any, tensors: Sequence[Tensor]) -> None:
        """Take up what ``shared`` returned.

        Raises:
            AdapterFileError: the tensors do not fit; nothing is changed then.
        """


def method_by_name(name: str) -> type[Method] | type[InputMethod]:
    """Return a registered method, of layers or of inputs.

    Raises:
        ValueError: there is none of this name.
    """
    load_built_in()
    if name not in METHODS:
        hint = difflib.get_close_matches(name, METHODS, n=1)
        raise ValueError(
            f"unknown method {name!r}{f'; did you mean {hint[0]!r}?' if hint else ''} (known: {', '.join(sorted(METHODS))})"
        )
    return METHODS[name]


def load_built_in() -> None:
    """Import the files in ``methods/``, each of which registers itself."""
    from . import methods

    for file in pkgutil.iter_modules(methods.__path__, f"{methods.__name__}."):
        importlib.import_module(file.name)
