"""Random small networks out of the whole rule table, for property tests of pruning.

A `Recipe` names the layers; `Network` builds them one after another, each for the width that it
finds. Weights are those of the layers' own initialisers; norms, their statistics and whatever else
starts out as ones and zeros are drawn at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.coupling.images import IMAGES, Layer
from tests.coupling.operators import OPERATORS
from tests.coupling.sequences import LINES, VOLUMES
from tests.coupling.tokens import TOKENS

ENTRIES = ("image", "pair-add", "pair-join", "pair-attend", "pair-gate", "ids")
ENDINGS = ("mean", "flatten", "largest", "first", "places", "tied")
KINDS: Mapping[str, Mapping[str, Layer]] = MappingProxyType(
    {"images": IMAGES | OPERATORS, "tokens": TOKENS, "lines": LINES, "volumes": VOLUMES}
)
VOCABULARY = 11


@dataclass(frozen=True)
class Recipe:
    """A network by the names of its parts.

    Attributes:
        images: layers on images; none where the entry is ``ids``.
        kind: what comes after them: ``tokens``, ``lines``, ``volumes``, or ``images`` for nothing.
        layers: layers of that kind.
        entry: the inputs: one image, two images and how they meet, or token ids.
        ending: how the places are reduced before the head.
        seed: of the weights.
    """

    images: tuple[str, ...] = ()
    kind: str = "images"
    layers: tuple[str, ...] = ()
    entry: str = "image"
    ending: str = "mean"
    seed: int = 1


class Entry(nn.Module):
    """Two images of 3 and 2 channels become one of 6."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = (nn.Conv2d(c, 6, 3, padding=1) for c in (3, 2))
        if how == "pair-join":
            self.mix = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.first(x), self.second(y)
        if self.how == "pair-join":
            return self.mix(torch.cat([x, y], 1))
        if self.how == "pair-gate":
            return x * torch.sigmoid(y.mean((2, 3), keepdim=True))
        if self.how == "pair-attend":
            q, k = x.flatten(2).transpose(1, 2), y.flatten(2).transpose(1, 2)
            z = F.scaled_dot_product_attention(q, k, k)
            return x + z.transpose(1, 2).reshape(x.shape)
        return x + y


class Network(nn.Module):
    """The network of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.entry: nn.Module = nn.Conv2d(3, 6, 3, padding=1)
        if recipe.entry == "ids":
            self.entry = nn.Embedding(VOCABULARY, 8)
        elif recipe.entry != "image":
            self.entry = Entry(recipe.entry)
        x = self.entry(*self.inputs(2))
        self.images, self.layers = nn.ModuleList(), nn.ModuleList()
        for name in () if recipe.entry == "ids" else recipe.images:
            x = _add(self.images, KINDS["images"][name], x, 1)
        x, tokens = self.turned(x), recipe.kind == "tokens"
        for name in recipe.layers:
            x = _add(self.layers, KINDS[recipe.kind][name], x, -1 if tokens else 1)
        self.fit: nn.Module = nn.Linear(x.shape[-1], 8) if self.tied else nn.Identity()
        self.head = nn.Linear(VOCABULARY if self.tied else self.features(x).shape[-1], 4)
        self.eval()

    @property
    def tied(self) -> bool:
        """Whether logits come from the embedding's own weight."""
        return self.recipe.ending == "tied" and self.recipe.entry == "ids"

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Random inputs."""
        if self.recipe.entry == "ids":
            return (torch.randint(0, VOCABULARY, (batch, 9)),)
        images = (torch.randn(batch, 3, 6, 6), torch.randn(batch, 2, 6, 6))
        return images[: 1 if self.recipe.entry == "image" else 2]

    def turned(self, x: Tensor) -> Tensor:
        """Images in the form of the layers that follow."""
        if self.recipe.entry == "ids" or self.recipe.kind == "images":
            return x
        if self.recipe.kind == "tokens":
            return x.flatten(2).transpose(1, 2)
        if self.recipe.kind == "lines":
            return x[:, :, ::3].flatten(2)
        return x.unflatten(2, (2, 3)).repeat(1, 1, 2, 1, 1)[..., ::2]

    def features(self, x: Tensor) -> Tensor:
        """What the head reads: [batch, features], or [batch, places, features]."""
        tokens = self.recipe.kind == "tokens"
        x, ending = x if tokens else x.flatten(2).transpose(1, 2), self.recipe.ending
        if self.tied:
            return F.linear(self.fit(x), self.entry.weight)
        if ending == "flatten":
            return x[:, :4].flatten(1) if tokens else x[:, :4].transpose(1, 2).reshape(len(x), -1)
        if ending == "places":
            return x
        if ending == "largest":
            return x.amax(1)
        return x[:, 0] if ending == "first" else x.mean(1)

    def forward(self, *inputs: Tensor) -> Tensor:
        x = self.entry(*inputs)
        for layer in self.images:
            x = layer(x)
        x = self.turned(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.features(x))


def _add(layers: nn.ModuleList, make: Layer, x: Tensor, dim: int) -> Tensor:
    """Append a layer for the width that it finds in a dimension; the value after it."""
    layer = make(x.shape[dim])
    _randomise(layer)
    layers.append(layer.eval())
    with torch.no_grad():
        result: Tensor = layer(x)
    return result


def _randomise(layer: nn.Module) -> None:
    """Norms with weights, biases and statistics of their own."""
    for module in layer.modules():
        for name, tensor in (*module.named_parameters(recurse=False),
                             *module.named_buffers(recurse=False)):  # fmt: skip
            if not tensor.is_floating_point() or not bool((tensor == tensor.flatten()[0]).all()):
                continue
            with torch.no_grad():
                tensor.uniform_(*((-0.5, 0.5) if name in ("bias", "running_mean") else (0.5, 1.5)))


def _often(names: Mapping[str, Layer]) -> list[str]:
    """Norms and softmax three times as often as the others."""
    words = ("norm", "softmax", "standardised", "convnext", "statistic")
    return [n for n in sorted(names) for _ in range(3 if any(w in n for w in words) else 1)]


def _layers(kind: str, most: int) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(_often(KINDS[kind])), max_size=most).map(tuple)


_ENDING = st.sampled_from(ENDINGS[:-1])
_SEED = st.integers(0, 99)
_IMAGE = st.sampled_from([*["image"] * 4, *ENTRIES[1:-1]])

recipes: st.SearchStrategy[Recipe] = st.one_of(
    st.builds(Recipe, _layers("images", 5), entry=_IMAGE, ending=_ENDING, seed=_SEED),
    *(
        st.builds(
            Recipe, _layers("images", 2), st.just(kind), _layers(kind, 3), entry=_IMAGE,
            ending=_ENDING, seed=_SEED,
        )
        for kind in ("tokens", "tokens", "lines", "volumes")
    ),
    st.builds(
        Recipe, st.just(()), st.just("tokens"), _layers("tokens", 3), entry=st.just("ids"),
        ending=st.sampled_from(ENDINGS), seed=_SEED,
    ),
)  # fmt: skip
"""Recipes of up to 5 layers."""

networks = recipes.map(Network)
"""Their networks."""


def single(kind: str, name: str) -> Recipe:
    """The recipe that puts one layer between two others that can be pruned."""
    if kind == "images":
        return Recipe(("relu", name, "conv", "relu"))
    before = ("linear",) if kind == "tokens" else ("conv",)
    return Recipe(("relu",), kind, (*before, name))


CATALOGUE: tuple[tuple[str, str], ...] = tuple(
    (kind, name) for kind, layers in KINDS.items() for name in layers
)
"""Every layer by kind and name."""


@dataclass(frozen=True)
class Form:
    """How a network is captured: with a free batch or a fixed one, in canonical form or not."""

    dynamic: bool = True
    canonical: bool = True


forms: st.SearchStrategy[Form] = st.builds(Form, st.booleans(), st.booleans())
"""All forms."""
