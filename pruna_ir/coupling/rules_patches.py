"""Rules of operators that cut images into patches, put them together, and sample them."""

from __future__ import annotations

from pruna_ir.coupling.rule import Result, Rule, Site
from pruna_ir.coupling.value import Factor, Value, factors_of


def _im2col(site: Site) -> Result:
    """[N, C, H, W] -> [N, C * kh * kw, places]: a channel becomes all columns of its window."""
    value = site.value("self")
    lead = len(value.dims) - 3
    value = site.because("slides over them").whole_dims(value, [lead + 1, lead + 2])
    kh, kw = (int(k) for k in site.arg("kernel_size"))
    columns = (*value.dims[lead], *factors_of(kh * kw))
    return Value((*value.dims[:lead], columns, *_places(site, lead + 1)), value.blocks)


def _col2im(site: Site) -> Result:
    """[N, C * kh * kw, places] -> [N, C, H, W]: the columns of a window go together."""
    value = site.value("self")
    lead = len(value.dims) - 2
    kh, kw = (int(k) for k in site.arg("kernel_size"))
    sizes = value.sizes()
    split = site.algebra.regroup(
        value, (*sizes[:lead], sizes[lead] // (kh * kw), kh * kw, sizes[lead + 1])
    )
    split = site.because("become pixels").whole_dims(split, [lead + 1, lead + 2])
    return Value((*split.dims[: lead + 1], *_places(site, lead + 1)), split.blocks)


def _places(site: Site, start: int) -> tuple[tuple[Factor, ...], ...]:
    """The untracked dimensions of the result from ``start`` on."""
    return tuple(factors_of(size) for size in site.shape()[start:])


def _unfold(site: Site) -> Result:
    """Windows along one dimension, which become the last one."""
    value = site.value("self")
    dim = site.axis("dimension", len(value.dims))
    value = site.because("slides over them").whole_dims(value, [dim])
    dims = list(value.dims)
    dims[dim] = factors_of(site.shape()[dim])
    return Value((*dims, factors_of(int(site.arg("size")))), value.blocks)


def _pixel_unshuffle(site: Site) -> Result:
    """[..., C, H * r, W * r] -> [..., C * r * r, H, W]: a channel becomes r * r of them."""
    value, r = site.value("self"), int(site.arg("downscale_factor"))
    lead = len(value.dims) - 3
    value = site.because("become channels").whole_dims(value, [lead + 1, lead + 2])
    channels = (*value.dims[lead], *factors_of(r * r))
    return Value((*value.dims[:lead], channels, *_places(site, lead + 1)), value.blocks)


def _grid_sampler(site: Site) -> Result:
    """The input's channels, at places that the grid names."""
    value, grid = site.value("input"), site.value("grid")
    spatial = range(2, len(value.dims))
    value = site.because("are read at places that are computed").whole_dims(value, spatial)
    site.because("are places, not channels").freeze(grid)
    return Value((*value.dims[:2], *_places(site, 2)), value.blocks)


RULES: dict[str, Rule] = {
    "aten::im2col": Rule(_im2col),
    "aten::col2im": Rule(_col2im),
    "aten::unfold": Rule(_unfold),
    "aten::pixel_unshuffle": Rule(_pixel_unshuffle),
    **{f"aten::{name}": Rule(_grid_sampler) for name in (
        "grid_sampler", "grid_sampler_2d", "grid_sampler_3d")},
}  # fmt: skip
