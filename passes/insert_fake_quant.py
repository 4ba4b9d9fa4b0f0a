"""Insert calibrated fake-quants: static int8 post-training quantisation for one target.

    y = conv2d(x, W, b)
      -->
    y = conv2d(fake_quant(x, s_x, z_x), fake_quant(W, s_W, 0), b)

How it is done stands in `quant_insertion`, what is promised beside a noise budget in
`quant_promises`.

Limits: at most the bits of the target's grids; embedding tables stay float. Grids of fewer than 8
bits are stored in bytes by most targets: they cost accuracy and gain no speed there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pruna_ir.calibration import Method
from pruna_ir.passes.quant_insertion import Insertion, noise_budget
from pruna_ir.transform import Effect, Pass, Rewrite


@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Quantise layers to integer grids for one target, with ranges from calibration data.

    Options:
        target: the backend whose grids and placement to use; the pipeline's target by default.
        ranges: how activation ranges are chosen: ``mse``, ``minmax``, ``percentile`` or ``kl``.
        percentile: the share of values, in percent, that ``percentile`` keeps on each side.
        weights: how weight scales are chosen: ``minmax``, or ``mse``.
        granularity: one weight scale per output ``channel``, or one per ``tensor``.
        activations: ``symmetric`` or ``asymmetric`` grids, or the ``target``'s own choice.
        scales: ``any`` number, or ``powers-of-two``, up to one bit coarser. With those, and
            round-biases, convolutional nets compute the same bits in every runtime and in torch.
        bits: widths such as ``w4a8`` or ``float``, each for all layers or, after a glob and a
            colon, for those that the glob names: ``[w4a8, "head:float"]``; later ones win.
        ends: the width of the layers before and after which there is no other, such as ``w8a8``;
            entries of ``bits`` with a glob win over it.
        products: quantise products of two activations, such as those of attention that
            spell-out-attention leaves; by default where the target gains from it.
        samples: how many samples of the data to calibrate on, which must be there; by default up
            to 128.
        exclude: globs over module paths or operators whose layers stay float, such as ``head``,
            ``layer4*`` or ``aten.addmm``.
        sqnr_db: the lowest signal-to-quantisation-noise ratio of any output, against the program
            before, that the pipeline accepts. By default 20 dB (noise at a tenth of the signal),
            less 6.02 dB for each bit that the narrowest width is short of 8. It is a net for
            spoiled layers, not a statement about accuracy: trained CNNs reach 25 to 40 dB at
            8 bits, and one spoiled layer in a residual branch can stay above 20.

    Requires: calibration data in the context; folded batch norms for full speed.
    """

    name: ClassVar[str] = "insert-fake-quant"
    effect: ClassVar[Effect] = Effect.BOUNDED

    target: str = ""
    ranges: Method = "mse"
    percentile: float = 99.99
    weights: Literal["minmax", "mse"] = "minmax"
    granularity: Literal["channel", "tensor"] = "channel"
    activations: Literal["target", "symmetric", "asymmetric"] = "target"
    scales: Literal["any", "powers-of-two"] = "any"
    bits: tuple[str, ...] = ()
    ends: str = ""
    products: bool | None = None
    samples: int | None = None
    exclude: tuple[str, ...] = ()
    sqnr_db: float | None = None

    def __post_init__(self) -> None:
        self._insertion()

    def _insertion(self) -> Insertion:
        return Insertion(
            owner=self.name, target=self.target, ranges=self.ranges, percentile=self.percentile,
            weights=self.weights, granularity=self.granularity, activations=self.activations,
            scales=self.scales, bits=self.bits, ends=self.ends, products=self.products,
            samples=self.samples, exclude=self.exclude,
        )  # fmt: skip

    @property
    def min_sqnr_db(self) -> float:  # type: ignore[override]  # the options decide
        """The budget of the pipeline's check."""
        if self.sqnr_db is not None:
            return self.sqnr_db
        return noise_budget(self._insertion().widths().narrowest())

    def rewrite(self, rw: Rewrite) -> None:
        """Place, calibrate, insert."""
        self._insertion().insert(rw)
